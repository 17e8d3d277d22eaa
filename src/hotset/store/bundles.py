"""Bundles: the files of a function, made on the client, checked and unpacked on the server.

A bundle travels as a zip file and is named by its *content* (``content_digest``), not by the zip's bytes, so that the
same files have the same name whatever compressed them. The server believes nothing of an archive: names, sizes and
digest are checked before its folder appears under ``bundles/DIGEST``, by one rename.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import msgspec
from pathspec import GitIgnoreSpec

from hotset.errors import BundleError
from hotset.store.datastore import BundleRecord

IGNORE_FILE = ".hotsetignore"

# What no function needs; a .hotsetignore is read after these lines and may take one back with "!".
ALWAYS_IGNORED = (
    ".git",
    ".hg",
    ".svn",
    "__pycache__",
    "*.pyc",
    ".venv",
    "node_modules",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    ".ipynb_checkpoints",
    ".DS_Store",
    ".env",
)

COMPRESS_BELOW_BYTES = 1 << 20
"""Larger files are almost always weights, which do not compress: they are stored as they are."""
RATIO_CHECKED_ABOVE_BYTES = 16 << 20
COPY_BYTES = 1 << 20

_DIGEST = re.compile(r"[0-9a-f]{64}")
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


class BundleLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a server accepts."""

    archive_bytes: int = 4 << 30
    """The zip file."""
    unpacked_bytes: int = 8 << 30
    """All files together."""
    files: int = 20_000
    ratio: float = 100.0
    """Most an archive may grow when it is unpacked; small ones, up to 16 MiB unpacked, may grow more."""
    name_bytes: int = 1024
    """A file's path inside the bundle, as UTF-8; each part of it at most 255."""


DEFAULT_LIMITS = BundleLimits()


def make_bundle(source: Path, archive: IO[bytes], limits: BundleLimits = DEFAULT_LIMITS) -> BundleRecord:
    """Zip a file, or a folder, into ``archive``; the same files give the same bytes.

    A folder's ``.hotsetignore`` has git's syntax. A file takes a ``requirements.txt`` beside it along. Raises
    ``BundleError`` when there is nothing to bundle, or too much, or a link that leads out of the folder.
    """
    if source.is_dir():
        root, names = source, _listed(source)
    elif source.is_file():
        root = source.parent
        names = sorted({source.name} | ({"requirements.txt"} if (root / "requirements.txt").is_file() else set()))
    else:
        raise BundleError(f"{source} is neither a file nor a folder; give the path of the function to deploy")
    if not names:
        raise BundleError(f"{source} holds no files to deploy; see its {IGNORE_FILE}")
    _check_count(len(names), limits)
    digest = hashlib.sha256()
    size_bytes = 0
    with zipfile.ZipFile(archive, "w") as out:
        for name in names:
            _check_name(name, limits)
            path = _inside(root, name)
            info = zipfile.ZipInfo(name, _ZIP_EPOCH)
            executable = bool(path.stat().st_mode & stat.S_IXUSR)
            info.external_attr = (stat.S_IFREG | (0o755 if executable else 0o644)) << 16
            info.file_size = path.stat().st_size
            size_bytes += info.file_size
            _check_size(size_bytes, limits)
            small = info.file_size < COMPRESS_BELOW_BYTES
            info.compress_type = zipfile.ZIP_DEFLATED if small else zipfile.ZIP_STORED
            with path.open("rb") as read, out.open(info, "w", force_zip64=info.file_size >= 1 << 31) as write:
                _add(digest, name, executable, _copy(read, write))
    return BundleRecord(digest=digest.hexdigest(), size_bytes=size_bytes, files=len(names), created_at_s=time.time())


def content_digest(root: Path) -> str:
    """Digest of an unpacked bundle, hexadecimal.

    SHA-256 over its files in the order of their names: length and bytes of the name, whether it is executable, SHA-256
    of the content.
    """
    digest = hashlib.sha256()
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()):
        with (root / name).open("rb") as read:
            _add(digest, name, bool((root / name).stat().st_mode & stat.S_IXUSR), _copy(read, None))
    return digest.hexdigest()


