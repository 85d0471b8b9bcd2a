"""Every setting, once: its meaning, its unit in its name, and why its default is what it is.

Owns types, bounds and combinations. Must not know where values come from.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from tolaria.config.addresses import Address
from tolaria.config.durability import CheckpointSettings, ProfilerSettings, RollbackSettings
from tolaria.config.parts import ListenAddress, Milliseconds, Seconds, Section, Share
from tolaria.config.peers import KasminaSettings, TamiyoSettings
from tolaria.config.safety import EmergencySettings, SignalsSettings, StateSettings


def _secret(secret: SecretStr) -> SecretStr:
    text = secret.get_secret_value()
    if text and not text.strip("*"):
        raise ValueError("is nothing but asterisks, which stand for a secret elsewhere and are none")
    return secret


Secret = Annotated[SecretStr, AfterValidator(_secret)]


class ServiceSettings(Section):
    """The process itself."""

    drain_timeout_s: Seconds = 10.0
    """Longest that SIGTERM may take to finish step and calls in flight. 10: Docker's patience before SIGKILL."""

    exit_when_done: bool = False
    """End the process when the run has finished (exit 0) or failed (exit 1). Off: final metrics stay readable."""


class ServerSettings(Section):
    """The admin gRPC server."""

    listen: ListenAddress = "127.0.0.1:50051"
    """Where admin RPCs are served. Loopback: the port can stop a run, so opening it is a decision."""

    status_interval_ms: Milliseconds = 250.0
    """Pace of WatchStatus between changes. 250: smooth to the eye, far below 1 % of a core."""

    request_memory: int = Field(default=4096, ge=16, le=1_000_000)
    """How many request_ids are remembered, so that a repeat gets the first answer. 4096: days of operators."""


class MetricsSettings(Section):
    """The HTTP server for /metrics, /livez and /readyz."""

    listen: ListenAddress = "127.0.0.1:9464"
    """Where Prometheus scrapes. 9464 is the port that exporters of OpenTelemetry's kind use."""


class LoggingSettings(Section):
    """Logs go to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level written. info: one line an epoch and one for every decision."""

    format: Literal["auto", "json", "console"] = "auto"
    """auto is console on a terminal and JSON elsewhere: people and collectors both get what they read."""


class ControlSettings(Section):
    """The control loop at fences."""

    boundary_budget_ms: Milliseconds = 18.0
    """How long an epoch boundary may hold training up. 18: state 3.5, Tamiyo 12, command 1.5, guard 1."""

    tamiyo_budget_ms: Milliseconds = 12.0
    """Tamiyo's share of the boundary. A later answer is applied at a later fence."""

    max_staleness_steps: int = Field(default=1000, ge=0)
    """A late answer about a state older than this is dropped. 1000: a second of small steps, minutes of large ones."""

    step_interval: int = Field(default=0, ge=0)
    """Ask the controller every so many updates too, one question at a time, the newest state first. 0: epochs only."""

    max_void_steps: int = Field(default=8, ge=1)
    """Consecutive non-finite steps after which the run is held. 8: a bad shard passes, a diverged model does not."""


class TrainingSettings(Section):
    """What is trained, and how."""

    job: str = Field(default="digits", min_length=1)
    """A name registered under the entry points `tolaria.jobs`, or `package.module:factory`. digits is built in."""

    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Passed to the job's factory as they are; the job says which it knows."""

    experiment: str = "default"
    """Name that the controller sees; groups runs on its side."""

    epochs: int = Field(default=20, ge=1, le=10**9)
    """Passes over the data. 20: the built-in job is past 97 % by then."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seeds initialisation, shuffling and dropout. Fixed by default: a run that cannot be repeated cannot be mended."""

    deterministic: bool = False
    """Bit-equal repeats: deterministic kernels, boundaries that wait for Tamiyo up to its timeout. Off: slower."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")
    """auto takes the first accelerator there is, else the CPU."""

    accumulate: int = Field(default=1, ge=1, le=10**6)
    """Microbatches per optimizer update. 1: no accumulation."""

    clip_norm: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Greatest total gradient norm; larger gradients are scaled down to it. 0: off, as the job may clip itself."""

    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads of torch. 0: one fewer than there are cores, at least 1, so that RPCs have a core to answer on."""


class OptimizerSettings(Section):
    """The learning rate, and when the optimizer is rebuilt. Schedules count optimizer updates of the whole run."""

    policy: Literal["constant", "cosine", "step"] = "constant"
    """How the host's learning rate goes. constant: what the job's optimizer says holds, unless somebody wants more."""

    period_steps: int = Field(default=0, ge=0)
    """Period of the cosine, or updates between two cuts of step. 0, for a cosine: the rest of the run."""

    floor: Share = 0.0
    """Least factor that the policy reaches. 0: a cosine ends at rest."""

    decay: Annotated[float, Field(gt=0, le=1)] = 0.1
    """What a cut of the step policy leaves. 0.1: the customary tenth."""

    after_period: Literal["hold", "restart"] = "hold"
    """What a cosine does after its period. hold: a run that goes on longer does not jump."""

    warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up. 0: none, as small models need none."""

    warmup_floor: Share = 0.0
    """Factor at which the warm-up begins."""

    seed_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """A seed's learning rate as a share of the host's. 0.1: it joins a host that has learnt already."""

    seed_warmup_steps: int = Field(default=100, ge=0)
    """Warm-up of a seed from when it begins to train. 100: its moments settle before it moves much."""

    seed_warmup_floor: Share = 0.1
    """Factor at which a seed's warm-up begins. 0.1: it learns from the first step on."""

    lr_floor: Annotated[float, Field(ge=0, le=1)] = 1e-8
    """No adjustment brings a rate below it. 1e-8: less is no training."""

    lr_ceiling: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    """No adjustment brings a rate above it. 10: more is a slip of the keyboard."""

    rebuild_min_interval_steps: int = Field(default=10, ge=0)
    """Least updates between two rebuilds. 10: a controller gone wild cannot keep the lane busy with them."""


