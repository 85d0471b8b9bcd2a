"""Settings of what watches over a run: emergencies, the signal board. Must not know where values come from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from tolaria.config.parts import Seconds, Section


class EmergencySettings(Section):
    """When the service leaves things alone or stops by itself, and how it comes back."""

    sentinel: bool = True
    """Have a process of its own watch the heartbeats. On: a hung process cannot notice that it hangs."""

    heartbeat_timeout_s: Seconds = 30.0
    """Silence of event loop or lane that is an emergency. 30: no sound microbatch takes so long."""

    startup_allowance_s: Seconds = 60.0
    """Time after the start in which silence does not count. 60: first steps compile and warm caches."""

    grace_s: Seconds = 10.0
    """From the alarm to SIGTERM. 10: stacks are dumped, and a hiccup may still pass."""

    drain_s: Seconds = 15.0
    """From that SIGTERM to SIGKILL. 15: longer than service.drain_timeout_s, which a sound service needs at most."""

    broadcasts_per_minute: int = Field(default=60, ge=1, le=6000)
    """Emergencies told at once; more wait and are put together, none is dropped. 60: a person reads no more."""

    failed_epochs_max: int = Field(default=3, ge=1)
    """Failed epochs in a row that halt training. 3: two may be chance."""

    rollback: bool = True
    """Go back to the newest snapshot at the level CONSERVATIVE. On: what led there may be in the parameters already."""

    recovery_epochs: int = Field(default=3, ge=1)
    """Healthy epochs in a row that forgive a failed one. 3: as many as failures open a breaker."""


class StateSettings(Section):
    """What the service keeps on disk."""

    dir: str = Field(default="state", min_length=1, max_length=4096)
    """Folder, made where it is missing. Relative to where the service starts: a container's volume is mounted there."""

    resume: Literal["auto", "never"] = "auto"
    """auto: go on with the run that did not come to its end there, from its newest checkpoint. never: begin anew."""


class SignalsSettings(Section):
    """The signal board: emergencies and heartbeats in memory that peers on this machine share."""

    path: str = Field(default="", max_length=4096)
    """The board's file. Empty: /dev/shm/tolaria-<run id>. Peers in containers need a name that they know before."""

    def board(self, run_id: str) -> Path:
        """Where the board of a run is."""
        return Path(self.path) if self.path else Path("/dev/shm") / f"tolaria-{run_id}"  # noqa: S108 - mode 0600
