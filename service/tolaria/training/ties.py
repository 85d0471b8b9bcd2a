"""What a run consists of on the event loop's side. Owns nothing: the parts do."""

from __future__ import annotations

from dataclasses import dataclass

from tolaria.peers.consultation import Consultations
from tolaria.training.boundary import Boundary
from tolaria.training.cadence import StepCadence
from tolaria.training.conduct import Conduct
from tolaria.training.enact import Enactor
from tolaria.training.feed import StatusFeed
from tolaria.training.guardian import Guardian
from tolaria.training.lane_link import LaneLink
from tolaria.training.profile_desk import ProfileDesk
from tolaria.training.record import Recorder
from tolaria.training.recovery.checkpoints import CheckpointDesk
from tolaria.training.recovery.retreats import Retreats
from tolaria.training.recovery.rollbacks import RollbackDesk


@dataclass(frozen=True, slots=True)
class RunTies:
    """The parts of one run.

    Args:
        link: to the lane, which has not been started.
        recorder: writes progress, metrics and events.
        conduct: holds the run and lets it go on.
        guardian: safeguards and emergencies.
        rollbacks: where the run goes back; served by somebody else.
        retreats: says when it has to by itself.
        checkpoints: of the run's state; served likewise.
        consultant: whom the peers' answers come from; served likewise.
        enactor: carries those out, and operators' changes of rates.
        boundary: puts the question at an epoch's end.
        cadence: puts it between epochs.
        profiles: where profiles are asked for.
        feed: told of every change.
    """

    link: LaneLink
    recorder: Recorder
    conduct: Conduct
    guardian: Guardian
    rollbacks: RollbackDesk
    retreats: Retreats
    checkpoints: CheckpointDesk
    consultant: Consultations
    enactor: Enactor
    boundary: Boundary
    cadence: StepCadence
    profiles: ProfileDesk
    feed: StatusFeed


@dataclass(frozen=True, slots=True)
class RunPlan:
    """How long the run goes on by itself, and whether its state outlives it.

    Args:
        epochs: to train.
        void_steps_max: consecutive steps without effect after which the run is held.
        keeps: whether checkpoints are made.
        insists: whether a run stands rather than go on without.
    """

    epochs: int
    void_steps_max: int
    keeps: bool
    insists: bool
