"""When the certificates that a service uses expire: a metric of each, and a warning in the log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import anyio
import structlog

from tolaria.security.certificates import Validity, now_utc
from tolaria.telemetry.metrics import Metrics

_LOOK_S: Final = 60.0
_REPEAT_S: Final = 12 * 3600.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class UsedCertificate:
    """The validity of a certificate that is in use, and the file that it was read from, which may have a newer one."""

    path: str
    validity: Validity


class CertificateExpiry:
    """Looks at certificates again and again, since they are replaced while the service runs.

    Args:
        certificates: returns those that are in use now, by setting.
        metrics: get the end of each.
    """

    def __init__(self, certificates: Callable[[], Mapping[str, UsedCertificate]], metrics: Metrics) -> None:
        self._certificates = certificates
        self._metrics = metrics
        self._seen = set[str]()
        self._warned: dict[str, tuple[str, float]] = {}

    async def keep_current(self) -> None:
        """Looks every minute, and repeats a warning twice a day, until cancelled."""
        while True:
            self._look(self._certificates())
            await anyio.sleep(_LOOK_S)

    def _look(self, certificates: Mapping[str, UsedCertificate]) -> None:
        now, metrics = now_utc(), self._metrics
        for setting in self._seen - certificates.keys():  # it is not used any more
            metrics.server_certificate_expires.remove(setting)
            metrics.server_certificate_due.remove(setting)
        self._seen = set(certificates)
        for setting, certificate in certificates.items():
            metrics.server_certificate_expires.labels(setting).set(certificate.validity.ends.timestamp())
            metrics.server_certificate_due.labels(setting).set(now >= certificate.validity.renewal_due)
            if warning := certificate.validity.warning(setting, certificate.path, now):
                self._warn(setting, warning)

    def _warn(self, setting: str, warning: str) -> None:
        last, warned_s = self._warned.get(setting, ("", 0.0))
        if warning != last or time.monotonic() - warned_s >= _REPEAT_S:
            self._warned[setting] = warning, time.monotonic()
            _log.warning("certificate_expires", detail=warning)
