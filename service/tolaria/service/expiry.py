"""When the certificates of a service expire: a metric of each, and a warning in the log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

import anyio
import anyio.to_thread
import structlog

from tolaria.errors import CredentialsError
from tolaria.security.certificates import TlsFiles, now_utc
from tolaria.telemetry.metrics import Metrics

_LOOK_S: Final = 60.0
_REPEAT_S: Final = 12 * 3600.0

_log = structlog.get_logger(__name__)


class CertificateExpiry:
    """Looks at certificates again and again, since they are replaced while the service runs.

    Args:
        certificates: returns the files of those that are used now, by setting.
        metrics: get the end of each.
    """

    def __init__(self, certificates: Callable[[], Mapping[str, TlsFiles]], metrics: Metrics) -> None:
        self._certificates = certificates
        self._metrics = metrics
        self._seen = set[str]()
        self._said_s: dict[str, float] = {}

    async def keep_current(self) -> None:
        """Looks every minute, and repeats a warning twice a day, until cancelled."""
        while True:
            certificates = self._certificates()
            for setting in self._seen - certificates.keys():
                self._forget(setting)
            for setting, files in certificates.items():
                await anyio.to_thread.run_sync(self._look, setting, files, abandon_on_cancel=True)
            await anyio.sleep(_LOOK_S)

    def _look(self, setting: str, files: TlsFiles) -> None:
        try:
            validity, now = files.validity(), now_utc()
        except CredentialsError as error:  # being replaced: the one in use stays in force
            self._say("certificate_expiry_unknown", str(error))
            return
        self._seen.add(setting)
        self._metrics.server_certificate_expires.labels(setting).set(validity.ends.timestamp())
        self._metrics.server_certificate_renewal_due.labels(setting).set(now >= validity.renewal_due)
        if warning := validity.warning(setting, files.cert, now):
            self._say("certificate_expires", warning)

    def _forget(self, setting: str) -> None:
        """Ends the metrics of a certificate that is not used any more."""
        self._seen.discard(setting)
        self._metrics.server_certificate_expires.remove(setting)
        self._metrics.server_certificate_renewal_due.remove(setting)

    def _say(self, event: str, detail: str) -> None:
        if (said_s := self._said_s.get(detail)) is None or time.monotonic() - said_s >= _REPEAT_S:
            self._said_s = {detail: time.monotonic(), **{k: v for k, v in self._said_s.items() if k != detail}}
            _log.warning(event, detail=detail)
