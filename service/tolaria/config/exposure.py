"""Which addresses other machines can reach, and what has to be set before they may be listened on."""

from __future__ import annotations

from tolaria.config.fields import Address
from tolaria.config.settings import Settings
from tolaria.errors import ExposedError


def require_protection(settings: Settings) -> None:
    """Raises ExposedError if other machines could reach the admin server without TLS or without a token.

    `server.insecure` allows it. Loopback needs neither: who has an account on this machine is trusted.
    """
    server = settings.server
    if server.insecure or Address.parse(server.listen).is_loopback:
        return
    if missing := _missing(settings):
        needed = " and ".join(_NEEDED[what] for what in missing)
        raise ExposedError(
            f"server.listen is {server.listen}, which other machines can reach, without {' and '.join(missing)}: set "
            f"{needed} (`tolaria certs` and `tolaria token new` make the files), "
            "or listen on 127.0.0.1, or accept the risk with server.insecure = true"
        )


def exposure_warnings(settings: Settings) -> list[str]:
    """Returns a sentence for each address that other machines can reach without TLS or authentication."""
    server, metrics, lane, warnings = settings.server, settings.metrics, settings.lane, []
    missing = _missing(settings)
    if missing and not Address.parse(server.listen).is_loopback:
        warnings.append(
            f"server.insecure: other machines can reach {server.listen} without {' and '.join(missing)}; "
            "who reaches it can stop the run"
        )
    if not metrics.web_config and not Address.parse(metrics.listen).is_loopback:
        warnings.append(
            f"metrics.listen: other machines can read the metrics at {metrics.listen} without TLS or a password; "
            "metrics.web_config sets both"
        )
    if lane.mode == "torchrun" and lane.nodes_max > 1 and not Address.parse(lane.rendezvous).is_loopback:
        warnings.append(
            f"lane.rendezvous: other machines can reach {lane.rendezvous}, and who has the group's secret can join; "
            "what ranks exchange is neither authenticated nor encrypted, and belongs in a private network"
        )
    return warnings


_NEEDED = {"TLS": "server.tls_cert, server.tls_key", "tokens": "server.tokens"}


def _missing(settings: Settings) -> list[str]:
    given = {"TLS": settings.server.tls_cert, "tokens": settings.server.tokens}
    return [what for what, path in given.items() if not path]
