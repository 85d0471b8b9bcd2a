"""Who calls: an interceptor that authenticates callers, and holds them to their roles and limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import unquote

import anyio
import grpc
import grpc.aio
import structlog
from google.rpc import code_pb2

from tolaria import errors
from tolaria.rpc.status import abort, status_of
from tolaria.security.certificates import now_utc
from tolaria.security.limits import CallerLimits, Usage
from tolaria.security.tokens import TEXT_MAX, Role, Token, Tokens
from tolaria.security.watched import WatchedFiles
from tolaria.telemetry.metrics import Metrics

_ADMIN: Final = "/leyline.v1.TolariaAdminService/"

_CODES: Final = {code.value[0]: code.name for code in grpc.StatusCode}

Context = grpc.aio.ServicerContext[object, object]

ROLES: Final[dict[str, Role]] = {
    **dict.fromkeys(
        (
            *(f"{_ADMIN}{name}" for name in ("GetStatus", "WatchStatus", "ListRestorePoints", "ListIncidents")),
            f"{_ADMIN}ListDataSkips",
            f"{_ADMIN}StreamTelemetry",
            *(f"/grpc.reflection.{v}.ServerReflection/ServerReflectionInfo" for v in ("v1", "v1alpha")),
        ),
        Role.VIEWER,
    ),
    **dict.fromkeys(
        (
            *(f"{_ADMIN}{name}" for name in ("PauseTraining", "ResumeTraining", "TriggerRollback", "CreateCheckpoint")),
            *(f"{_ADMIN}{name}" for name in ("RaiseEmergency", "ClearEmergency", "SetConservativeMode")),
            *(f"{_ADMIN}{name}" for name in ("AdjustLearningRate", "CaptureProfile", "ListAdminCalls", "ExportModel")),
            *(f"{_ADMIN}{name}" for name in ("SkipData", "ReloadConfig", "Shutdown")),
        ),
        Role.OPERATOR,
    ),
}
"""The least role of each method. A method that is missing here needs an admin."""

OPEN: Final = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
"""Methods without authentication: probes have no tokens, and learn no more than whether a part serves."""

URGENT: Final = frozenset({f"{_ADMIN}RaiseEmergency"})
"""Methods for which a caller need not wait, and that its limits do not refuse: a halt must get through."""

LATE_S: Final = 1.0
"""Seconds after which a caller that makes too many mistakes is answered."""

LATE_MAX: Final = 512
"""Answers that are waited with at the same time; further ones are sent at once."""

NAMES_MAX: Final = 64
"""Callers that metrics count by name; later ones are counted as `other`."""

LOG_S: Final = 1.0
"""Seconds between two log lines about refused calls."""

_MISTAKES: Final = frozenset({"INVALID_ARGUMENT", "UNIMPLEMENTED", "UNAUTHENTICATED", "PERMISSION_DENIED"})
"""Statuses that count as the caller's mistakes."""

ANONYMOUS, UNKNOWN, OTHER = "anonymous", "unknown", "other"
"""Names of callers: all, where no token is required; those that are not authenticated; those beyond NAMES_MAX."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call: the name and role of the token, the address, and the name in the client's certificate."""

    name: str
    role: Role
    peer: str = ""
    certificate: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.certificate})" if self.certificate else self.name


_EVERY_CALLER: Final = Caller(ANONYMOUS, Role.ADMIN)
_CALLER: ContextVar[Caller] = ContextVar("caller", default=_EVERY_CALLER)


def present_caller() -> Caller:
    """Returns the caller of the call that is being handled."""
    return _CALLER.get()


