"""docs/signals.md, from whose tables alone boards and pages are read here."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import pytest

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT, ROLLBACK_TIER_FULL
from tolaria.signals import layout
from tolaria.signals.lane_page import LanePage
from tolaria.signals.layout import Header, LanePhase, LaneWork, ParticipantRecord, RollbackRecord, RollbackState

PAGE = (Path(__file__).parents[3] / "docs" / "signals.md").read_text(encoding="utf-8")


def rows(name: str) -> list[list[str]]:
    """Returns the cells of a table."""
    table = PAGE.split(f"<!-- layout: {name} -->\n")[1].split("<!-- /layout -->")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def fields(name: str, content: bytes) -> dict[str, bytes]:
    """Returns the bytes of each field of a record, as its table says."""
    return {row[2]: content[int(row[0]) : int(row[0]) + int(row[1])] for row in rows(name)}


def number(content: bytes) -> int:
    """Returns an unsigned little-endian integer."""
    return int.from_bytes(content, "little")


def test_the_parts_of_the_board_are_where_the_page_says() -> None:
    """And fill it without gaps."""
    header, bell, blocks, rollback = [(int(row[0]), int(row[1])) for row in rows("board")]
    assert header == (0, layout.HEADER_SIZE)
    assert bell == (layout.BELL_AT, layout.LINE)
    assert blocks == (layout.BLOCKS_AT, len(layout.PARTICIPANTS) * layout.PARTICIPANT_SIZE)
    assert rollback == (layout.ROLLBACK_AT, layout.ROLLBACK_SIZE)
    assert rollback[0] + rollback[1] == layout.BOARD_SIZE
    assert f"A file of {layout.BOARD_SIZE} bytes" in PAGE
    assert rows("board")[2][2].endswith(": " + ", ".join(layout.PARTICIPANTS))


def test_a_header_is_read_by_the_table() -> None:
    """Each field has the value that was written, and the rest is zero."""
    board = layout.blank_board(Header("run-ä", bytes(range(16)), 123, 456))
    read = fields("header", board[: layout.HEADER_SIZE])
    assert read["magic"] == layout.MAGIC
    assert read["boot_id"] == bytes(range(16))
    assert read["run_id"][: number(read["run_id_size"])].decode() == "run-ä"
    assert [number(read[name]) for name in ("version", "participants", "size", "created_unix_ns", "created_ns")] == [
        *(layout.VERSION, len(layout.PARTICIPANTS), layout.BOARD_SIZE, 123, 456),
    ]
    assert number(read["crc"]) == crc32(board[:252])
    _the_rest_is_zero("header", board[: layout.HEADER_SIZE])


def test_a_participant_is_read_by_the_table() -> None:
    """All numbers are different, so that no two fields can be confused."""
    record = ParticipantRecord(EMERGENCY_LEVEL_HALT, "fire", 11, 12, 13, 14, 15, 16)
    payload = layout.encode_participant(3, 9, record)
    read = fields("participant", payload)
    names = ("generation", "signal_id", "raised_ns", "acknowledged_id", "acknowledged_ns", "cleared_ns", "index", "pid")
    assert [number(read[name]) for name in names] == [9, 11, 12, 13, 14, 15, 3, 16]
    assert number(read["level"]) == EMERGENCY_LEVEL_HALT
    assert read["reason"][: number(read["reason_size"])] == b"fire"
    assert len(read["reason"]) == layout.REASON_MAX
    assert number(read["crc"]) == crc32(payload[:252])
    _the_rest_is_zero("participant", payload)


def test_a_rollback_is_read_by_the_table() -> None:
    """The same, and the numbers of its states."""
    record = RollbackRecord(RollbackState.CONFIRM, "r1", 21, 22, ROLLBACK_TIER_FULL, 23, 24)
    payload = layout.encode_rollback(8, record)
    read = fields("rollback", payload)
    names = ("generation", "target_step", "deadline_ns", "changed_ns", "pid")
    assert [number(read[name]) for name in names] == [8, 21, 22, 23, 24]
    assert (number(read["state"]), number(read["tier"])) == (RollbackState.CONFIRM, ROLLBACK_TIER_FULL)
    assert read["rollback_id"][: number(read["rollback_id_size"])] == b"r1"
    assert number(read["crc"]) == crc32(payload[:124])
    (states,) = [row[3] for row in rows("rollback") if row[2] == "state"]
    assert states == ", ".join(f"{state.name.lower()} {state.value}" for state in RollbackState)
    _the_rest_is_zero("rollback", payload)


def test_the_words_of_a_block_are_where_the_page_says() -> None:
    """As the code stores them, and phases have the numbers that it gives them."""
    at = {row[2]: int(row[0]) for row in rows("block")}
    assert (at["heartbeat"], at["lane_heartbeat"], at["lane_work"]) == (
        *(layout.HEARTBEAT, layout.LANE_HEARTBEAT, layout.LANE_WORK),
    )
    assert at["sequence"] == 0
    phases = ", ".join(f"{phase.value} {phase.name.lower()}" for phase in LanePhase)
    assert f"Phases: {phases}." in PAGE
    assert LaneWork(2, 500).word == 500 << 8 | 2


WRITES: dict[str, Callable[[LanePage], object]] = {
    "beat": lambda page: page.beat_lane(),
    "work since": lambda page: page.show_lane_work(7),
    "rests": lambda page: page.show_rest(9),
    "granted": lambda page: page.grant(5),
    "forbidden": lambda page: page.forbid(5),
    "hold": lambda page: page.hold(3),
    "epoch place": lambda page: page.show_batch(2, 4),
    "alive": lambda page: page.beat_process(),
    "agent": lambda page: page.beat_agent(),
}


@pytest.mark.parametrize("names", WRITES)
def test_the_words_of_the_page_are_where_the_table_says(names: str) -> None:
    """Each call changes those words and no other."""
    page = LanePage.create()
    page.show_rest(0)
    WRITES[names](page)
    start = int(re.search(r"after a preamble of (\d+)\s+bytes", PAGE)[1])  # type: ignore[index]
    words = memoryview(page.segment.memory)[start:].cast("Q")
    assert [row[1] for row in rows("page") if words[int(row[0])]] == names.split()
    assert {name for group in WRITES for name in group.split()} == {row[1] for row in rows("page")}


def _the_rest_is_zero(name: str, content: bytes) -> None:
    left = bytearray(content)
    for row in rows(name):
        left[int(row[0]) : int(row[0]) + int(row[1])] = bytes(int(row[1]))
    assert not any(left)
