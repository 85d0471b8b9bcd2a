from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tolaria.errors import CredentialsError
from tolaria.security.watched import WatchedFiles


class Texts:
    """Reads a file whose content must not be empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failures = 0

    def read(self) -> tuple[str, Sequence[str]]:
        """Returns the content."""
        text = self.path.read_text() if self.path.exists() else ""
        if not text:
            raise CredentialsError("the setting", str(self.path), "empty")
        return text, [str(self.path)]

    def fail(self) -> None:
        """Counts."""
        self.failures += 1


def watched(path: Path) -> tuple[WatchedFiles[str], Texts]:
    """A file with the content `one`."""
    path.write_text("one")
    texts = Texts(path)
    return WatchedFiles("texts", texts.read, on_failure=texts.fail), texts


def replace(path: Path, text: str) -> None:
    """Replaces a file as editors and mounted secrets do."""
    new = path.with_name("new")
    new.write_text(text)
    new.replace(path)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """Replaced, or written in place with the same length; an unchanged one is not."""
    files, texts = watched(tmp_path / "f")
    assert not files.refresh()
    replace(texts.path, "two")
    assert files.refresh()
    assert files.value == "two"
    texts.path.write_text("six")
    os.utime(texts.path, ns=(1, 1))
    assert files.refresh()
    assert files.value == "six"


def test_a_link_that_is_moved_counts_as_a_change(tmp_path: Path) -> None:
    """Kubernetes replaces the link to the folder of a mounted secret."""
    for version in ("1", "2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "f").write_text(version)
    link = tmp_path / "data"
    link.symlink_to("1")
    texts = Texts(link / "f")
    files = WatchedFiles("texts", texts.read)
    link.unlink()
    link.symlink_to("2")
    assert files.refresh()
    assert files.value == "2"


def test_a_file_that_cannot_be_used_leaves_the_last_value(tmp_path: Path) -> None:
    """Logged and counted once; read again until it can be used, also if it comes back as it was."""
    files, texts = watched(tmp_path / "f")
    texts.path.rename(tmp_path / "aside")
    with capture_logs() as logs:
        assert [files.refresh() for _ in range(3)] == [False] * 3
    assert (files.value, texts.failures) == ("one", 1)
    assert [entry["event"] for entry in logs] == ["credentials_not_reloaded"]
    (tmp_path / "aside").rename(texts.path)
    assert files.refresh()
    assert not files.refresh()


def test_the_first_version_must_be_usable(tmp_path: Path) -> None:
    """A service does not start without it."""
    with pytest.raises(CredentialsError):
        WatchedFiles("texts", Texts(tmp_path / "f").read)
