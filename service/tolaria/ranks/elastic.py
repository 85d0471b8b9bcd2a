"""`Ranks`: the ranks of a group on this machine, as torch's elastic agent starts and watches them.

Which machines there are has been decided before: the rendezvous is static, and its only service is the store.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch does not list it
from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from tolaria.config.ranks import NodePlace

_EXIT_BARRIER_S: Final = 5.0
_KILL_S: Final = 5
_STORE_S: Final = 60


class Ranks:
    """Runs a program in `processes` processes, with the environment of torchrun.

    A failure is not repaired: all ranks are killed, and what is started instead is decided elsewhere.

    Args:
        program: and its arguments.
        processes: ranks on this machine.
        place: which machine of the group this is.
        poll_s: how often the ranks are looked at.
    """

    def __init__(self, program: Sequence[str], processes: int, place: NodePlace, *, poll_s: float) -> None:
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
        spec = WorkerSpec(
            role="lane",
            local_world_size=processes,
            rdzv_handler=_DecidedRendezvous(place),
            entrypoint=program[0],
            args=tuple(program[1:]),
            max_restarts=0,
            monitor_interval=poll_s,
            master_addr=place.store_host,
            local_addr=place.store_host,
        )
        self._agent = _Agent(spec, _Unredirected(), exit_barrier_timeout=_EXIT_BARRIER_S)

    def run(self) -> Mapping[int, int]:
        """Runs until all ranks have ended or one has failed; returns the exit codes of failed ones by rank."""
        try:
            result = self._agent.run("lane")
        finally:
            for pid in self.pids():  # what the ranks have started goes with them
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        return {rank: failure.exitcode for rank, failure in result.failures.items()}

    @property
    def world(self) -> int:
        """Ranks on all machines; those on this one until they are started."""
        workers = self._agent.get_worker_group().workers
        return max([len(workers), *(worker.world_size for worker in workers)])

    def pids(self) -> list[int]:
        """Returns the process ids."""
        return [int(worker.id) for worker in self._agent.get_worker_group().workers if worker.id is not None]


class _DecidedRendezvous(StaticTCPRendezvous):
    """A rendezvous of machines that are known; unlike torch's dynamic one, without pickle.

    The store listens on one address only, on a socket that the service has opened if there are several machines.
    """

    def __init__(self, place: NodePlace) -> None:
        host, port, listener = place.store_host, place.store_port, place.store_listener
        if place.node == 0 and listener < 0:
            created = socket.create_server((host, 0))
            port, listener = created.getsockname()[1], created.detach()
        super().__init__(host, port, place.node, place.nodes, run_id="lane", timeout=_STORE_S)
        if place.node == 0:
            self._store = TCPStore(
                host, port, is_master=True, timeout=self.timeout, wait_for_workers=False, master_listen_fd=listener
            )
        else:
            self._store = TCPStore(host, port, is_master=False, timeout=self.timeout, wait_for_workers=False)


class _Agent(LocalElasticAgent):
    """Kills ranks instead of asking them to end: those that wait for a lost one could not answer."""

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started: dict[int, Any] = super()._start_workers(worker_group)
        if (context := self._pcontext) is not None:  # it has no setting for that
            close = context.close
            context.close = lambda *_args, **_options: close(signal.SIGKILL, _KILL_S)  # type: ignore[method-assign]
        return started

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = _KILL_S) -> None:
        del death_sig, timeout
        super()._shutdown(signal.SIGKILL, _KILL_S)


class _Unredirected(LogsSpecs):
    """Leaves the ranks their output, and makes no file."""

    @property
    def root_log_dir(self) -> str:
        return ""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        nowhere = dict.fromkeys(envs, "")
        return LogsDest(nowhere, nowhere, nowhere, nowhere, dict.fromkeys(envs, os.devnull))
