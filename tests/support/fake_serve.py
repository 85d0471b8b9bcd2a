"""A fake of `tolaria serve`, run as `-m support.fake_serve MODE FIFO serve --while-stdin ...`.

It writes its arguments to the FIFO and keeps the FIFO open until it exits.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from leyline.v1.admin_service_pb2 import RunState
from support.fake_admin import FakeAdmin, fake_admin, run_with_a_seed, serving, status_of


def main() -> None:
    """Fails to start or serves, depending on the mode."""
    mode, fifo, *arguments = sys.argv[1:]
    held_open = Path(fifo).open("w", encoding="utf-8")  # noqa: SIM115 - until the process exits
    print(json.dumps({"pid": os.getpid(), "arguments": arguments}), file=held_open, flush=True)
    sys.stderr.write("not JSON\n" + json.dumps(["neither an object"]) + "\n")
    if mode == "bind-fails" or (mode == "port-taken" and "server.listen=127.0.0.1:0" not in arguments):
        sys.exit("tolaria: the admin server cannot listen on 127.0.0.1:50051: the address is in use")
    if mode == "bad-job" or (mode == "second-fails" and "seeds.enabled=false" in arguments):
        sys.stderr.write("tolaria: there is no job 'nope'\n")
        sys.exit(2)
    serve(mode)


def serve(mode: str) -> None:
    """Serves until SIGTERM or the end of standard input, or exits early."""
    over = threading.Event()
    signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "stubborn" else lambda *_: over.set())
    if mode != "stubborn":
        threading.Thread(target=end_with_stdin, args=(over,), daemon=True).start()
    if mode == "noisy":
        sys.stderr.write("x" * 1_000_000)
        sys.stderr.write("\n" + "".join(f"line {n}\n" for n in range(5000)))
    with serving(admin_of(mode)) as address:
        sys.stderr.write(json.dumps({"event": "serving", "grpc": address, "metrics": "127.0.0.1:9"}) + "\n")
        sys.stderr.flush()
        if mode == "dies":
            sys.stderr.write("out of luck\n")
            sys.stderr.flush()
            os._exit(7)
        over.wait()


def end_with_stdin(over: threading.Event) -> None:
    """Implements --while-stdin."""
    sys.stdin.read()
    over.set()


def admin_of(mode: str) -> FakeAdmin:
    """Returns an admin service with the run of this mode."""
    if mode == "run-fails":
        failed = status_of(2, state=RunState.RUN_STATE_FAILED)
        failed.state_reason = "loss is NaN"
        sys.stderr.write("the last words\n")
        return fake_admin([status_of(1), failed])
    if mode in {"endless", "stubborn-endless"}:
        return fake_admin([status_of(1), status_of(2)])
    return fake_admin(run_with_a_seed())


if __name__ == "__main__":
    main()