class Bundles:
    """The bundles of one server: a folder each, named by its digest. Methods block; any thread may call them."""

    def __init__(self, directory: Path, limits: BundleLimits = DEFAULT_LIMITS) -> None:
        """``directory`` is made when missing; what an interrupted upload left in it is removed."""
        self._directory = directory.resolve()
        self._limits = limits
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob("tmp-*"):
            _remove(leftover)

    def path(self, digest: str) -> Path:
        """Its folder, only ever read; raises ``BundleError`` when there is no such bundle."""
        path = self._directory / digest
        if not _DIGEST.fullmatch(digest) or not path.is_dir():
            raise BundleError(f"there is no bundle {digest}; deploy the function again")
        return path

    def __contains__(self, digest: str) -> bool:
        return bool(_DIGEST.fullmatch(digest)) and (self._directory / digest).is_dir()

    def upload(self) -> Upload:
        """A place for an archive that arrives in pieces."""
        return Upload(self, self._directory, self._limits)

    def add(self, archive: Path) -> BundleRecord:
        """Check and unpack a zip file; one that is there already is left as it is. Raises ``BundleError``."""
        folder = Path(tempfile.mkdtemp(prefix="tmp-", dir=self._directory))
        try:
            record = _unpack(archive, folder, self._limits)
            final = self._directory / record.digest
            if not final.is_dir():
                folder.chmod(0o755)
                _publish(folder, final)
            return record
        except OSError as error:
            raise BundleError(f"the bundle cannot be stored ({error}); see that the disk has room") from error
        finally:
            _remove(folder)

    def remove_unused(self, used: Collection[str]) -> list[str]:
        """Remove every bundle that is not in ``used``, with what was made of it (``DIGEST.tensors``), and name them.

        Only when no deploy is under way (at start)."""
        unused = set[str]()
        for path in self._directory.iterdir():
            digest = path.name.partition(".")[0]
            if _DIGEST.fullmatch(digest) and digest not in used:
                unused.add(digest)
                _remove(path)
        return sorted(unused)


class Upload:
    """One archive on its way in. A context manager: what was not finished is removed."""

    def __init__(self, bundles: Bundles, directory: Path, limits: BundleLimits) -> None:
        self._bundles = bundles
        self._limits = limits
        self._received_bytes = 0
        self._file = tempfile.NamedTemporaryFile(prefix="tmp-", suffix=".zip", dir=directory)  # noqa: SIM115

    def write(self, piece: bytes | memoryview) -> None:
        """Append; raises ``BundleError`` as soon as the archive is larger than allowed."""
        self._received_bytes += len(piece)
        if self._received_bytes > self._limits.archive_bytes:
            raise BundleError(f"the bundle is larger than the {_size(self._limits.archive_bytes)} this server accepts")
        self._file.write(piece)

    def finish(self) -> BundleRecord:
        """Check and unpack what arrived; raises ``BundleError``."""
        self._file.flush()
        return self._bundles.add(Path(self._file.name))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def _listed(root: Path) -> list[str]:
    """Names of the files of a folder that belong in its bundle, sorted."""
    ignore_file = root / IGNORE_FILE
    own = ignore_file.read_text(encoding="utf-8").splitlines() if ignore_file.is_file() else []
    ignored = GitIgnoreSpec.from_lines([*ALWAYS_IGNORED, *own])
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root)
        # Decided here for whole folders too, so that a .venv is not walked through.
        kept = sorted(name for name in folders if not ignored.match_file(f"{(here / name).as_posix()}/"))
        folders[:] = [name for name in kept if not (root / here / name).is_symlink()]
        linked = [name for name in kept if (root / here / name).is_symlink()]
        if linked:
            raise BundleError(f"{root / here / linked[0]} is a link to a folder; copy it or name it in {IGNORE_FILE}")
        names += [name for file in files if not ignored.match_file(name := (here / file).as_posix())]
    return sorted(names)


def _inside(root: Path, name: str) -> Path:
    path = root / name
    real = path.resolve()
    if not real.is_relative_to(root.resolve()):
        raise BundleError(f"{path} is a link that leads out of {root}; copy the file or name it in {IGNORE_FILE}")
    if not real.is_file():
        raise BundleError(f"{path} is not a regular file; remove it or name it in {IGNORE_FILE}")
    return real