class FastPathSettings(Section):
    """Fast paths of PyTorch. auto is on where the device gains by it; what runs is shown by `tolaria status`."""

    fused: Literal["auto", "off"] = "auto"
    """Fused or foreach kernels of the optimizer. auto: a fused Adam takes 0.6 to 0.8 of the plain one's time."""

    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the model. auto is on with CUDA: a CPU's small models do not earn the minutes back."""

    amp: Literal["auto", "bfloat16", "float16", "off"] = "off"
    """Mixed precision. off: it changes what is learnt, so somebody has to want it. auto: the best that CUDA has."""

    tf32: Literal["auto", "off"] = "auto"
    """TF32 matrix products on CUDA. auto: on, unless the run is deterministic."""

    pin_memory: Literal["auto", "off"] = "auto"
    """Pinned memory and copies that do not block on CUDA. auto: on."""


class SeedsSettings(Section):
    """Networks grafted into the host."""

    isolation: bool = True
    """Keep seeds that are not blending from moving the host. On: a seed earns its influence."""

    cull_steps: int = Field(default=100, ge=1)
    """Updates over which a culled seed fades. 100: the host follows without a jump."""


class GradientsSettings(Section):
    """How gradients of several sources become one."""

    mode: Literal["seed", "microbatch", "sum"] = "seed"
    """PCGrad across sources, across microbatches, or a plain sum. seed: conflicts are between seeds and host."""

    attribution: Literal["off", "dataloader", "kasmina"] = "off"
    """Whether seeds share the host's row: by the batch's seed_ids, or by Kasmina's weights. off: each has its own."""

    layer_norms_top_k: int = Field(default=0, ge=0, le=1000)
    """Layers whose gradient norms are shown for each seed. 0: none, as each costs a series in Prometheus."""

    compact: bool = False
    """One seed_health event a seed and epoch in place of one for each threshold."""

    share_jump: Share = 0.3
    """Change of a seed's share of the gradient from one epoch to the next that is an event."""

    seed_conflict: Share = 0.5
    """Share of other sources that a seed conflicts with that is an event."""

    conflict: Annotated[float, Field(ge=0)] = 0.75
    """Rate of conflicts over all sources that is an event."""


class LeylineSettings(Section):
    """Trust in what comes over the contract."""

    secret: Secret = SecretStr("")
    """Key of the HMAC-SHA256 that commands must carry. Empty: signatures are not asked for."""

    previous_secret: Secret = SecretStr("")
    """A second key that is still accepted, so that keys can be changed without an outage."""

    freshness_s: Seconds = 60.0
    """Farthest that a command's time may lie behind this clock, or ahead of it. 60: clocks apart by seconds pass."""

    nonce_window_s: Seconds = 300.0
    """How long a command_id is remembered: twice the freshness or more, as it counts both ways. 300: five times it."""


class Settings(BaseSettings):
    """All of it. Environment names are TOLARIA_<SECTION>__<FIELD>."""

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
    optimizer: OptimizerSettings = OptimizerSettings()
    fastpaths: FastPathSettings = FastPathSettings()
    seeds: SeedsSettings = SeedsSettings()
    gradients: GradientsSettings = GradientsSettings()
    emergency: EmergencySettings = EmergencySettings()
    signals: SignalsSettings = SignalsSettings()
    state: StateSettings = StateSettings()
    rollback: RollbackSettings = RollbackSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    profiler: ProfilerSettings = ProfilerSettings()
    leyline: LeylineSettings = LeylineSettings()

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        problems = []
        if self.server.listen == self.metrics.listen and Address.parse(self.server.listen).port != 0:
            problems.append(f"server.listen and metrics.listen are both {self.server.listen}")
        if self.control.tamiyo_budget_ms > self.control.boundary_budget_ms:
            problems.append("control.tamiyo_budget_ms exceeds control.boundary_budget_ms, of which it is a share")
        if self.leyline.previous_secret.get_secret_value() and not self.leyline.secret.get_secret_value():
            problems.append("leyline.previous_secret is set but leyline.secret is not")
        if self.optimizer.policy == "step" and not self.optimizer.period_steps:
            problems.append("optimizer.policy is step, which needs optimizer.period_steps")
        if self.emergency.sentinel and self.emergency.drain_s <= self.service.drain_timeout_s:
            problems.append("emergency.drain_s must exceed service.drain_timeout_s, or a drain would be cut short")
        for name, peer in (("tamiyo", self.tamiyo), ("kasmina", self.kasmina)):
            if "drain_s" in peer.model_fields_set and peer.drain_s >= self.service.drain_timeout_s:
                problems.append(f"{name}.drain_s must be less than service.drain_timeout_s, of which it is a part")
        # Issued as far ahead of this clock as is allowed, a command is fresh for twice as long.
        if self.leyline.nonce_window_s < 2 * self.leyline.freshness_s:
            problems.append(
                "leyline.nonce_window_s is shorter than twice leyline.freshness_s, which counts both ways: "
                "replays would pass"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self
