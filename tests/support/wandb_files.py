"""Reads the files of offline runs of Weights & Biases: records of its own protocol in the log format of LevelDB."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32_768
_FILE_HEADER = 7
_FULL, _FIRST, _LAST = 1, 2, 4


def _payloads(data: bytes) -> Iterator[bytes]:
    at, parts = _FILE_HEADER, b""
    while at + 7 <= len(data):
        if (left := _BLOCK - at % _BLOCK) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        chunk = data[at + 7 : at + 7 + length]
        at += 7 + length
        parts = chunk if kind in {_FULL, _FIRST} else parts + chunk
        if kind in {_FULL, _LAST}:
            yield parts


def offline_runs(directory: Path) -> dict[str, tuple[Any, list[dict[str, Any]]]]:
    """Returns the runs by id, oldest first, each with its last record of the run and its rows."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, tuple[Any, list[dict[str, Any]]]] = {}
    for path in sorted(directory.glob("wandb/offline-run-*/run-*.wandb"), key=lambda each: each.stat().st_mtime_ns):
        run, rows = None, []
        for payload in _payloads(path.read_bytes()):
            record = Record.FromString(payload)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run
            elif kind == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        if run is not None:
            found[run.run_id] = (run, rows)
    return found
