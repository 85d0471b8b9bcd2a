"""What machines say to each other, and how they know that they have the same job."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tolaria import __version__
from tolaria.errors import ChannelError
from tolaria.ranks import admission
from tolaria.ranks.admission import (
    Accepted,
    Alive,
    Joining,
    RanksEnded,
    Ready,
    Refused,
    RunOver,
    StartRanks,
    StopRanks,
    for_machine,
    for_service,
    job_digest,
    packed,
    torch_version,
    version_problem,
)

JOINING = Joining("id", "host-b", 2, __version__, torch_version())


@pytest.mark.parametrize(
    "message", [JOINING, Ready(), Alive(), RanksEnded(3, -9, ("last", "words")), RanksEnded(1, 0, ())]
)
def test_messages_to_the_service_arrive(message: admission.ToService) -> None:
    """As they were."""
    assert for_service(packed(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Accepted("job", "ab", 20.0), Refused("full", "no place"), StartRanks(1, 2, 3, "10.0.0.1", 4000),
        StopRanks("why"), Alive(), RunOver(failed=True, detail="why"),
    ],
)  # fmt: skip
def test_messages_to_a_machine_arrive(message: admission.ToMachine) -> None:
    """As they were."""
    assert for_machine(packed(message)) == message


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "start"}, {"kind": None}, {"processes": 0}, {"processes": "2"}, {"processes": 257}, {"host": 7},
        {"host": "x" * 256}, {"identity": None}, {"torch": ["2"]},
    ],
)  # fmt: skip
def test_other_values_are_no_message(change: dict[str, object]) -> None:
    """Of another type or beyond a bound; the error names the field."""
    content = json.dumps(json.loads(packed(JOINING)) | change).encode()
    with pytest.raises(ChannelError, match="not a message: .*" + ("" if "kind" in change else next(iter(change)))):
        for_service(content)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 5000, packed(Ready())[:-1]])
def test_garbage_is_no_message(content: bytes) -> None:
    """In either direction."""
    for read in (for_service, for_machine):
        with pytest.raises(ChannelError, match="not a message"):
            read(content)


def test_the_longest_message_fits_a_frame() -> None:
    """Whatever characters the last lines of standard error consist of."""
    line = "\x01" * admission.LINE_CHARACTERS_MAX
    assert len(packed(RanksEnded(1, 1, (line,) * admission.LINES_MAX))) < 2**16 - 32


def test_versions_have_to_be_the_same() -> None:
    """Of Tolaria, and of torch apart from its build."""
    assert torch.__version__.partition("+")[0] == torch_version()
    assert not version_problem(JOINING)
    other = Joining("id", "host-b", 2, "0.0.9", torch_version())
    assert version_problem(other) == f"it has Tolaria 0.0.9, the service {__version__}"
    assert "it has torch not at all" in version_problem(Joining("id", "host-b", 2, __version__, ""))


def test_a_job_is_known_by_its_file(tmp_path: Path) -> None:
    """Also in a package, without importing anything; other content is another job."""
    code = "raise SystemExit('imported')"
    package = tmp_path / "parts"
    package.mkdir()
    (package / "__init__.py").write_text(code)
    (package / "job.py").write_text(code)
    (tmp_path / "job.py").write_text(code)
    folders = [str(tmp_path)]
    assert job_digest("job:Job", folders) == job_digest("parts.job:Job", folders) != ""
    (package / "job.py").write_text(code + "  # changed")
    assert job_digest("job:Job", folders) != job_digest("parts.job:Job", folders)
    assert "parts" not in sys.modules


@pytest.mark.parametrize("job", ["nothing:Job", "job.part:Job", "folder.part:Job", "unregistered", ":Job", "..:Job"])
def test_a_job_without_a_file_has_no_digest(job: str, tmp_path: Path) -> None:
    """Neither has a module that is missing, nor a part of something that is no package."""
    (tmp_path / "job.py").write_text("")
    assert not job_digest(job, [str(tmp_path)])


def test_the_registered_job_has_a_file() -> None:
    """By its entry point; it is looked for where ranks look for modules."""
    assert job_digest("digits") == job_digest("tolaria.jobs.digits:digits") != ""
