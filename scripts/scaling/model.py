"""`Model`: what the measured costs and the assumptions say about a group of a given size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from scaling import formulas
from scaling.assumptions import SETTINGS, assumed
from scaling.costs import Costs
from scaling.simulation import Policy, Restart

PIECE_GB: Final = formulas.PIECE_BYTES / 1e9

_DIGEST_BYTES: Final = 32
_PROVEN_STEPS: Final = 3
"""Sound steps after which a snapshot may be restored (`run/restore_points.py`)."""


@dataclass(frozen=True, slots=True)
class Model:
    """A group of `ranks` ranks that works as the present implementation does. Times in seconds, sizes in GB."""

    costs: Costs
    ranks: int

    # -- a step ------------------------------------------------------------------------------------------------------

    @property
    def machines(self) -> int:
        """Machines that it takes."""
        return formulas.machines(self.ranks, assumed("devices"))

    @property
    def network_s(self) -> float:
        """Latency of a message between two ranks on different machines; 0 if there is one machine."""
        return assumed("network latency") if self.machines > 1 else 0.0

    def agreement_s(self) -> float:
        """Returns the time of the sum of a step's numbers in gloo's ring."""
        return formulas.ring_s(self.ranks, **self._latencies())

    def tree_s(self) -> float:
        """Returns the time of the same sum in a tree."""
        return formulas.tree_s(self.ranks, **self._latencies())

    def gradients_gloo_s(self, size_gb: float) -> float:
        """Returns the time in which the ranks sum that much of gradients over gloo."""
        content_gb_s = PIECE_GB / (self.costs.all_reduce_piece_s - self.costs.all_reduce_2_s)
        content_s = formulas.ring_transfer_s(self.ranks, size_gb, content_gb_s)
        return formulas.pieces(size_gb) * self.agreement_s() + content_s

    def gradients_nccl_s(self, size_gb: float) -> float:
        """Returns the time in which they sum it over NCCL."""
        return formulas.nccl_s(self.ranks, size_gb, assumed("NCCL bandwidth"), assumed("network latency"))

    # -- states ------------------------------------------------------------------------------------------------------

    def snapshot_s(self, size_gb: float) -> float:
        """Returns the stall of a snapshot: the leader copies and hashes the state, all others wait."""
        return size_gb / self.costs.copy_gb_s + size_gb / self.costs.hash_gb_s

    def write_s(self, size_gb: float) -> float:
        """Returns the time until a checkpoint is durable: the leader writes the state to one drive."""
        return size_gb / assumed("NVMe write")

    @property
    def broadcast_gb_s(self) -> float:
        """What one rank sends to another over gloo in a second: here, or the network between machines."""
        return min(PIECE_GB / self.costs.broadcast_piece_s, assumed("network bandwidth"))

    def broadcast_s(self, size_gb: float, messages: float) -> float:
        """Returns the time in which every rank gets that much from the leader over gloo, in `messages` messages."""
        hop_s = self.costs.hop_s + self.network_s
        return formulas.broadcast_s(self.ranks, size_gb, self.broadcast_gb_s, messages=messages, hop_s=hop_s)

    # -- a restart ---------------------------------------------------------------------------------------------------

    def store_s(self) -> float:
        """Returns the time in which the one store serves the addresses of all ranks to all ranks."""
        return formulas.store_gets(self.ranks) * self.costs.store_get_s + (
            formulas.store_gb(self.ranks) / assumed("network bandwidth")
        )

    def answers_s(self) -> float:
        """Returns the time of `Group.ask`: two sums, in whose second each rank has a row for its text."""
        row_gb = self.ranks * _DIGEST_BYTES / 1e9
        gb_s = PIECE_GB / self.costs.all_reduce_piece_s
        return 2 * self.agreement_s() + formulas.ring_transfer_s(self.ranks, row_gb, gb_s)

    def restore_s(self) -> float:
        """Returns the time in which all ranks have the leader's state, and it is proved.

        The leader restores, and copies the state to send it; then the others restore at the same time. A restore copies
        once and hashes twice, and at the end every rank hashes its state once more.
        """
        size_gb, messages = assumed("state"), max(assumed("tensors"), formulas.pieces(assumed("state")))
        return self.proof_s() + self.broadcast_s(size_gb, messages) + 2 * self.answers_s()

    def proof_s(self) -> float:
        """Returns the time of copies and digests in that, which does not depend on the number of ranks."""
        return assumed("state") * (3 / self.costs.copy_gb_s + 5 / self.costs.hash_gb_s)

    def start_s(self) -> float:
        """Returns the time from the death of a rank to the next step, of a tiny state and 2 ranks."""
        costs = self.costs
        return costs.notice_s + costs.start_s + costs.ready_s + costs.first_step_s

    def restart_s(self, *, from_memory: bool) -> float:
        """Returns the time from the death of a rank to the next step."""
        read_s = 0.0 if from_memory else assumed("state") / assumed("NVMe read")
        return self.start_s() + self.store_s() + read_s + self.restore_s()

    # -- failures ----------------------------------------------------------------------------------------------------

    @property
    def mean_s(self) -> float:
        """Mean time between failures of the group."""
        return formulas.mtbf_s(self.ranks, assumed("device MTBF"))

    def blocking_checkpoints(self) -> Policy:
        """Returns the policy of checkpoints for which training waits until they are durable."""
        stall_s = self.snapshot_s(assumed("state")) + self.write_s(assumed("state"))
        interval_s = formulas.daly_s(stall_s, self.mean_s)
        return Policy(interval_s, stall_s, 0.0, self._restarts(from_memory=False))

    def checkpoints(self) -> Policy:
        """Returns the policy of checkpoints as they are written: training waits for a copy only."""
        stall_s = self.snapshot_s(assumed("state"))
        interval_s = formulas.daly_s(stall_s, self.mean_s)
        return Policy(interval_s, stall_s, self.write_s(assumed("state")), self._restarts(from_memory=False))

    def snapshots(self, interval_s: float | None = None) -> Policy:
        """Returns the policy of snapshots in memory, and checkpoints for when that is lost.

        Without an interval they are as frequent as `rollback.overhead_max` allows.
        """
        stall_s = self.snapshot_s(assumed("state"))
        return Policy(
            max(assumed("step"), stall_s / SETTINGS["rollback.overhead_max"]) if interval_s is None else interval_s,
            stall_s,
            _PROVEN_STEPS * assumed("step"),
            self._restarts(from_memory=True),
            fallback_s=assumed("checkpoint interval"),
            fallback_stall_s=stall_s,
        )

    def rare_snapshots(self) -> Policy:
        """Returns the policy of snapshots at Daly's interval, by `rollback.every_steps`."""
        return self.snapshots(formulas.daly_s(self.snapshot_s(assumed("state")), self.mean_s))

    def _restarts(self, *, from_memory: bool) -> tuple[Restart, ...]:
        """Returns the kinds of failures: a rank ends, a rank hangs, a machine is lost, the leader's is."""
        silent, machine, replaced_s = assumed("silent share"), assumed("machine share"), assumed("replacement")
        leads = machine / self.machines
        ends_s, reads_s = self.restart_s(from_memory=from_memory), self.restart_s(from_memory=False)
        return (
            Restart(1 - silent - machine, ends_s),
            Restart(silent, ends_s + SETTINGS["emergency.heartbeat_timeout_s"]),
            Restart(machine - leads, ends_s + replaced_s),
            Restart(leads, reads_s + replaced_s, leaves_state=not from_memory),
        )

    def _latencies(self) -> dict[str, float]:
        return {
            "call_s": self.costs.all_reduce_1_s,
            "hop_s": self.costs.hop_s,
            "network_s": self.network_s,
            "devices": assumed("devices"),
        }
