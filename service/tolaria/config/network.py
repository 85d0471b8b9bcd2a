"""Settings of the process, its servers, its peers and the authentication of commands."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from tolaria.config.fields import (
    LIVE,
    ListenAddress,
    Milliseconds,
    PathText,
    Seconds,
    SecondsOrZero,
    Secret,
    Section,
    Target,
    suggestion,
)


class ServiceSettings(Section):
    """The service process."""

    drain_timeout_s: Seconds = 10.0
    """Time after SIGTERM to finish the step and the calls in flight. 10: Docker sends SIGKILL after 10 s."""

    exit_when_done: bool = False
    """Exit when the run finishes (code 0) or fails (code 1). Off: the final metrics stay readable.

    A run that is paused or halted is not done: the process stays up and keeps its state, until an operator resumes
    or stops the run.
    """

    exit_code_drained: Annotated[int, LIVE] = Field(default=0, ge=0, le=255)
    """Exit code when a signal ends the process, but not the run. 0: nothing has failed.

    A supervisor that takes 0 for the end of the run, as a Kubernetes Job does, needs another one, such as 143.
    """

    core_files: bool = False
    """Let the system write core files of the service and its child processes. Off: they would contain secrets."""


class ServerSettings(Section):
    """The admin gRPC server."""

    listen: ListenAddress = "127.0.0.1:50051"
    """Address of the admin RPCs. Loopback: clients can stop a run, so other addresses are an explicit choice."""

    status_interval_ms: Milliseconds = 250.0
    """Interval of WatchStatus between changes. 250: looks smooth, and takes far less than 1 % of a core."""

    request_memory: int = Field(default=4096, ge=16, le=1_000_000)
    """Number of request_ids remembered; a repeated request gets the first response. 4096: days of operation."""

    tls_cert: PathText = ""
    """File with the certificate chain of the server, in PEM. Empty: no TLS, as on loopback. Replaced files are read
    again without a restart."""

    tls_key: PathText = ""
    """File with the private key of tls_cert, in PEM, without a password. Empty: no TLS."""

    tls_client_ca: PathText = ""
    """File with the CAs that clients' certificates must come from, in PEM (mutual TLS). Empty: clients need none."""

    tokens: PathText = ""
    """File with digests and roles of bearer tokens, as `tolaria token new` writes it. Empty: every caller is an admin,
    as on loopback. Read again when it changes."""

    insecure: bool = False
    """Listen on other addresses than loopback without TLS or without tokens. Off: who reaches the port could stop a
    run. On: a warning at every start."""

    calls_per_second: Annotated[float, LIVE] = Field(default=1000.0, ge=0, le=1e6, allow_inf_nan=False)
    """Calls of one caller per second, with bursts of twice as many; more are refused. 0: no limit. 1000: more than
    scripts make that poll, of which several are one caller without tokens, and about a third of a core."""

    bad_calls_per_second: Annotated[float, LIVE] = Field(default=5.0, ge=0, le=1e6, allow_inf_nan=False)
    """Calls of one caller per second that are its mistakes, such as a wrong token, and are answered at once, with
    bursts of four times as many; further ones are answered after a second. 0: no limit. 5: a person makes fewer."""

    calls_in_flight_max: Annotated[int, LIVE] = Field(default=32, ge=1, le=10_000)
    """Calls of one caller that are in flight at the same time, streams not counted. 32: a rollback takes seconds, and
    operators wait for one."""

    streams_max: Annotated[int, LIVE] = Field(default=16, ge=1, le=10_000)
    """Streams of one caller at the same time. 16: a few dashboards with one token."""

    request_kb_max: int = Field(default=64, ge=1, le=4096)
    """Largest request in KiB. 64: a reason has 1024 characters, and nothing else is long."""

    idle_s: Seconds = 300.0
    """Time without a call after which a connection is closed; clients connect again by themselves. 300: it is rarely
    noticed, and what has been forgotten does not add up."""


class MetricsSettings(Section):
    """The HTTP server of /metrics, /livez, /readyz and the status page."""

    listen: ListenAddress = "127.0.0.1:9464"
    """Address that Prometheus scrapes. 9464: the port of OpenTelemetry's Prometheus exporter."""

    web_config: PathText = ""
    """File with TLS and basic authentication, in the format of Prometheus's exporters (--web.config.file).
    Empty: neither. Read again when it, or a certificate that it names, changes."""

    connections_max: Annotated[int, LIVE] = Field(default=128, ge=1, le=10_000)
    """Connections at the same time; further ones are closed. 128: far more than there are scrapers."""

    viewers_max: int = Field(default=64, ge=0, le=10_000)
    """Viewers of the status page at the same time, at most half of connections_max; a further one is refused.
    0: there is no page. 64: each has a connection, and scrapers need some too."""


