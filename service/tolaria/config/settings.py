"""All settings, by section: types, bounds, defaults and the combinations that are rejected.

The docstring of a setting gives its meaning, its unit and the reason for its default; `tolaria config show` prints it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, JsonValue, PrivateAttr, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from tolaria.config.durability import (
    CheckpointSettings,
    EmergencySettings,
    HealthSettings,
    ProfilerSettings,
    RollbackSettings,
    SignalsSettings,
    StateSettings,
)
from tolaria.config.fields import (
    Address,
    ListenAddress,
    Milliseconds,
    PositiveShare,
    Seconds,
    SecondsOrZero,
    Secret,
    Section,
    Share,
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

    exit_code_drained: int = Field(default=0, ge=0, le=255)
    """Exit code when a signal ends the process, but not the run. 0: nothing has failed.

    A supervisor that takes 0 for the end of the run, as a Kubernetes Job does, needs another one, such as 143.
    """


class ServerSettings(Section):
    """The admin gRPC server."""

    listen: ListenAddress = "127.0.0.1:50051"
    """Address of the admin RPCs. Loopback: clients can stop a run, so other addresses are an explicit choice."""

    status_interval_ms: Milliseconds = 250.0
    """Interval of WatchStatus between changes. 250: looks smooth, and takes far less than 1 % of a core."""

    request_memory: int = Field(default=4096, ge=16, le=1_000_000)
    """Number of request_ids remembered; a repeated request gets the first response. 4096: days of operation."""


class MetricsSettings(Section):
    """The HTTP server of /metrics, /livez and /readyz."""

    listen: ListenAddress = "127.0.0.1:9464"
    """Address that Prometheus scrapes. 9464: the port of OpenTelemetry's Prometheus exporter."""


class LoggingSettings(Section):
    """Logs, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level written. info: one line for each epoch and each decision."""

    format: Literal["auto", "json", "console"] = "auto"
    """auto: console on a terminal, JSON elsewhere, where log collectors parse it."""


class PeerSettings(Section):
    """A peer and the calls to it."""

    methods: ClassVar[tuple[str, ...]] = ()
    """Methods that may have an entry in timeouts_s; the calls of a rollback get their deadline from its budget."""

    target: Target = ""
    """host:port of the peer. Empty: Tolaria starts the reference peer, which needs no installation."""

    timeout_s: Seconds = 2.0
    """Deadline of a call, which also cancels it on the peer's side. 2.0: a later answer is stale."""

    timeouts_s: dict[str, Seconds] = Field(default_factory=dict)
    """Shorter deadlines by method, such as { EvaluateStep = 0.5 }. Empty: timeout_s applies to all methods."""

    retries: int = Field(default=1, ge=0, le=10)
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


class ControlSettings(Section):
    """The control loop at step and epoch boundaries."""

    boundary_budget_ms: Milliseconds = 18.0
    """Time that an epoch boundary may delay training. 18: state 3.5, Tamiyo 12, command 1.5, reserve 1."""

    tamiyo_budget_ms: Milliseconds = 12.0
    """Tamiyo's share of the boundary. 12: what the state and the command leave. A later answer is applied later."""

    hook_budget_ms: Milliseconds = 3.5
    """Time to build and send a request between epochs. 3.5: the same as the state's share of a boundary."""

    max_staleness_steps: int = Field(default=1000, ge=0)
    """Steps after which a late answer is dropped. 1000: a second of small steps, minutes of large ones."""

    step_interval: int = Field(default=0, ge=0)
    """Optimizer updates between requests to the controller, one at a time, newest state first. 0: at epochs only."""

    boundary_slack_ms: Milliseconds = 4.0
    """Delay of an epoch boundary beyond its budget that is no breach. 4: a busy machine wakes timers late."""

    lr_factor_min: PositiveShare = 0.01
    """Lowest learning rate that the controller may set, as a share of the schedule's. 0.01: training never stops."""

    lr_factor_max: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10.0
    """Highest learning rate that the controller may set, as a multiple of the schedule's. 10: more diverges."""


