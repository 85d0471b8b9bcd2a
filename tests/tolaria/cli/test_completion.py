"""Completion as a shell asks for it: by bash itself, and by the protocol of the scripts for zsh and fish."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOLARIA = Path(sys.executable).with_name("tolaria")
IDS = ("000000000047-3c82e916", "000000000090-2a1c1f19")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a state directory."""
    folder = tmp_path_factory.mktemp("completion")
    for name in (*IDS, ".tmp-1"):
        (folder / "state" / "checkpoints" / name).mkdir(parents=True)
    (folder / "state" / "runs").mkdir()
    for number, name in enumerate(("aa11", "ab22")):
        path = folder / "state" / "runs" / f"{name}.json"
        path.touch()
        os.utime(path, (number, number))
    return folder


def environment(**more: str) -> dict[str, str]:
    """Returns an environment in which the program is found."""
    return {"PATH": f"{TOLARIA.parent}:/usr/bin:/bin", "HOME": "/nonexistent", **more}


def in_bash(folder: Path, *lines: str) -> list[list[str]]:
    """Returns what bash completes each line to, whose last word is being typed."""
    asks = []
    for line in lines:
        words = line.split(" ")
        asks.append(
            f"COMP_WORDS=({' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}; COMPREPLY=(); "
            '_tolaria_completion tolaria; echo "${COMPREPLY[*]}"'
        )
    script = "\n".join(['eval "$(tolaria --show-completion)"', "complete -p tolaria >&2", *asks])
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110,
        check=True,
    )
    assert "_tolaria_completion tolaria" in done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_bash_completes_commands_options_and_ids(folder: Path) -> None:
    """Ids of the default state directory, the newest first; what is being written is left out."""
    if shutil.which("bash") is None:
        pytest.skip("bash is missing: Debian's package bash has it")
    assert in_bash(
        folder,
        "tolaria rel",
        "tolaria rollback --chec",
        "tolaria rollback --checkpoint 0000000000",
        "tolaria export --checkpoint b",
        "tolaria runs show a",
        "tolaria runs compare aa11 n",
    ) == [["reload"], ["--checkpoint"], sorted(IDS, reverse=True), ["best"], ["ab22", "aa11"], ["newest"]]


@pytest.mark.parametrize(
    ("shell", "variables"),
    [
        ("zsh", {"_TYPER_COMPLETE_ARGS": "tolaria runs show a"}),
        ("fish", {"_TYPER_COMPLETE_ARGS": "tolaria runs show a", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)
def test_other_shells_get_the_same_ids(folder: Path, shell: str, variables: dict[str, str]) -> None:
    """By the protocol of their scripts."""
    done = subprocess.run(
        [TOLARIA], cwd=folder, env=environment(_TOLARIA_COMPLETE=f"complete_{shell}", **variables),
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert "ab22" in done.stdout
    assert "aa11" in done.stdout


def test_a_directory_that_is_named_is_used_and_mistakes_are_silent(folder: Path, tmp_path: Path) -> None:
    """Nothing is printed into the line that is being typed."""
    other = tmp_path / "other"
    (other / "checkpoints" / "0077").mkdir(parents=True)
    (folder / "tolaria.toml").write_text("[training]\nepocs = 3\n")
    try:
        named, wrong = in_bash(folder, f"tolaria export --state-dir {other} --checkpoint 0", "tolaria runs show a")
    finally:
        (folder / "tolaria.toml").unlink()
    assert (named, wrong) == (["0077"], [])
