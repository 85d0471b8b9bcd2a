"""The one settings tree, where its values come from, and how they are shown. Knows nothing of what is configured."""

from tolaria.config.addresses import Address
from tolaria.config.durability import CheckpointSettings, ProfilerSettings, RollbackSettings
from tolaria.config.peers import KasminaSettings, PeerSettings, TamiyoSettings
from tolaria.config.safety import EmergencySettings, SignalsSettings, StateSettings
from tolaria.config.show import as_toml
from tolaria.config.sources import child_environment, load_settings, quieten_grpc
from tolaria.config.tree import (
    ControlSettings,
    FastPathSettings,
    GradientsSettings,
    LeylineSettings,
    LoggingSettings,
    MetricsSettings,
    OptimizerSettings,
    SeedsSettings,
    ServerSettings,
    ServiceSettings,
    Settings,
    TrainingSettings,
)

__all__ = [
    "Address",
    "CheckpointSettings",
    "ControlSettings",
    "EmergencySettings",
    "FastPathSettings",
    "GradientsSettings",
    "KasminaSettings",
    "LeylineSettings",
    "LoggingSettings",
    "MetricsSettings",
    "OptimizerSettings",
    "PeerSettings",
    "ProfilerSettings",
    "RollbackSettings",
    "SeedsSettings",
    "ServerSettings",
    "ServiceSettings",
    "Settings",
    "SignalsSettings",
    "StateSettings",
    "TamiyoSettings",
    "TrainingSettings",
    "as_toml",
    "child_environment",
    "load_settings",
    "quieten_grpc",
]
