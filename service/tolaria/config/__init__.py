"""The settings, their sources and their rendering."""

from tolaria.config.durability import (
    CheckpointSettings,
    EmergencySettings,
    ProfilerSettings,
    RollbackSettings,
    StateSettings,
)
from tolaria.config.fields import Address
from tolaria.config.render import as_toml
from tolaria.config.settings import (
    ControlSettings,
    FastPathSettings,
    GradientsSettings,
    KasminaSettings,
    LeylineSettings,
    LoggingSettings,
    MetricsSettings,
    OptimizerSettings,
    PeerSettings,
    SeedsSettings,
    ServerSettings,
    ServiceSettings,
    Settings,
    TamiyoSettings,
    TrainingSettings,
)
from tolaria.config.sources import child_environment, load_settings, quieten_grpc

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
    "StateSettings",
    "TamiyoSettings",
    "TrainingSettings",
    "as_toml",
    "child_environment",
    "load_settings",
    "quieten_grpc",
]
