"""Secrets: files that only the server's user can read, shown to functions as files, never to anybody else.

    DIRECTORY/values/NAMESPACE/NAME   the value; directories 0700, files 0600
    DIRECTORY/mounts/FUNCTION/NAME    links to the values that a function was given

A link, so that an updated secret is what a running function reads next.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hotset.errors import ConfigurationError, StoreError

MAX_SECRET_BYTES = 1 << 20


class Secrets:
    """The secrets of one server. Names must have been checked: they become file names. Methods block."""

    def __init__(self, directory: Path, mount_path: Path | None = None) -> None:
        """``mount_path``: a folder that shows every secret in use, for functions whose code says where they look."""
        self._values = directory / "values"
        self._mounts = directory / "mounts"
        self._mount_path = mount_path
        try:
            for folder in (directory, self._values, self._mounts):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                folder.chmod(0o700)
            if mount_path is not None:
                mount_path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StoreError(f"secrets cannot be kept in {error.filename} ({error.strerror}): see its rights") from None

    def names(self, namespace: str) -> list[str]:
        folder = self._values / namespace
        return sorted(each.name for each in folder.iterdir() if each.suffix != ".tmp") if folder.is_dir() else []

    def exists(self, namespace: str, name: str) -> bool:
        return (self._values / namespace / name).is_file()

    def save(self, namespace: str, name: str, value: bytes) -> None:
        """Write it, in place of what it was; a reader sees the old value or the new one."""
        if len(value) > MAX_SECRET_BYTES:
            raise ConfigurationError(f"a secret may have at most {MAX_SECRET_BYTES} bytes: keep large files elsewhere")
        folder = self._values / namespace
        try:
            folder.mkdir(exist_ok=True, mode=0o700)
            descriptor, temporary = tempfile.mkstemp(suffix=".tmp", dir=folder)  # 0600 by definition
            with os.fdopen(descriptor, "wb") as file:
                file.write(value)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder / name)
        except OSError as error:
            raise StoreError(f"the secret cannot be written ({error.strerror}): see that the disk has room") from None

    def remove(self, namespace: str, name: str) -> bool:
        """False: there is none of that name."""
        try:
            (self._values / namespace / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def missing(self, namespace: str, names: Sequence[str]) -> list[str]:
        return [name for name in names if not self.exists(namespace, name)]

    def mount_point(self, function: str) -> Path:
        """The folder that shows a function its secrets."""
        return self._mounts / function if self._mount_path is None else self._mount_path

    def mount(self, function: str, namespace: str, names: Sequence[str]) -> Path:
        """Show a function exactly these; returns the folder."""
        folder = self.mount_point(function)
        if self._mount_path is None:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in names:
            link = folder / name
            link.unlink(missing_ok=True)
            link.symlink_to((self._values / namespace / name).resolve())
        return folder

    def unmount(self, function: str) -> None:
        if self._mount_path is None:
            shutil.rmtree(self._mounts / function, ignore_errors=True)
