"""Network addresses as settings hold them: `host:port` text, checked once. Resolves no names, opens no sockets."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", re.ASCII)
_LOOKS_NUMERIC = re.compile(r"[0-9.]+|.*:.*", re.ASCII)


def _is_wrong_ip(host: str) -> bool:
    """Whether it can only be meant as an IP address and is none."""
    if not _LOOKS_NUMERIC.fullmatch(host):
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port; port 0 lets the system choose. IPv6 hosts stand in brackets in text."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `host:port` or `[v6]:port`.

        Raises:
            ValueError: when the text is neither; the message holds the text.
        """
        host, separator, port_text = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if not separator or not (bracketed or _HOST.fullmatch(host)) or _is_wrong_ip(host.strip("[]")):
            raise ValueError(f"{text!r} is not host:port")
        if not (port_text.isascii() and port_text.isdigit()) or int(port_text) > 65535:
            raise ValueError(f"{text!r} has no port from 0 to 65535")
        return cls(host.strip("[]"), int(port_text))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"