class TrainingSettings(Section):
    """The training job."""

    job: str = Field(default="digits", min_length=1)
    """Name of an entry point in `tolaria.jobs`, or `package.module:factory`. digits: built in, needs no download."""

    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Passed unchanged to the job's factory, which documents them."""

    experiment: str = "default"
    """Name that the controller sees and groups runs by."""

    epochs: int = Field(default=20, ge=1, le=10**9)
    """Passes over the data. 20: the built-in job exceeds 97 % accuracy by then."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Random seed of initialisation, shuffling and dropout. Fixed: a run that can be repeated can be debugged."""

    deterministic: bool = False
    """Bit-equal repeats: deterministic kernels, boundaries that wait for Tamiyo until its timeout. Off: slower."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")
    """auto: the first accelerator, or the CPU if there is none."""

    accumulate: int = Field(default=1, ge=1, le=10**6)
    """Microbatches per optimizer update. 1: no accumulation."""

    clip_norm: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Maximum total gradient norm; larger gradients are scaled down. 0: off, as the job may clip gradients itself."""

    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads of torch. 0: one fewer than the cores, at least 1, so that RPCs have a core."""


class OptimizerSettings(Section):
    """Learning rates and optimizer rebuilds. Schedules count optimizer updates of the whole run."""

    policy: Literal["constant", "cosine", "step"] = "constant"
    """Schedule of the host's learning rate. constant: the rate of the job's optimizer."""

    period_steps: int = Field(default=0, ge=0)
    """Period of cosine, or updates between two decays of step. 0, for cosine: the rest of the run."""

    floor: Share = 0.0
    """Lowest factor that the policy reaches. 0: cosine anneals to zero."""

    decay: PositiveShare = 0.1
    """Factor of each decay of step. 0.1: the usual value."""

    after_period: Literal["hold", "restart"] = "hold"
    """What cosine does after its period. hold: an extended run has no jump in its learning rate."""

    warmup_steps: int = Field(default=0, ge=0)
    """Updates of linear warm-up. 0: none, as small models need none."""

    warmup_floor: Share = 0.0
    """Factor at the start of the warm-up. 0: the usual value."""

    seed_factor: PositiveShare = 0.1
    """A seed's learning rate as a share of the host's. 0.1: the seed joins a host that is already trained."""

    seed_warmup_steps: int = Field(default=100, ge=0)
    """Updates of a seed's warm-up. 100: its optimizer moments settle before large updates."""

    seed_warmup_floor: Share = 0.1
    """Factor at the start of a seed's warm-up. 0.1: the seed learns from its first step."""

    lr_floor: Annotated[float, Field(ge=0, le=1)] = 1e-8
    """Lower bound of learning rates for adjustments. 1e-8: a lower rate has no effect."""

    lr_ceiling: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    """Upper bound of learning rates for adjustments. 10: a higher rate is a typing error."""

    rebuild_min_interval_steps: int = Field(default=10, ge=0)
    """Minimum updates between two rebuilds. 10: a faulty controller cannot keep the lane busy with rebuilds."""


class LaneSettings(Section):
    """The lane, which computes: in which process it runs, and how often it is started again."""

    mode: Literal["thread", "process", "torchrun"] = "process"
    """process: in a child process, so that what kills it does not end the service; on Linux. thread: for debugging.

    torchrun: in lane.processes child processes, the ranks of a group, which train one model on shares of each batch.
    """

    processes: int = Field(default=1, ge=1, le=256)
    """Ranks in mode torchrun, each with a device of its kind: the CPU, or one GPU each."""

    restarts_max: int = Field(default=10, ge=0, le=1000)
    """Times within lane.restarts_within_s that a lane which died is started again; then the run fails."""

    restarts_within_s: Seconds = 3600.0
    """Time over which deaths are counted. 3600: ten deaths in an hour are no accident."""

    restart_pause_s: Seconds = 0.1
    """Pause before a restart; it doubles with each further one of a lane that lives less than a minute."""

    restart_pause_max_s: Seconds = 60.0
    """Longest pause. 60: a full device or a missing mount may come back."""


class FastPathSettings(Section):
    """Fast paths of PyTorch. auto enables one where the device gains by it; `tolaria status` shows what is active."""

    fused: Literal["auto", "off"] = "auto"
    """Fused or foreach optimizer kernels. auto: a fused Adam takes 0.6 to 0.8 of the time of the plain one."""

    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the model. auto: on with CUDA; small models on a CPU do not recover the compile time."""

    amp: Literal["auto", "bfloat16", "float16", "off"] = "off"
    """Mixed precision; auto: the best that CUDA supports. off: it changes results, so it is an explicit choice."""

    tf32: Literal["auto", "off"] = "auto"
    """TF32 matrix products on CUDA. auto: on, unless the run is deterministic."""

    pin_memory: Literal["auto", "off"] = "auto"
    """Pinned memory and non-blocking copies on CUDA. auto: on."""


class SeedsSettings(Section):
    """Seeds, the networks grafted into the host."""

    enabled: bool = True
    """Graft seeds when the controller asks for it. Off: the model stays as the job builds it."""

    active_max: int = Field(default=4, ge=0, le=1000)
    """Seeds that grow at the same time; further ones are refused. 4: each costs a backward pass per step."""

    fossilized_max: int = Field(default=8, ge=0, le=1000)
    """Seeds that may become a permanent part of the model. 8: each makes every step slower."""

    isolation: bool = True
    """Keep gradients of seeds that are not blending from the host. On: a seed affects the host after it has trained."""

    cull_steps: int = Field(default=100, ge=1)
    """Updates over which a culled seed fades out. 100: the host adapts without a jump."""


class GradientsSettings(Section):
    """How gradients of several sources are merged."""

    mode: Literal["seed", "microbatch", "sum"] = "seed"
    """PCGrad across sources, across microbatches, or a plain sum. seed: conflicts arise between seeds and host."""

    attribution: Literal["off", "dataloader", "kasmina"] = "off"
    """Divide the host's gradient among seeds by the batch's seed_ids or Kasmina's weights. off: seeds have own rows."""

    layer_norms_top_k: int = Field(default=0, ge=0, le=1000)
    """Layers with the largest gradient norms exported per seed. 0: none, as each is a time series in Prometheus."""

    compact: bool = False
    """One seed_health event per seed and epoch instead of one per exceeded threshold. Off: thresholds are visible."""

    share_jump: Share = 0.3
    """Smallest reported change of a seed's gradient share between epochs. 0.3: more than shares usually vary."""

    seed_conflict: Share = 0.5
    """Share of the other sources in conflict with a seed from which it is reported. 0.5: it opposes most of them."""

    conflict: Annotated[float, Field(ge=0)] = 0.75
    """Smallest reported conflict rate over all sources. 0.75: the sources mostly oppose each other."""


