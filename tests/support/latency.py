"""Latencies of RPCs beside those of a bare server in another process, which show what the machine itself adds.

As a program it is that server: it answers every method with what it was sent, and ends with its standard input.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import grpc
import grpc.aio

INTERVAL_S = 0.01
QUANTILES = (0.5, 0.9, 0.99)
Call = Callable[[], Any]
"""Begins a call and returns its `grpc.Future`."""


class Latencies:
    """Seconds that calls of the service took, and of the bare server at the same moments.

    From the service's are subtracted those in which it had work and the machine gave it no processor: the waits of the
    two threads that waited longest, since one may wait for what another one holds.
    """

    def __init__(self, pid: int) -> None:
        self._threads = Path(f"/proc/{pid}/task")
        self._waits: list[tuple[float, dict[str, int]]] = []
        self._spans: list[tuple[float, float]] = []
        self.bare_s: list[float] = []

    @property
    def calls(self) -> int:
        """The number of calls of the service that have been answered."""
        return len(self._spans)

    @property
    def service_s(self) -> list[float]:
        """The service's own seconds, by call."""
        return [max(0.0, ended_s - began_s - self._withheld_s(began_s, ended_s)) for began_s, ended_s in self._spans]

    def add_service(self, began_s: float) -> None:
        """Adds a call of the service that ends now."""
        self._spans.append((began_s, time.monotonic()))

    def add_bare(self, began_s: float) -> None:
        """Adds a call of the bare server that ends now."""
        self.bare_s.append(time.monotonic() - began_s)

    def note_waits(self) -> None:
        """Reads how long each thread of the service has waited for a processor, in nanoseconds."""
        found = {}
        for thread in self._threads.iterdir():
            with suppress(OSError):  # the thread has ended
                found[thread.name] = int((thread / "schedstat").read_text().split()[1])
        self._waits.append((time.monotonic(), found))

    def _withheld_s(self, began_s: float, ended_s: float) -> float:
        before = max((noted for noted in self._waits if noted[0] <= began_s), key=itemgetter(0))[1]
        after = min((noted for noted in self._waits if noted[0] >= ended_s), key=itemgetter(0))[1]
        waits = sorted(after[thread] - before.get(thread, 0) for thread in after)
        return sum(waits[-2:]) / 1e9

    def table(self) -> str:
        """Returns the quantiles of both."""
        service_s, all_s = self.service_s, [ended_s - began_s for began_s, ended_s in self._spans]
        rows = (
            f"{quantile:.1%}: {quantile_of(service_s, quantile) * 1000:.1f} ms "
            f"({quantile_of(all_s, quantile) * 1000:.1f} with waits for a processor), "
            f"a bare server {quantile_of(self.bare_s, quantile) * 1000:.1f} ms"
            for quantile in (*QUANTILES, 1.0)
        )
        return f"{self.calls} calls; " + "; ".join(rows)

    def excess_s(self, quantile: float) -> float:
        """Returns by how much the service's latency exceeds the bare server's at a quantile."""
        return quantile_of(self.service_s, quantile) - quantile_of(self.bare_s, quantile)


def quantile_of(values: Sequence[float], quantile: float) -> float:
    """Returns the value at a quantile, the largest one for 1."""
    return sorted(values)[min(len(values) - 1, int(quantile * len(values)))]


@contextmanager
def sampled(pid: int, service: Call, bare: Call) -> Iterator[Latencies]:
    """Begins a call of each at regular times while the block runs, without waiting for the earlier ones.

    So a pause of some time delays every call that begins within it. At the end all calls must have been answered.
    """
    latencies, ended, calls = Latencies(pid), threading.Event(), []

    def begin(call: Call, add: Callable[[float], None]) -> None:
        began_s = time.monotonic()
        future = call()
        future.add_done_callback(lambda _: add(began_s))
        calls.append(future)

    def sample() -> None:
        while not ended.wait(INTERVAL_S):
            latencies.note_waits()
            begin(service, latencies.add_service)
            begin(bare, latencies.add_bare)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield latencies
    finally:
        ended.set()
        thread.join()
    for call in calls:
        call.result()  # raises what the call raised
    while latencies.calls + len(latencies.bare_s) < len(calls):
        time.sleep(0.001)  # until the last callback has run
    latencies.note_waits()


@contextmanager
def bare_server() -> Iterator[Call]:
    """Runs the bare server in another process; yields a function that begins a call."""
    child = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with grpc.insecure_channel(child.stdout.readline().strip()) as channel:
            method: Any = channel.unary_unary("/bare/Echo")
            method(b"", timeout=180)
            yield lambda: method.future(b"", timeout=180)
    finally:
        child.stdin.close()
        child.stdout.close()
        child.wait(30)


class Echo(grpc.GenericRpcHandler):
    """Answers every method with what it was sent."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def respond(request: bytes, _context: object) -> bytes:
            return request

        return grpc.unary_unary_rpc_method_handler(respond)


async def _serve() -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"127.0.0.1:{port}\n")
    sys.stdout.flush()
    await anyio.to_thread.run_sync(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    anyio.run(_serve)
