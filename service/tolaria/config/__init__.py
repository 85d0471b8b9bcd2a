"""The settings, their sources and their rendering."""

from tolaria.config.durability import CheckpointSettings as CheckpointSettings
from tolaria.config.durability import EmergencySettings as EmergencySettings
from tolaria.config.durability import HealthSettings as HealthSettings
from tolaria.config.durability import ProfilerSettings as ProfilerSettings
from tolaria.config.durability import RollbackSettings as RollbackSettings
from tolaria.config.durability import StateSettings as StateSettings
from tolaria.config.fields import Address as Address
from tolaria.config.fields import as_toml as as_toml
from tolaria.config.network import KasminaSettings as KasminaSettings
from tolaria.config.network import LeylineSettings as LeylineSettings
from tolaria.config.network import LoggingSettings as LoggingSettings
from tolaria.config.network import PeerSettings as PeerSettings
from tolaria.config.network import ServiceSettings as ServiceSettings
from tolaria.config.network import TamiyoSettings as TamiyoSettings
from tolaria.config.settings import Settings as Settings
from tolaria.config.sources import child_environment as child_environment
from tolaria.config.sources import load_settings as load_settings
from tolaria.config.sources import quieten_grpc as quieten_grpc
from tolaria.config.systemd import NotifySocket as NotifySocket
from tolaria.config.training import ControlSettings as ControlSettings
from tolaria.config.training import FastPathSettings as FastPathSettings
from tolaria.config.training import GradientsSettings as GradientsSettings
from tolaria.config.training import LaneSettings as LaneSettings
from tolaria.config.training import OptimizerSettings as OptimizerSettings
from tolaria.config.training import SeedsSettings as SeedsSettings
from tolaria.config.training import TrainingSettings as TrainingSettings
