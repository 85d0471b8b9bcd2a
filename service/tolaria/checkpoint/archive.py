"""The format of a backup: a directory or one tar file, laid out like a state directory, with a manifest.

The manifest holds the digest of every file and of itself. It is written last, and what has it gets its final name
only after everything has been read back, so that no half backup looks like a whole one.
"""

from __future__ import annotations

import fcntl
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias, get_args

import xxhash

from tolaria.errors import BackupDamagedError, StateRefusedError
from tolaria.filesystem import Filesystem, remove_quietly, write_durably
from tolaria.images import canonical_json

if TYPE_CHECKING:
    from typing import Self

BACKUP: Final = "backup.json"
FORMAT: Final = 1
PARTIAL: Final = ".partial"
"""Ending of the name of a backup that is being written, or was when its process was killed."""

Purpose: TypeAlias = Literal["backup", "upgrade", "downgrade"]
"""Those of an upgrade or a downgrade are without checkpoints, which it does not change."""

_PIECE_BYTES: Final = 2**20
_MANIFEST_BYTES_MAX: Final = 2**28


@dataclass(frozen=True, slots=True)
class BackupFile:
    """A file of a backup: its path in the state directory, its length, and the xxh3_128 hex digest of its content."""

    path: str
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class BackupManifest:
    """Describes a backup: the version that made it, the schema of the state, and what is in it.

    `checkpoints` are ids; `left_out` are those that the journal names and the backup does not have.
    """

    tolaria: str
    schema: int
    created_at_ns: int
    purpose: Purpose
    checkpoints: tuple[str, ...]
    left_out: tuple[str, ...]
    files: tuple[BackupFile, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.size_bytes for file in self.files)

    def to_bytes(self) -> bytes:
        """Returns canonical JSON that includes its own digest."""
        body = {"format": FORMAT, **asdict(self)}
        return canonical_json({**body, "manifest_digest": xxhash.xxh3_128_hexdigest(canonical_json(body))})

    @classmethod
    def from_bytes(cls, content: bytes) -> BackupManifest:
        """Parses what `to_bytes` returned.

        Raises:
            StateRefusedError: a newer Tolaria wrote it, in another format.
            ValueError: the content is not exactly what `to_bytes` returns.
        """
        try:
            document: dict[str, Any] = json.loads(content)
            found = document.pop("manifest_digest")
            if found != xxhash.xxh3_128_hexdigest(canonical_json(document)):
                raise ValueError("the manifest's digest does not match")
            if (form := document.pop("format")) != FORMAT:
                newer = f"the backup has format {form}, written by Tolaria {document.get('tolaria')}"
                raise StateRefusedError(f"{newer}; this version reads format {FORMAT}: restore it with that one")
            files = tuple(BackupFile(**file) for file in document.pop("files"))
            document["checkpoints"], document["left_out"] = tuple(document["checkpoints"]), tuple(document["left_out"])
            manifest = cls(files=files, **document)
        except (TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ValueError(f"a field of the manifest is missing or has the wrong form: {error}") from error
        names = [file.path for file in manifest.files]
        if manifest.purpose not in get_args(Purpose) or len(set(names)) != len(names):
            raise ValueError("the manifest contradicts itself")
        for name in names:
            path = PurePosixPath(name)
            if path.is_absolute() or not path.parts or ".." in path.parts or str(path) != name or name == BACKUP:
                raise ValueError(f"the manifest names a path outside of a state directory: {name!r}")
        return manifest


# -- writing ---------------------------------------------------------------------------------------------------------


class BackupWriter(Protocol):
    """Writes a backup under a temporary name. A context manager: what is unfinished at its end is removed."""

    @property
    def scratch(self) -> Path:
        """A name for a file that is needed while the backup is made, on the same disk."""

    def add(self, path: str, descriptor: int) -> BackupFile:
        """Copies an open file, from its beginning. Raises OSError."""

    def finish(self, manifest: BackupManifest) -> None:
        """Adds the manifest, reads everything back, and gives the backup its name. Durable on return.

        Raises:
            BackupDamagedError: what is read is not what was written.
            OSError: a write failed.
        """

    def __enter__(self) -> Self: ...

    def __exit__(self, *_error: object) -> None: ...


def open_writer(to: Path, files: Filesystem | None = None) -> BackupWriter:
    """Returns the writer of a new backup: of one tar file if the name ends in .tar, else of a directory.

    Raises:
        StateRefusedError: something is there already, or another process is writing it.
        OSError: nothing can be written there.
    """
    if to.suffix in {".gz", ".tgz", ".xz", ".zip", ".zst", ".bz2"}:
        raise StateRefusedError(f"--to: {to}: a backup is a directory, or one file whose name ends in .tar")
    if to.is_mount():
        raise StateRefusedError(f"--to: {to} is the root of a disk: give the name of a new directory in it")
    is_directory = to.is_dir() and not to.is_symlink()
    if to.is_symlink() or (to.exists() and (to.suffix == ".tar" or not is_directory or any(to.iterdir()))):
        raise StateRefusedError(f"--to: {to} exists: give the name of a new backup")
    if not to.absolute().parent.is_dir():
        raise StateRefusedError(f"--to: there is no directory {to.absolute().parent}")
    files = files or Filesystem()
    return TarWriter(to, files) if to.suffix == ".tar" else DirectoryWriter(to, files)


class DirectoryWriter:
    """Writes a backup that is a directory."""

    def __init__(self, to: Path, files: Filesystem) -> None:
        self._to, self._files = to.absolute(), files
        self._partial = self._to.with_name(self._to.name + PARTIAL)
        with suppress(FileExistsError):
            files.make_directory(self._partial)
        with ExitStack() as on_error:
            self._descriptor = os.open(self._partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            on_error.callback(os.close, self._descriptor)
            _lock(self._descriptor, self._partial)
            for entry in self._partial.iterdir():  # of a process that was killed
                files.remove_tree(entry) if entry.is_dir() else entry.unlink()
            on_error.pop_all()
        self._directories = [self._partial]
        self._done = False

    @property
    def scratch(self) -> Path:
        """See `BackupWriter`."""
        return self._partial / ".scratch"

    def add(self, path: str, descriptor: int) -> BackupFile:
        """See `BackupWriter`."""
        place = self._partial / path
        for parent in reversed([p for p in place.parents if p.is_relative_to(self._partial)]):
            if parent not in self._directories:
                self._files.make_directory(parent)
                self._directories.append(parent)
        hasher = xxhash.xxh3_128()
        size_bytes = write_durably(self._files, place, _hashed_pieces(descriptor, hasher))
        return BackupFile(path, size_bytes, hasher.hexdigest())

    def finish(self, manifest: BackupManifest) -> None:
        """See `BackupWriter`."""
        write_durably(self._files, self._partial / BACKUP, [memoryview(manifest.to_bytes())])
        for directory in reversed(self._directories):
            self._files.sync_directory(directory)
        with open_backup(self._partial) as backup:
            backup.verify()
        self._files.rename(self._partial, self._to)
        self._done = True
        self._files.sync_directory(self._to.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if not self._done:
            remove_quietly(self._files, self._partial)
        os.close(self._descriptor)


class TarWriter:
    """Writes a backup that is one tar file, whose last member is the manifest."""

    def __init__(self, to: Path, files: Filesystem) -> None:
        self._to, self._files = to.absolute(), files
        self._partial = self._to.with_name(self._to.name + PARTIAL)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with ExitStack() as on_error:
            self._file = os.fdopen(os.open(self._partial, flags, 0o600), "r+b")
            on_error.callback(self._file.close)
            _lock(self._file.fileno(), self._partial)
            self._file.truncate()
            on_error.pop_all()
        self._done = False
        self._tar = tarfile.open(fileobj=self._file, mode="w")  # noqa: SIM115 - closed by `finish`

    @property
    def scratch(self) -> Path:
        """See `BackupWriter`."""
        return self._partial.with_name(self._partial.name + ".scratch")

    def add(self, path: str, descriptor: int) -> BackupFile:
        """See `BackupWriter`."""
        size_bytes, hasher = os.fstat(descriptor).st_size, xxhash.xxh3_128()
        source = _Pieces(_hashed_pieces(descriptor, hasher))
        self._tar.addfile(_member(path, size_bytes), source)  # type: ignore[arg-type] # needs no more than read()
        return BackupFile(path, size_bytes, hasher.hexdigest())

    def finish(self, manifest: BackupManifest) -> None:
        """See `BackupWriter`."""
        content = manifest.to_bytes()
        self._tar.addfile(_member(BACKUP, len(content)), _Pieces(iter([memoryview(content)])))  # type: ignore[arg-type] # likewise
        self._tar.close()
        self._file.flush()
        self._files.sync(self._file.fileno())
        with open_backup(self._partial) as backup:
            backup.verify()
        self._files.rename(self._partial, self._to)
        self._done = True
        self._files.sync_directory(self._to.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        with suppress(OSError):  # else the next backup of this name removes it
            if not self._done:
                self._partial.unlink()
        with suppress(OSError):  # what cannot be flushed belongs to a backup that has failed
            self._file.close()


def _lock(descriptor: int, partial: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), partial.stat()):
            return
    except (BlockingIOError, FileNotFoundError):
        pass
    raise StateRefusedError(f"another process is writing {partial}")


def _hashed_pieces(descriptor: int, hasher: xxhash.xxh3_128) -> Iterator[memoryview]:
    os.lseek(descriptor, 0, os.SEEK_SET)
    while piece := os.read(descriptor, _PIECE_BYTES):
        hasher.update(piece)
        yield memoryview(piece)


class _Pieces:
    """What tarfile reads from: consecutive pieces as a file."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def read(self, size: int) -> bytes:
        """Returns `size` bytes, or fewer at the end."""
        found = bytearray()
        while len(found) < size:
            self._rest = self._rest or next(self._pieces, memoryview(b""))
            if not self._rest:
                break
            taken = size - len(found)
            found += self._rest[:taken]
            self._rest = self._rest[taken:]
        return bytes(found)


def _member(path: str, size_bytes: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    member.size, member.mode = size_bytes, 0o600
    return member


# -- reading ---------------------------------------------------------------------------------------------------------


class Backup:
    """A backup that is read: its manifest, and the files that it names."""

    def __init__(self, place: Path, manifest: BackupManifest, tar: tarfile.TarFile | None) -> None:
        self.manifest = manifest
        self._place, self._tar = place, tar
        self._members: Mapping[str, tarfile.TarInfo] = {m.name: m for m in tar.getmembers()} if tar else {}

    @contextmanager
    def file(self, path: str) -> Iterator[IO[bytes]]:
        """Opens a file of the manifest. Raises BackupDamagedError if it is not there, OSError."""
        try:
            opened = (
                (self._place / path).open("rb") if self._tar is None else self._tar.extractfile(self._members[path])
            )
        except (KeyError, FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise BackupDamagedError(str(self._place), f"{path} is missing") from None
        if opened is None:  # a link, or a directory
            raise BackupDamagedError(str(self._place), f"{path} is no file")
        with opened:
            try:
                yield opened
            except (tarfile.TarError, EOFError) as error:
                raise BackupDamagedError(str(self._place), f"{path}: {error}") from None

    def pieces(self, file: BackupFile) -> Iterator[memoryview]:
        """Yields the content of a file, and compares its digest and length at the end.

        Raises:
            BackupDamagedError: they are not those of the manifest.
            OSError: the file cannot be read.
        """
        hasher, size_bytes = xxhash.xxh3_128(), 0
        with self.file(file.path) as opened:
            while piece := opened.read(_PIECE_BYTES):
                hasher.update(piece)
                size_bytes += len(piece)
                yield memoryview(piece)
        if size_bytes != file.size_bytes:
            raise BackupDamagedError(str(self._place), f"{file.path} has {size_bytes} bytes, not {file.size_bytes}")
        if hasher.hexdigest() != file.digest:
            raise BackupDamagedError(str(self._place), f"the digest of {file.path} does not match")

    def verify(self) -> None:
        """Reads every file. Raises as `pieces`."""
        for file in self.manifest.files:
            for _ in self.pieces(file):
                pass


@contextmanager
def open_backup(place: Path) -> Iterator[Backup]:
    """Opens a backup and reads its manifest.

    Raises:
        BackupDamagedError: there is no manifest, or it differs from what was written.
        StateRefusedError: a newer Tolaria wrote it, or there is nothing at this place.
        OSError: the system cannot read it.
    """
    if not place.exists():
        raise StateRefusedError(f"--from: there is no backup {place}")
    with ExitStack() as stack:
        try:
            tar = None if place.is_dir() else stack.enter_context(tarfile.open(place, "r:"))
            backup = Backup(place, _manifest(place, tar), tar)
        except (tarfile.TarError, EOFError) as error:
            raise BackupDamagedError(str(place), f"it is no backup, or has been cut: {error}") from None
        except ValueError as error:
            raise BackupDamagedError(str(place), str(error)) from None
        yield backup


def _manifest(place: Path, tar: tarfile.TarFile | None) -> BackupManifest:
    try:
        if tar is None:
            return BackupManifest.from_bytes((place / BACKUP).read_bytes())
        member = tar.extractfile(BACKUP)
        return BackupManifest.from_bytes(member.read(_MANIFEST_BYTES_MAX) if member else b"")
    except (KeyError, FileNotFoundError, IsADirectoryError):
        detail = f"it has no {BACKUP}: it is no backup, was never finished, or has been cut"
        raise BackupDamagedError(str(place), detail) from None
