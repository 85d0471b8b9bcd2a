"""The threads that write for `tolaria lane join`."""

from __future__ import annotations

import os

from tolaria.ranks.output import OutputThread


def test_a_reader_who_stops_does_not_stop_the_writer() -> None:
    """Far more than a pipe holds is taken at once; what does not fit in memory is dropped, and its length is shown."""
    source, sink = os.pipe()
    with OutputThread(sink) as output:
        output.line("first")
        assert os.read(source, 100) == b"first\n"
        for _ in range(400):
            output.write("x" * 10_000)  # 4 MB, which nothing reads
        found = bytearray()
        while b"were dropped" not in found:
            found += os.read(source, 1 << 16)
    assert 1_000_000 < found.count(b"x") < 4_000_000
    shown = int(found.partition(b"\n(")[2].split()[0])
    assert shown + found.count(b"x") == 4_000_000
    os.close(source)
    os.close(sink)


def test_the_end_waits_for_what_is_queued_unless_there_is_no_reader() -> None:
    """Then the process ends all the same."""
    source, sink = os.pipe()
    with OutputThread(sink) as output:
        output.line("the run has ended")
    assert os.read(source, 100) == b"the run has ended\n"
    os.close(source)
    with OutputThread(sink) as output:
        output.line("a broken pipe")
        output.line("and again")
    os.close(sink)
