"""`Ranks`: the ranks of a group on this machine, as torch's elastic agent starts and watches them."""

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

_HOST: Final = "127.0.0.1"
_EXIT_BARRIER_S: Final = 5.0
_KILL_S: Final = 5
_STORE_S: Final = 60


class Ranks:
    """Runs a program in `processes` processes, with the environment of torchrun.

    A failure is not repaired: all ranks are killed, and what is started instead is decided elsewhere.
    """

    def __init__(self, program: Sequence[str], processes: int, *, poll_s: float) -> None:
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
        spec = WorkerSpec(
            role="lane",
            local_world_size=processes,
            rdzv_handler=_OneMachine(f"lane-{os.getpid()}"),
            entrypoint=program[0],
            args=tuple(program[1:]),
            max_restarts=0,
            monitor_interval=poll_s,
            master_addr=_HOST,
            local_addr=_HOST,
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

    def pids(self) -> list[int]:
        """Returns the process ids."""
        return [int(worker.id) for worker in self._agent.get_worker_group().workers if worker.id is not None]


class _OneMachine(StaticTCPRendezvous):
    """A rendezvous of one agent, whose store listens on loopback only; unlike torch's dynamic one, without pickle."""

    def __init__(self, run_id: str) -> None:
        listener = socket.create_server((_HOST, 0))
        port = listener.getsockname()[1]
        super().__init__(_HOST, port, rank=0, world_size=1, run_id=run_id, timeout=_STORE_S)
        self._store = TCPStore(_HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


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
