"""Stands where `tolaria serve` would: `-m support.fake_serve MODE LIFELINE serve --while-stdin ...` acts it out.

It writes its arguments to the FIFO at LIFELINE and holds it open while it lives.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from leyline.v1.admin_service_pb2 import RunState
from support.fake_admin import FakeAdmin, fake_admin, grafting_run, serving, status_of


def main() -> None:
    """Fail to start, or serve."""
    mode, lifeline, *arguments = sys.argv[1:]
    life = Path(lifeline).open("w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    print(json.dumps({"pid": os.getpid(), "arguments": arguments}), file=life, flush=True)
    sys.stderr.write("not JSON\n" + json.dumps(["neither an object"]) + "\n")
    if mode == "bind-fails" or (mode == "port-taken" and "server.listen=127.0.0.1:0" not in arguments):
        sys.exit("tolaria: the admin server cannot listen on 127.0.0.1:50051: the address is in use")
    if mode == "bad-job":
        sys.stderr.write("tolaria: there is no job 'nope'\n")
        sys.exit(2)
    serve(mode)


def serve(mode: str) -> None:
    """Serve until told to stop, or die on the way."""
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
    """What `--while-stdin` asks for."""
    sys.stdin.read()
    over.set()


def admin_of(mode: str) -> FakeAdmin:
    """The run that the mode stands for."""
    if mode == "run-fails":
        failed = status_of(2, state=RunState.RUN_STATE_FAILED)
        failed.state_reason = "loss is NaN"
        sys.stderr.write("the last words\n")
        return fake_admin([status_of(1), failed])
    if mode in {"endless", "stubborn-endless"}:
        return fake_admin([status_of(1), status_of(2)])
    return fake_admin(grafting_run())


if __name__ == "__main__":
    main()