class LoggingSettings(Section):
    """Logs, on standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error"], LIVE] = "info"
    """Lowest level written. info: one line for each epoch and each decision."""

    format: Literal["auto", "json", "console"] = "auto"
    """auto: console on a terminal, JSON elsewhere, where log collectors parse it."""


class PeerSettings(Section):
    """A peer and the calls to it."""

    methods: ClassVar[tuple[str, ...]] = ()
    """Methods that may have an entry in timeouts_s; the calls of a rollback get their deadline from its budget."""

    target: Target = ""
    """host:port of the peer. Empty: Tolaria starts the reference peer, which needs no installation."""

    tls_ca: PathText = ""
    """File with the CAs of the peer's certificate, in PEM; the calls use TLS. Empty: no TLS, as on loopback."""

    tls_cert: PathText = ""
    """File with the certificate chain that Tolaria presents to the peer (mutual TLS). Empty: none."""

    tls_key: PathText = ""
    """File with the private key of tls_cert. Empty: none."""

    tls_name: str = Field(default="", max_length=253)
    """Name that the peer's certificate must have. Empty: the host of target."""

    timeout_s: Annotated[Seconds, LIVE] = 2.0
    """Deadline of a call, which also cancels it on the peer's side. 2.0: a later answer is stale."""

    timeouts_s: Annotated[dict[str, Seconds], LIVE] = Field(default_factory=dict)
    """Shorter deadlines by method, such as { EvaluateStep = 0.5 }. Empty: timeout_s applies to all methods."""

    retries: Annotated[int, LIVE] = Field(default=1, ge=0, le=10)
    """Retries of an idempotent call within its deadline while the peer is unavailable, after 20 ms, 40 ms and so on.
    1: a lost connection is back by then; the circuit breaker handles a peer that is down."""

    in_flight_max: int = Field(default=8, ge=1, le=10_000)
    """Maximum number of calls in flight. 8: usually there is one, and two in a rollback; more means a hanging peer."""

    waiting_max: int = Field(default=32, ge=0, le=10_000)
    """Maximum number of calls that wait for another to end; a further one is refused at once. 32: a burst passes."""

    drain_s: SecondsOrZero = 0.5
    """Time for calls in flight to end when the channel closes, before they are cancelled.
    0.5: a working peer answers in milliseconds, and service.drain_timeout_s covers more than this."""

    def timeout_of(self, method: str) -> float:
        """Returns the deadline of a method in seconds."""
        return self.timeouts_s.get(method, self.timeout_s)

    @field_validator("timeouts_s")
    @classmethod
    def _check_timeouts(cls, timeouts_s: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        longest_s = info.data.get("timeout_s")  # missing if it is invalid itself, which is reported separately
        for method, seconds in timeouts_s.items():
            if method not in cls.methods:
                hint = suggestion(method, cls.methods)
                raise ValueError(f"{method!r} is no method with a separate deadline; {hint}")
            # The run waits for a peer for timeout_s at most.
            if longest_s is not None and seconds > longest_s:
                raise ValueError(f"gives {method} {seconds} s, more than timeout_s ({longest_s}), the longest of all")
        return timeouts_s


class TamiyoSettings(PeerSettings):
    """Tamiyo, the controller."""

    methods: ClassVar[tuple[str, ...]] = ("EvaluateEpoch", "EvaluateStep")


class KasminaSettings(PeerSettings):
    """Kasmina, the executor."""

    methods: ClassVar[tuple[str, ...]] = ("ApplyCommand", "ExportSeedStates")


class LeylineSettings(Section):
    """Authentication of commands."""

    secret: Annotated[Secret, LIVE] = SecretStr("")
    """HMAC-SHA256 key that commands must be signed with. Empty: signatures are not required."""

    previous_secret: Annotated[Secret, LIVE] = SecretStr("")
    """Second accepted key, for key rotation without an outage. Empty: none."""

    freshness_s: Annotated[Seconds, LIVE] = 60.0
    """Maximum difference of a command's time from this clock, either way. 60: clocks may differ by seconds."""

    nonce_window_s: Seconds = 300.0
    """Time for which command_ids are remembered, at least twice freshness_s. 300: five times the default of that."""
