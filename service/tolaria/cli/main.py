"""The entry point of the `tolaria` command: standard streams, early signals, then the command itself."""

# ruff: noqa: PLC0415 - signals are handled before the slow imports begin
from __future__ import annotations

import errno
import gc
import io
import os
import sys
import threading
from typing import NoReturn

from tolaria.cli.errors import OutputError, ReaderGoneError, early_signals, report


def main() -> None:
    """Runs the command given in `sys.argv` and exits with its code."""
    open_standard_streams()
    if sys.argv[1:2] in (["serve"], ["peer"]):
        gc.disable()  # until all is imported: see `tolaria.service.start` and `tolaria.cli.commands.peer`
    # Only `serve` runs as the first process of a container; the default signal handlers suit the other commands.
    if sys.argv[1:2] == ["serve"]:
        early_signals.install()
    try:
        _run()
    except BaseException as error:
        # An interrupted import may fail with any exception.
        if isinstance(error, KeyboardInterrupt) or early_signals.received:
            sys.exit(early_signals.exit_code)
        if isinstance(error, SystemExit) and sys.argv[1:2] in (["check-job"], ["export"]):
            _leave_threads(error.code)
        raise


def _leave_threads(code: object) -> None:
    """Ends the process at once if a job has left threads running, for which the interpreter would wait for ever."""
    if all(thread.daemon or thread is threading.main_thread() for thread in threading.enumerate()):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _run() -> None:
    if isinstance(out := sys.stdout, io.TextIOWrapper):
        encoding, errors, line_buffering = out.encoding, out.errors, out.line_buffering
        sys.stdout = CheckedOutput(out.detach(), encoding=encoding, errors=errors, line_buffering=line_buffering)
    from tolaria.cli.commands import app

    try:
        app(prog_name="tolaria")
    except OutputError as error:  # the help text is printed before a command is invoked
        sys.exit(report([error]))


def open_standard_streams() -> None:
    """Opens the null device for each standard stream that is closed.

    Otherwise the next file or socket that is opened gets the descriptor of that stream, and receives its output.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # returns the lowest free number, which is `descriptor`
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)


class CheckedOutput(io.TextIOWrapper):
    """A text stream that raises ReaderGoneError for a closed pipe and OutputError for any other failed write."""

    def write(self, text: str, /) -> int:
        """Writes `text` as any text stream does."""
        try:
            return super().write(text)
        except OSError as error:
            self._fail(error)

    def flush(self) -> None:
        """Flushes as any text stream does."""
        try:
            super().flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> NoReturn:
        # Discards what is still buffered: the interpreter flushes once more at exit and would report the error again.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        if error.errno == errno.EPIPE:
            raise ReaderGoneError("standard output: the reader has closed the pipe") from None
        raise OutputError(f"standard output: {error.strerror or error}") from None