def _unpack(archive: Path, folder: Path, limits: BundleLimits) -> BundleRecord:
    archive_bytes = archive.stat().st_size
    if archive_bytes > limits.archive_bytes:
        raise BundleError(f"the bundle is larger than the {_size(limits.archive_bytes)} this server accepts")
    try:
        with zipfile.ZipFile(archive) as source:
            entries = _checked(source.infolist(), archive_bytes, limits)
            digest = hashlib.sha256()
            for entry in entries:
                target = folder / entry.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                executable = bool(entry.external_attr >> 16 & stat.S_IXUSR)
                with source.open(entry) as read, target.open("xb") as write:
                    _add(digest, entry.filename, executable, _copy(read, write))
                    write.flush()
                    os.fsync(write.fileno())
                target.chmod(0o755 if executable else 0o644)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        raise BundleError(f"the bundle is not a sound zip file ({error}); make and send it again") from error
    return BundleRecord(
        digest=digest.hexdigest(),
        size_bytes=sum(entry.file_size for entry in entries),
        files=len(entries),
        created_at_s=time.time(),
    )


def _checked(listed: list[zipfile.ZipInfo], archive_bytes: int, limits: BundleLimits) -> list[zipfile.ZipInfo]:
    """The files of an archive in the order of their names, or ``BundleError``: before a byte of it is written."""
    entries = sorted((entry for entry in listed if not entry.is_dir()), key=lambda entry: entry.filename)
    _check_count(len(listed), limits)
    if not entries:
        raise BundleError("the bundle holds no files; deploy a file or a folder with at least one")
    names: set[str] = set()
    for entry in entries:
        _check_name(entry.filename, limits)
        # Sorted: a file comes before what would be inside it if it were a folder too.
        parts = entry.filename.split("/")
        if any("/".join(parts[:n]) in names for n in range(1, len(parts) + 1)):
            raise BundleError(f"the bundle holds two files that both need the name {entry.filename!r}; make it again")
        names.add(entry.filename)
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise BundleError(f"{entry.filename} in the bundle is a link or a device; only files can be deployed")
        if entry.flag_bits & 0x1:
            raise BundleError(f"{entry.filename} in the bundle is encrypted; send it without a password")
    # An entry never unpacks to more than the size it declares, so the declared sizes bound what is written.
    total = sum(entry.file_size for entry in entries)
    _check_size(total, limits)
    if total > RATIO_CHECKED_ABOVE_BYTES and total > limits.ratio * archive_bytes:
        raise BundleError(
            f"the bundle would unpack to more than {limits.ratio:g} times its size; store large files plainly"
        )
    return entries


def _check_name(name: str, limits: BundleLimits) -> None:
    parts = name.split("/")
    encoded = name.encode("utf-8", "surrogateescape")
    if (
        not all(part not in ("", ".", "..") and len(part.encode("utf-8", "surrogateescape")) <= 255 for part in parts)
        or len(encoded) > limits.name_bytes
        or "\\" in name
        or ":" in parts[0]
        or any(unicodedata.category(character) in ("Cc", "Cs") for character in name)
    ):
        raise BundleError(f"the bundle holds a file named {name[:80]!r}, which is no plain relative path; rename it")


def _check_count(files: int, limits: BundleLimits) -> None:
    if files > limits.files:
        raise BundleError(f"the bundle holds more than {limits.files} files; name what is not needed in {IGNORE_FILE}")


def _check_size(size_bytes: int, limits: BundleLimits) -> None:
    if size_bytes > limits.unpacked_bytes:
        raise BundleError(
            f"the bundle's files are larger than {_size(limits.unpacked_bytes)} together; name what is not needed in "
            f"{IGNORE_FILE}"
        )


def _add(digest: hashlib._Hash, name: str, executable: bool, content: bytes) -> None:
    encoded = name.encode()
    digest.update(len(encoded).to_bytes(8, "big") + encoded + (b"\x01" if executable else b"\x00") + content)


def _copy(read: IO[bytes], write: IO[bytes] | None) -> bytes:
    """Copy to the end; returns the SHA-256 of what was copied."""
    digest = hashlib.sha256()
    while piece := read.read(COPY_BYTES):
        digest.update(piece)
        if write is not None:
            write.write(piece)
    return digest.digest()


def _publish(folder: Path, final: Path) -> None:
    """Give a finished folder its name: it is there whole or not at all, also after a power cut."""
    for subfolder, _, _ in os.walk(folder):
        _sync(Path(subfolder))
    try:
        folder.rename(final)
    except OSError:
        # A folder of that name came between: another deploy of the same content won.
        if not final.is_dir():
            raise
    _sync(final.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file or a folder, whichever it is and whether or not it is still there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):g} GiB" if size_bytes >= 1 << 30 else f"{size_bytes / (1 << 20):g} MiB"
