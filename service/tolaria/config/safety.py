"""Settings of what watches over a run: emergencies, the signal board. Must not know where values come from."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from tolaria.config.parts import Section


class EmergencySettings(Section):
    """When the service leaves things alone or stops by itself, and how it comes back."""

    broadcasts_per_minute: int = Field(default=60, ge=1, le=6000)
    """Emergencies told at once; more wait and are put together, none is dropped. 60: a person reads no more."""

    failed_epochs_max: int = Field(default=3, ge=1)
    """Failed epochs in a row that halt training. 3: two may be chance."""

    recovery_epochs: int = Field(default=3, ge=1)
    """Healthy epochs in a row that forgive a failed one. 3: as many as failures open a breaker."""


class SignalsSettings(Section):
    """The signal board: emergencies and heartbeats in memory that peers on this machine share."""

    path: str = Field(default="", max_length=4096)
    """The board's file. Empty: /dev/shm/tolaria-<run id>. Peers in containers need a name that they know before."""

    def board(self, run_id: str) -> Path:
        """Where the board of a run is."""
        return Path(self.path) if self.path else Path("/dev/shm") / f"tolaria-{run_id}"  # noqa: S108 - mode 0600
