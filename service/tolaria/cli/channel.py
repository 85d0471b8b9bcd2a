"""The channel of client commands: TLS, the token, and where neither may be sent."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from tolaria.config import Address, Connection
from tolaria.config.connections import SYSTEM_CAS
from tolaria.errors import ConfigurationError
from tolaria.security.certificates import TlsFiles
from tolaria.security.watched import read_file


@asynccontextmanager
async def open_channel(address: Address, found: Connection) -> AsyncIterator[grpc.aio.Channel]:
    """Opens a channel, with TLS if the connection names a CA, and the token in each call.

    Raises:
        CredentialsError: a file cannot be used.
        ConfigurationError: the token would be sent unencrypted to another machine.
    """
    token, credentials = await asyncio.to_thread(_read, address, found)
    # A proxy from the environment must not take connections to a loopback port.
    options: list[tuple[str, Any]] = [("grpc.enable_http_proxy", 0)]
    if found.tls_name:
        options.append(("grpc.ssl_target_name_override", found.tls_name))
    interceptors = [_BearerOfCalls(token), _BearerOfStreams(token)] if token else []
    if credentials is None:
        channel = grpc.aio.insecure_channel(str(address), options=options, interceptors=interceptors)
    else:
        channel = grpc.aio.secure_channel(str(address), credentials, options=options, interceptors=interceptors)
    async with channel:
        yield channel


def _read(address: Address, found: Connection) -> tuple[str, grpc.ChannelCredentials | None]:
    """Returns the token, if there is one, and the credentials, if there is TLS."""
    token = _token(address, found) if found.token_file else ""
    return token, _credentials(found) if found.tls_ca else None


def tls_hint(found: Connection, problem: str) -> str:
    """Returns what may help when no connection is made: TLS on one side only looks like no service."""
    if "Connection refused" in problem:
        return ""
    if found.tls_ca:
        return "; it may serve without TLS, have another certificate, or require one of the client"
    return "; it may serve with TLS: give its CA with TOLARIA_TLS_CA or a profile"


def _credentials(found: Connection) -> grpc.ChannelCredentials:
    authorities = "" if found.tls_ca == SYSTEM_CAS else found.tls_ca
    files = TlsFiles("the client", found.tls_cert, found.tls_key, authorities, authorities_setting="tls_ca")
    identity, _ = files.read()
    roots = identity.authorities or _system_authorities()
    return grpc.ssl_channel_credentials(roots, identity.key or None, identity.chain or None)


def _system_authorities() -> bytes:
    """Returns the CAs of the system in PEM; gRPC would take those that it brings along."""
    found = ssl.create_default_context().get_ca_certs(binary_form=True)
    return "".join(ssl.DER_cert_to_PEM_cert(certificate) for certificate in found).encode()


def _token(address: Address, found: Connection) -> str:
    path = found.token_file
    if not found.tls_ca and not address.is_loopback:
        raise ConfigurationError(
            [f"the token of {path} is not sent to {address} without TLS; give tls_ca (TOLARIA_TLS_CA)"]
        )
    text = read_file(path, "token_file").decode("utf-8", "replace").strip()
    if not text or not text.isascii() or not text.isprintable():
        raise ConfigurationError([f"token_file: {path} holds no token, which is one line of printable characters"])
    return text


class _BearerOfCalls(grpc.aio.UnaryUnaryClientInterceptor):
    """Adds the token to the metadata of each call. gRPC takes an interceptor for one kind of call only."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        """Makes the call with the token."""
        return await continuation(_with_token(client_call_details, self._token), request)


class _BearerOfStreams(grpc.aio.UnaryStreamClientInterceptor):
    """Adds the token to the metadata of each stream."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        """Opens the stream with the token."""
        return await continuation(_with_token(client_call_details, self._token), request)


def _with_token(details: Any, token: str) -> Any:
    metadata = grpc.aio.Metadata(*(details.metadata or ()), ("authorization", f"Bearer {token}"))
    return details._replace(metadata=metadata)
