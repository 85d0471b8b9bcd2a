"""All settings, by section: types, bounds, defaults and the combinations that are rejected.

The docstring of a setting gives its meaning, its unit and the reason for its default; `tolaria config show` prints it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from pydantic import PrivateAttr, model_validator
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
from tolaria.config.fields import Address
from tolaria.config.network import (
    KasminaSettings,
    LeylineSettings,
    LoggingSettings,
    MetricsSettings,
    ServerSettings,
    ServiceSettings,
    TamiyoSettings,
)
from tolaria.config.telemetry import TelemetrySettings
from tolaria.config.tracking import TrackingSettings
from tolaria.config.training import (
    ControlSettings,
    EarlyStoppingSettings,
    EmaSettings,
    FastPathSettings,
    GradientsSettings,
    LaneSettings,
    OptimizerSettings,
    SeedsSettings,
    TrainingSettings,
)


class Settings(BaseSettings):
    """All sections. Environment variables are named TOLARIA_<SECTION>__<FIELD>; only `load_settings` reads them."""

    model_config = SettingsConfigDict(
        env_prefix="TOLARIA_", env_nested_delimiter="__", extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    service: ServiceSettings = ServiceSettings()
    server: ServerSettings = ServerSettings()
    metrics: MetricsSettings = MetricsSettings()
    logging: LoggingSettings = LoggingSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    tracking: TrackingSettings = TrackingSettings()
    tamiyo: TamiyoSettings = TamiyoSettings()
    kasmina: KasminaSettings = KasminaSettings()
    control: ControlSettings = ControlSettings()
    training: TrainingSettings = TrainingSettings()
    lane: LaneSettings = LaneSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    early_stopping: EarlyStoppingSettings = EarlyStoppingSettings()
    ema: EmaSettings = EmaSettings()
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

    def _length_problems(self) -> list[str]:
        if self.training.evaluate_every_steps and not self.training.steps:
            return ["training.evaluate_every_steps needs training.steps, by which such a run is counted"]
        return []

    def _rank_problems(self) -> list[str]:
        lane, device = self.lane, self.training.device
        problems = [
            f"lane.{name} is {value}, which needs lane.mode = torchrun"
            for name, value, several in (
                ("processes", lane.processes, lane.processes > 1),
                ("nodes", lane.nodes, lane.nodes_max > 1),
            )
            if several and lane.mode != "torchrun"
        ]
        if lane.processes > 1 and lane.mode == "torchrun" and device.startswith("cuda:"):
            ranks = f"each of the {lane.processes} ranks of lane.processes"
            problems.append(f"training.device is {device}, but {ranks} needs another one")
        if lane.nodes_max > 1 and not lane.secret_file:
            problems.append(
                f"lane.nodes is {lane.nodes}, which needs lane.secret_file, so that only machines with the secret join"
            )
        if self.rollback.replicas and lane.nodes_max == 1:
            problems.append(
                f"rollback.replicas is {self.rollback.replicas}, which needs lane.mode = torchrun and lane.nodes with "
                "several machines: a replica in the memory of this machine would be lost with it"
            )
        if lane.parallel == "fsdp" and lane.mode != "torchrun":
            problems.append("lane.parallel is fsdp, which needs lane.mode = torchrun")
        if lane.parallel == "fsdp" and self.fastpaths.amp == "float16":
            problems.append(
                "fastpaths.amp is float16, whose loss scale lane.parallel = fsdp does not support: use bfloat16"
            )
        if self.training.init_from and lane.parallel == "fsdp":
            problems.append(
                "training.init_from cannot fill a model that lane.parallel = fsdp divides: load it in build_model"
            )
        return problems

    def _tls_problems(self) -> list[str]:
        problems = [
            f"{name}.tls_cert and {name}.tls_key must be set together"
            for name, section in (("server", self.server), ("tamiyo", self.tamiyo), ("kasmina", self.kasmina))
            if bool(section.tls_cert) != bool(section.tls_key)
        ]
        if self.server.tls_client_ca and not self.server.tls_cert:
            problems.append("server.tls_client_ca needs server.tls_cert and server.tls_key")
        for name, peer in (("tamiyo", self.tamiyo), ("kasmina", self.kasmina)):
            if (peer.tls_cert or peer.tls_name) and not peer.tls_ca:
                problems.append(f"{name}.tls_cert, tls_key and tls_name need {name}.tls_ca")
            if peer.tls_ca and not peer.target:
                problems.append(f"{name}.tls_ca needs {name}.target: the reference peer is called on loopback")
        return problems

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
        problems += self._length_problems() + self._rank_problems() + self._tls_problems()
        problems += self.early_stopping.problems()
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
