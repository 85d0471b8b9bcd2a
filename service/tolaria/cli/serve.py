"""`tolaria serve`: hand checked settings to the service. Must not know how a service is built."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from tolaria.config import load_settings

_STDIN = 0


def serve(config_file: Path | None, overrides: list[str], *, while_stdin: bool) -> int:
    """Serve until told to stop, and return the exit code.

    Raises:
        ConfigurationError: when the settings cannot be used; nothing has been started then.
    """
    settings = load_settings(config_file, overrides)
    if while_stdin:
        threading.Thread(target=_terminate_after_stdin, name="stdin", daemon=True).start()
    # Late, because this is what imports torch: wrong settings are told in a moment, and no other command pays.
    from tolaria.service import run  # noqa: PLC0415 - the reason stands above

    return run(settings)


def _terminate_after_stdin() -> None:
    """Whoever started this process holds the other end, so that its end, of whatever kind, is ours too."""
    try:
        while os.read(_STDIN, 4096):
            pass
    except OSError:
        pass  # a standard input that was never open has ended
    os.kill(os.getpid(), signal.SIGTERM)