class CallerInterceptor(grpc.aio.ServerInterceptor):
    """Authenticates each call, checks the role that its method needs, and applies the limits. For one event loop.

    Without `tokens` every caller is an admin. Callers with a token share the limits of its name; others have limits
    for each connection if they are admitted, so that none can lock out another, and for each host if they are not.

    Attributes:
        on_denied: called with the name of a method and its caller, where the caller's role does not allow it.
    """

    def __init__(self, tokens: WatchedFiles[Tokens] | None, limits: CallerLimits, metrics: Metrics) -> None:
        self._tokens = tokens
        self._limits = limits
        self._metrics = metrics
        self._log = structlog.get_logger(__name__)
        self._names = {UNKNOWN, ANONYMOUS}
        self._late = 0
        self._log_at_s, self._not_logged = 0.0, 0
        self.on_denied: Callable[[str, Caller, errors.TolariaError], None] = lambda _method, _caller, _error: None

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Returns the method's handler behind the checks, or one that refuses the call without reading its request."""
        method = str(handler_call_details.method)
        caller = Caller(UNKNOWN, Role.VIEWER)
        try:
            token = self._authenticated(method, handler_call_details.invocation_metadata or ())
            if self._tokens is None:
                caller = _EVERY_CALLER
            else:
                caller = Caller(ANONYMOUS, Role.VIEWER) if token is None else Caller(token.name, token.role)
            self._require_role(method, caller)
        except errors.RequestError as error:
            return self._refusing(method, caller, error)
        handler = await continuation(handler_call_details)
        if handler is None:
            return self._refusing(method, caller, None)
        return self._admitting(handler, method, caller, token)

    def _authenticated(self, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> Token | None:
        """Returns the token; None where none is needed. Raises NotAuthenticatedError."""
        if self._tokens is None:
            return None
        try:
            return self._tokens.value.find(_bearer(metadata), now_utc())
        except errors.NotAuthenticatedError:
            if method in OPEN:
                return None
            raise

    def _is_valid(self, token: Token | None) -> bool:
        """Whether a token that was presented earlier still holds: in a stream it may have been revoked since."""
        if token is None or self._tokens is None:
            return True
        expired = token.expires is not None and token.expires <= now_utc()
        return not expired and token in self._tokens.value.entries

    def _require_role(self, method: str, caller: Caller) -> None:
        needed = ROLES.get(method, Role.ADMIN)
        if method not in OPEN and caller.role < needed:
            name = method.rpartition("/")[2]
            raise errors.NotPermittedError(
                f"{name} needs the role {needed.name.lower()}; the token {caller.name} is {caller.role.name.lower()}"
            )

    # -- handlers ----------------------------------------------------------------------------------------------------

    def _refusing(self, method: str, caller: Caller, error: errors.RequestError | None) -> Any:
        """Returns a handler that ends the call with the error, or as gRPC does for an unknown method."""

        async def refuse(_requests: object, context: Context) -> None:
            known = _with_address(caller, context)
            usage = self._limits.usage(_key(known, admitted=caller.name != UNKNOWN))
            await self._wait_if_many(usage)
            self._limits.mistake(usage)
            code = "UNIMPLEMENTED" if error is None else code_pb2.Code.Name(status_of(error).code)
            self._count(caller.name, code)
            self._report(method, known, code, "Method not found!" if error is None else str(error))
            if error is None:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
            elif isinstance(error, errors.NotPermittedError):
                self.on_denied(method.rpartition("/")[2], known, error)
            await abort(context, error)

        return grpc.stream_unary_rpc_method_handler(refuse)

    def _admitting(self, handler: Any, method: str, caller: Caller, token: Token | None) -> Any:
        """Returns the handler inside the limits of its caller; a stream ends when its token does."""
        streams = handler.request_streaming or handler.response_streaming

        async def respond(request: Any, context: Context) -> Any:
            async with self._admitted(method, caller, context, stream=streams):
                behavior = handler.stream_unary if handler.request_streaming else handler.unary_unary
                return await behavior(request, context)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            async with self._admitted(method, caller, context, stream=streams):
                behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream
                async for response in behavior(request, context):
                    if not self._is_valid(token):
                        await abort(context, errors.NotAuthenticatedError("the token has expired or been revoked"))
                    yield response

        make = {
            (False, False): (grpc.unary_unary_rpc_method_handler, respond),
            (False, True): (grpc.unary_stream_rpc_method_handler, stream),
            (True, False): (grpc.stream_unary_rpc_method_handler, respond),
            (True, True): (grpc.stream_stream_rpc_method_handler, stream),
        }
        wrap, behavior = make[handler.request_streaming, handler.response_streaming]
        return wrap(behavior, handler.request_deserializer, handler.response_serializer)

    @asynccontextmanager
    async def _admitted(self, method: str, caller: Caller, context: Context, *, stream: bool) -> AsyncIterator[None]:
        """Counts the call against the limits of its caller while the block runs. Aborts it if one is reached."""
        known = _with_address(caller, context)
        usage = self._limits.usage(_key(known, admitted=True))
        if method not in URGENT:
            await self._wait_if_many(usage)
        code = "OK"
        if refused := self._limits.refusal(usage, stream=stream) if method not in URGENT else "":
            self._limits.mistake(usage)
            self._count(caller.name, "RESOURCE_EXHAUSTED")
            self._report(method, known, "RESOURCE_EXHAUSTED", refused)
            await abort(context, errors.TooManyCallsError(refused))
        usage.streams += stream
        usage.in_flight += not stream
        _CALLER.set(known)
        try:
            yield
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except BaseException:
            code = _code_of(context)
            raise
        finally:
            usage.streams -= stream
            usage.in_flight -= not stream
            if code in _MISTAKES:
                self._limits.mistake(usage)
            self._count(caller.name, code)

    # -- bookkeeping -------------------------------------------------------------------------------------------------

    async def _wait_if_many(self, usage: Usage) -> None:
        """Has a caller with too many mistakes wait, which costs nothing here."""
        if self._limits.must_wait(usage) and self._late < LATE_MAX:
            self._late += 1
            try:
                await anyio.sleep(LATE_S)
            finally:
                self._late -= 1

    def _count(self, name: str, code: str) -> None:
        if name not in self._names:
            if len(self._names) >= NAMES_MAX:
                name = OTHER
            self._names.add(name)
        self._metrics.server_calls_total.labels(name, code).inc()

    def _report(self, method: str, caller: Caller, code: str, reason: str) -> None:
        """Logs a refused call, at most one in a while: floods must not fill the log."""
        now_s = time.monotonic()
        if now_s - self._log_at_s < LOG_S:
            self._not_logged += 1
            return
        self._log.warning(
            "call_refused", method=method[:TEXT_MAX], caller=str(caller), peer=caller.peer, code=code, reason=reason,
            more=self._not_logged,
        )  # fmt: skip
        self._log_at_s, self._not_logged = now_s, 0


def _bearer(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    """Returns the token of a call. Raises NotAuthenticatedError."""
    values = [value for key, value in metadata if key == "authorization"]
    if len(values) != 1 or not isinstance(values[0], str) or not values[0][:7].lower() == "bearer ":
        raise errors.NotAuthenticatedError("a token is required, as the metadata `authorization: Bearer <token>`")
    return values[0][7:].strip()


def _with_address(caller: Caller, context: Context) -> Caller:
    """Returns the caller with its address and, with mutual TLS, the common name of its certificate."""
    names = context.auth_context().get("x509_common_name", ()) if caller.name != UNKNOWN else ()
    certificate = b", ".join(names).decode("utf-8", "replace")[:64]
    return replace(caller, peer=unquote(context.peer() or "").partition(":")[2], certificate=certificate)


def _key(caller: Caller, *, admitted: bool) -> str:
    """Returns what the limits of a caller are kept under."""
    if caller.name not in {ANONYMOUS, UNKNOWN}:
        return f"token {caller.name}"
    return caller.peer if admitted else f"host {caller.peer.rpartition(':')[0]}"


def _code_of(context: Context) -> str:
    """Returns the status that a call has been ended with; UNKNOWN after an error that has set none."""
    code: Any = context.code()  # a number, or a StatusCode as the types say
    return _CODES.get(code.value[0] if isinstance(code, grpc.StatusCode) else code, "UNKNOWN")
