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
from tolaria.config.training import (
    ControlSettings,
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
        if self.training.init_from and self.lane.parallel == "fsdp":
            return ["training.init_from cannot fill a model that lane.parallel = fsdp divides: load it in build_model"]
        ranks, device = self.lane.processes, self.training.device
        if ranks > 1 and self.lane.mode != "torchrun":
            return [f"lane.processes is {ranks}, which needs lane.mode = torchrun"]
        if ranks > 1 and device.startswith("cuda:"):
            return [f"training.device is {device}, but each of the {ranks} ranks of lane.processes needs another one"]
        if self.lane.parallel == "fsdp" and self.lane.mode != "torchrun":
            return ["lane.parallel is fsdp, which needs lane.mode = torchrun"]
        if self.lane.parallel == "fsdp" and self.fastpaths.amp == "float16":
            return ["fastpaths.amp is float16, whose loss scale lane.parallel = fsdp does not support: use bfloat16"]
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
