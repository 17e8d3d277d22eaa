"""The embedded Datastore: one SQLite file in the server's data directory, nothing to install or run.

One connection behind a lock, since calls come from several threads and each is done within milliseconds. Records are
stored whole, as JSON, beside the columns they are found by: a record may gain a field (with a default) without a
migration.
"""

from __future__ import annotations

import fcntl
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from hotset.errors import StoreError
from hotset.store.datastore import BundleRecord, FunctionRecord, ImageRecord, Named, NamedRecord, ProfileRecord
from hotset.store.migrations import open_migrated

Record = TypeVar("Record", bound=msgspec.Struct)

FILE_NAME = "hotset.db"

MIGRATIONS = (
    """
    CREATE TABLE functions (name TEXT PRIMARY KEY, bundle TEXT NOT NULL, record TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE bundles (digest TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE profiles (
        function TEXT NOT NULL, model TEXT NOT NULL, gpu_kind TEXT NOT NULL, record TEXT NOT NULL,
        PRIMARY KEY (function, model, gpu_kind)
    ) WITHOUT ROWID;
    """,
    """
    CREATE TABLE named (
        kind TEXT NOT NULL, name TEXT NOT NULL, record TEXT NOT NULL, PRIMARY KEY (kind, name)
    ) WITHOUT ROWID;
    """,
)
"""Only ever added to."""


class SqliteDatastore:
    """A ``Datastore`` in ``directory/hotset.db``; one server at a time."""

    def __init__(self, directory: Path) -> None:
        """Open, create or migrate the file; ``StoreError`` when that cannot be done or another server has it open."""
        self._path = directory / FILE_NAME
        self._lock = threading.Lock()
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._owner = (directory / "server.lock").open("a")
        except OSError as error:
            raise StoreError(
                f"the data directory {directory} cannot be used ({error.strerror}); give another with --data-dir"
            ) from None
        try:
            # The kernel gives the lock back when this process ends, however it ends.
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._owner.close()
            raise StoreError(
                f"another hotset server uses {directory}; stop it or give another with --data-dir"
            ) from None
        try:
            self._connection = open_migrated(self._path, MIGRATIONS)
        except sqlite3.Error as error:
            self._owner.close()
            raise StoreError(f"{self._path} cannot be opened ({error}); restore or remove it") from error
        except StoreError:
            self._owner.close()
            raise

    def deploy(self, function: FunctionRecord, bundle: BundleRecord) -> None:
        if function.bundle != bundle.digest:
            raise StoreError(f"{function.model} runs from bundle {function.bundle}, not from {bundle.digest}")
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO bundles VALUES (?, ?)", (bundle.digest, _encode(bundle)))
            connection.execute(
                "INSERT OR REPLACE INTO functions VALUES (?, ?, ?)", (function.name, function.bundle, _encode(function))
            )

    def function(self, name: str) -> FunctionRecord | None:
        found = self._read("SELECT record FROM functions WHERE name = ?", FunctionRecord, (name,))
        return found[0] if found else None

    def functions(self) -> list[FunctionRecord]:
        return self._read("SELECT record FROM functions ORDER BY name", FunctionRecord)

    def remove_function(self, name: str) -> bool:
        with self._transaction() as connection:
            connection.execute("DELETE FROM profiles WHERE function = ?", (name,))
            return connection.execute("DELETE FROM functions WHERE name = ?", (name,)).rowcount > 0

    def bundles(self) -> list[BundleRecord]:
        return self._read("SELECT record FROM bundles ORDER BY digest", BundleRecord)

    def forget_unused_bundles(self) -> list[str]:
        with self._transaction() as connection:
            connection.execute(
                "DELETE FROM bundles WHERE digest NOT IN (SELECT bundle FROM functions UNION"
                " SELECT json_extract(record, '$.digest') FROM named WHERE kind = 'ImageRecord')"
            )
            return [digest for (digest,) in connection.execute("SELECT digest FROM bundles ORDER BY digest")]

    def name_image(self, image: ImageRecord, bundle: BundleRecord) -> None:
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO bundles VALUES (?, ?)", (bundle.digest, _encode(bundle)))
            connection.execute(
                "INSERT OR REPLACE INTO named VALUES (?, ?, ?)", ("ImageRecord", image.name, _encode(image))
            )

    def save_named(self, record: NamedRecord) -> None:
        row = (type(record).__name__, record.name, _encode(record))
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO named VALUES (?, ?, ?)", row)

    def named(self, kind: type[Named]) -> list[Named]:
        return self._read("SELECT record FROM named WHERE kind = ? ORDER BY name", kind, (kind.__name__,))

    def remove_named(self, kind: type[NamedRecord], name: str) -> bool:
        with self._transaction() as connection:
            removed = connection.execute("DELETE FROM named WHERE kind = ? AND name = ?", (kind.__name__, name))
            return removed.rowcount > 0

    def save_profiles(self, profiles: Iterable[ProfileRecord]) -> None:
        rows = [(p.model.partition("@")[0], p.model, p.gpu_kind, _encode(p)) for p in profiles]
        with self._transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO profiles VALUES (?, ?, ?, ?)", rows)

    def profiles(self) -> list[ProfileRecord]:
        return self._read("SELECT record FROM profiles ORDER BY function, model, gpu_kind", ProfileRecord)

    def close(self) -> None:
        with self._lock:
            self._connection.close()
            self._owner.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    # A failed COMMIT may have ended the transaction itself.
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise self._failed("written", error) from error

    def _read(self, query: str, kind: type[Record], parameters: tuple[str, ...] = ()) -> list[Record]:
        with self._lock:
            try:
                rows = self._connection.execute(query, parameters).fetchall()
            except sqlite3.Error as error:
                raise self._failed("read", error) from error
        try:
            return [msgspec.json.decode(record, type=kind) for (record,) in rows]
        except msgspec.ValidationError as error:
            raise self._failed("read", error) from error

    def _failed(self, what: str, error: Exception) -> StoreError:
        return StoreError(f"{self._path} cannot be {what} ({error}); see that its disk has room and is sound")


def _encode(record: msgspec.Struct) -> str:
    return msgspec.json.encode(record).decode()