class LeylineSettings(Section):
    """Authentication of commands."""

    secret: Secret = SecretStr("")
    """HMAC-SHA256 key that commands must be signed with. Empty: signatures are not required."""

    previous_secret: Secret = SecretStr("")
    """Second accepted key, for key rotation without an outage. Empty: none."""

    freshness_s: Seconds = 60.0
    """Maximum difference of a command's time from this clock, either way. 60: clocks may differ by seconds."""

    nonce_window_s: Seconds = 300.0
    """Time for which command_ids are remembered, at least twice freshness_s. 300: five times the default of that."""


class Settings(BaseSettings):
    """All sections. Environment variables are named TOLARIA_<SECTION>__<FIELD>; only `load_settings` reads them."""

    model_config = SettingsConfigDict(
        env_prefix="TOLARIA_", env_nested_delimiter="__", extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    service: ServiceSettings = ServiceSettings()
    server: ServerSettings = ServerSettings()
    metrics: MetricsSettings = MetricsSettings()
    logging: LoggingSettings = LoggingSettings()
    tamiyo: TamiyoSettings = TamiyoSettings()
    kasmina: KasminaSettings = KasminaSettings()
    control: ControlSettings = ControlSettings()
    training: TrainingSettings = TrainingSettings()
    lane: LaneSettings = LaneSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    fastpaths: FastPathSettings = FastPathSettings()
    seeds: SeedsSettings = SeedsSettings()
    gradients: GradientsSettings = GradientsSettings()
    health: HealthSettings = HealthSettings()
    emergency: EmergencySettings = EmergencySettings()
    signals: SignalsSettings = SignalsSettings()
    state: StateSettings = StateSettings()
    rollback: RollbackSettings = RollbackSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    profiler: ProfilerSettings = ProfilerSettings()
    leyline: LeylineSettings = LeylineSettings()

    _notices: tuple[str, ...] = PrivateAttr(default=())

    @property
    def notices(self) -> tuple[str, ...]:
        """Sentences for the operator about retired settings that a source sets."""
        return self._notices

    def take_notices(self, notices: Iterable[str]) -> None:
        """Sets the notices."""
        self._notices = tuple(notices)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the library gives the signature
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Returns the arguments as the only source of settings that are built directly."""
        return (init_settings,)

    def _rank_problems(self) -> list[str]:
        ranks, device = self.lane.processes, self.training.device
        if ranks > 1 and self.lane.mode != "torchrun":
            return [f"lane.processes is {ranks}, which needs lane.mode = torchrun"]
        if ranks > 1 and device.startswith("cuda:"):
            return [f"training.device is {device}, but each of the {ranks} ranks of lane.processes needs another one"]
        return []

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        problems = []
        if self.server.listen == self.metrics.listen and Address.parse(self.server.listen).port != 0:
            problems.append(f"server.listen and metrics.listen are both {self.server.listen}")
        if self.control.tamiyo_budget_ms > self.control.boundary_budget_ms:
            problems.append("control.tamiyo_budget_ms exceeds control.boundary_budget_ms, of which it is a share")
        if self.leyline.previous_secret.get_secret_value() and not self.leyline.secret.get_secret_value():
            problems.append("leyline.previous_secret is set but leyline.secret is not")
        if self.optimizer.policy == "step" and not self.optimizer.period_steps:
            problems.append("optimizer.policy is step, which needs optimizer.period_steps")
        problems += self._rank_problems()
        if self.emergency.sentinel and self.emergency.drain_s <= self.service.drain_timeout_s:
            problems.append("emergency.drain_s must exceed service.drain_timeout_s, or a drain would be cut short")
        for name, peer in (("tamiyo", self.tamiyo), ("kasmina", self.kasmina)):
            if "drain_s" in peer.model_fields_set and peer.drain_s >= self.service.drain_timeout_s:
                problems.append(f"{name}.drain_s must be less than service.drain_timeout_s, of which it is a part")
        # A command dated freshness_s ahead of this clock is fresh for twice that time.
        if self.leyline.nonce_window_s < 2 * self.leyline.freshness_s:
            problems.append(
                "leyline.nonce_window_s is shorter than twice leyline.freshness_s, which counts both ways: "
                "replays would pass"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self
