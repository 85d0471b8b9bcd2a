"""The health check of containers, by the gRPC health service: `python -m tolaria.probe HOST:PORT [SERVICE]`.

TLS files are those of client commands (`TOLARIA_TLS_CA`). It imports little, since it runs every few seconds. The
kubelet's own gRPC probes reach no loopback and speak no TLS.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from tolaria.config.connections import SYSTEM_CAS, Connection, connection

TIMEOUT_S: Final = 3.0
_USAGE: Final = "usage: python -m tolaria.probe HOST:PORT [SERVICE]\n"


def probe(address: str, service: str) -> str:
    """Returns why a service of grpc.health.v1 does not serve; an empty text if it does."""
    with _channel(address, connection(address=address)) as channel:
        stub: Any = HealthStub(channel)  # its methods are missing from its type stubs
        try:
            answer = stub.Check(HealthCheckRequest(service=service), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            return f"{address} does not answer: {error.code().name}"
    if answer.status == HealthCheckResponse.SERVING:
        return ""
    return f"{service or 'the server'} at {address} is {HealthCheckResponse.ServingStatus.Name(answer.status)}"


def _channel(address: str, known: Connection) -> grpc.Channel:
    """Returns a channel, by TLS if the environment of clients has a CA. Health needs no token."""
    # A proxy from the environment must not be used for the container's own loopback.
    options: list[tuple[str, int | str]] = [("grpc.enable_http_proxy", 0)]
    if not known.tls_ca:
        return grpc.insecure_channel(address, options=options)
    if known.tls_name:
        options.append(("grpc.ssl_target_name_override", known.tls_name))
    files = [known.tls_ca * (known.tls_ca != SYSTEM_CAS), known.tls_key, known.tls_cert]
    credentials = grpc.ssl_channel_credentials(*(Path(name).read_bytes() if name else None for name in files))
    return grpc.secure_channel(address, credentials, options=options)


def main(arguments: Sequence[str]) -> int:
    """Prints why it does not serve. Returns 0 if it serves, 1 if it does not, 2 for wrong arguments."""
    if not 1 <= len(arguments) <= 2:
        sys.stderr.write(_USAGE)
        return 2
    problem = probe(arguments[0], "".join(arguments[1:]))
    if problem:
        sys.stderr.write(f"{problem}\n")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
