"""The checks of buf, and proof that they bite. Must not know what any message means."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).parents[2] / "proto"
RELEASE = Path(__file__).parents[1] / "fixtures" / "last-release.binpb"
BUF = Path(sys.executable).parent / "buf"
CHECKS = (
    "lint",
    "format --diff --exit-code",
    "breaking --against leyline.binpb",
    f"breaking --against {RELEASE}",  # scripts/keep-release renews it
)

# what is done to the contract: file, the text before, the text after
BREAKAGES = {
    "renumbered field": ("state.proto", "uint64 global_step = 10;", "uint64 global_step = 15;"),
    "changed type": ("state.proto", "float training_loss = 11;", "double training_loss = 11;"),
    "renamed field": ("seeds.proto", "float risk_score = 8;", "float risk = 8;"),
    "removed field": ("emergency.proto", "bytes payload_checksum = 9;", ""),
    "renumbered enum value": ("enums.proto", "SEED_OP_CANCEL = 9;", "SEED_OP_CANCEL = 10;"),
    "freed reservation": ("state.proto", "reserved 100 to 199;", ""),
    "removed call": (
        "kasmina_service.proto",
        "rpc ExportSeedStates(ExportSeedStatesRequest) returns (ExportSeedStatesResponse);",
        "",
    ),
}


def buf(command: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run one check in a directory laid out like proto/."""
    return subprocess.run([BUF, *command.split()], cwd=directory, check=False, capture_output=True, text=True)


@pytest.fixture
def proto_copy(tmp_path: Path) -> Path:
    """A copy of proto/ to be spoilt."""
    return Path(shutil.copytree(PROTO, tmp_path / "proto"))


@pytest.mark.parametrize("check", CHECKS)
def test_contract_passes(check: str) -> None:
    """The protos are well formed, formatted, and compatible with the image that peers were built from."""
    done = buf(check, PROTO)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_incompatible_change_is_caught(breakage: str, proto_copy: Path) -> None:
    """A change that an existing peer would misread or miss fails the check, and the message names the file."""
    name, before, after = BREAKAGES[breakage]
    path = proto_copy / "leyline" / "v1" / name
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1

    path.write_text(text.replace(before, after), encoding="utf-8")
    for image in ("leyline.binpb", RELEASE):
        done = buf(f"breaking --against {image}", proto_copy)

        assert done.returncode == 100, done.stdout + done.stderr
        assert name in done.stdout


def test_addition_is_compatible(proto_copy: Path) -> None:
    """A new field under a new number is no breach: the contract can grow."""
    path = proto_copy / "leyline" / "v1" / "emergency.proto"
    text = path.read_text(encoding="utf-8")

    path.write_text(
        text.replace("  uint32 version = 1;", "  uint32 version = 1;\n  string extra = 10;"), encoding="utf-8"
    )

    assert "extra" in path.read_text(encoding="utf-8")
    assert buf("breaking --against leyline.binpb", proto_copy).returncode == 0
