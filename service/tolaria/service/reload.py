"""Reading the settings again while the service runs: some take effect at once, the rest waits for a restart."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import anyio
import anyio.to_thread

from leyline.v1 import admin_service_pb2 as admin
from tolaria.config import Difference, Settings, differences, require_protection, with_live
from tolaria.errors import ConfigurationError
from tolaria.service import settings_record
from tolaria.service.protection import Protection
from tolaria.service.wiring import LiveParts
from tolaria.telemetry import events
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.metrics import Metrics

READ_S: Final = 10.0
"""Longest wait for the file, and for the record of the settings."""

_TERMINAL: Final = "/dev/tty"


class Reload:
    """The settings of one service that runs. Used on the event loop only.

    A file that could not be started with changes nothing. Each part takes a new value with its next decision: nothing
    that is underway, in the lane least of all, sees it.

    `reread` returns what the sources of the settings say now, in a thread; it raises ConfigurationError.

    Attributes:
        in_force: the present settings.
        parts: those that take new settings; None until they exist.
    """

    def __init__(
        self,
        settings: Settings,
        reread: Callable[[], Settings],
        protection: Protection,
        emitter: Emitter,
        *,
        metrics: Metrics,
        run_id: str,
    ) -> None:
        self._reread = reread
        self._succeeded = metrics.config_last_reload_successful
        self._succeeded.set(1)  # the service has started with them
        self._protection = protection
        self._emitter = emitter
        self._run_id = run_id
        self._turn = anyio.Lock()
        self.in_force = settings
        self.parts: LiveParts | None = None

    async def carry_out(self, origin: str) -> admin.ReloadConfigResponse:
        """Reads the sources again, and returns what has changed and what waits for a restart.

        `origin` says in events what has asked for it. Raises ConfigurationError, which names the settings.
        """
        async with self._turn:
            try:
                wanted = await self._read()
                require_protection(wanted)
                effective = with_live(self.in_force, wanted)
            except ConfigurationError as error:
                self._succeeded.set(0)
                self._emitter.emit(events.CONFIG_RELOAD_FAILED, origin=origin, problem="; ".join(error.problems))
                raise
            self._succeeded.set(1)
            found = differences(self.in_force, wanted)
            changed, waiting = [one for one in found if one.live], [one for one in found if not one.live]
            if changed:
                self._adopt(effective)
                with anyio.move_on_after(READ_S):  # a disk that hangs keeps nothing from taking effect
                    record = partial(settings_record.record, effective, self._run_id)
                    await anyio.to_thread.run_sync(record, abandon_on_cancel=True)
            self._emitter.emit(
                events.CONFIG_RELOADED, origin=origin, changed=_in_words(changed), waiting=_in_words(waiting)
            )
        return admin.ReloadConfigResponse(
            changed=map(_message, changed), waiting=map(_message, waiting), notices=wanted.notices
        )

    async def _read(self) -> Settings:
        with anyio.move_on_after(READ_S):
            return await anyio.to_thread.run_sync(self._reread, abandon_on_cancel=True)
        raise ConfigurationError([f"the settings could not be read within {READ_S:g} s"])

    def _adopt(self, settings: Settings) -> None:
        self.in_force = settings
        self._protection.adopt(settings)
        if self.parts is not None:
            self.parts.adopt(settings)


def has_terminal() -> bool:
    """Whether this process has a controlling terminal. One that hung up, of which SIGHUP tells, is none."""
    try:
        os.close(os.open(_TERMINAL, os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _message(difference: Difference) -> admin.SettingChange:
    return admin.SettingChange(name=difference.name, before=difference.before, after=difference.after)


def _in_words(found: Sequence[Difference]) -> str:
    return "; ".join(f"{one.name}: {one.before} -> {one.after}" for one in found)
