"""The durable queue of asynchronous calls: what was accepted is on the disk before the client hears of it.

A file of its own (``async.db``), because calls come by the thousand and must not wait for a deployment's transaction.
Bodies stay on the disk until their call is made.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from hotset.errors import StoreError
from hotset.store.migrations import open_migrated
from hotset.vocabulary import NORMAL_PRIORITY

FILE_NAME = "async.db"

MIGRATIONS = (
    # The first files had no version number: what this makes may be there.
    """
    CREATE TABLE IF NOT EXISTS calls (
        number INTEGER PRIMARY KEY, call_id TEXT NOT NULL, function TEXT NOT NULL, state TEXT NOT NULL,
        attempts INTEGER NOT NULL, status INTEGER NOT NULL, reason TEXT NOT NULL, accepted_at_s REAL NOT NULL,
        request TEXT NOT NULL, body BLOB NOT NULL
    );
    CREATE INDEX IF NOT EXISTS calls_by_id ON calls (call_id);
    CREATE INDEX IF NOT EXISTS calls_by_state ON calls (state, number);
    """,
    """
    ALTER TABLE calls ADD COLUMN caller TEXT NOT NULL DEFAULT '';
    ALTER TABLE calls ADD COLUMN weight REAL NOT NULL DEFAULT 1.0;
    ALTER TABLE calls ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
    """,
)
"""Only ever added to."""

MOST_DEAD = 10_000
QUEUED, DEAD = "queued", "dead"
_WRITTEN = (
    *("call_id", "function", "caller", "weight", "priority"),
    *("state", "attempts", "status", "reason", "accepted_at_s"),
)
_COLUMNS = ("number", *_WRITTEN, "body_bytes")
_ROW = f"number, {', '.join(_WRITTEN)}, LENGTH(body)"


class AsyncRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTP request that will be made of it; header names in lower case."""

    path: str
    query: str
    headers: tuple[tuple[str, str], ...]
    callback_url: str | None = None


class AsyncCall(msgspec.Struct, frozen=True, kw_only=True):
    """One call that was accepted and has not ended well yet."""

    number: int = 0
    """Given by the queue: the order of acceptance."""
    call_id: str
    function: str
    """As invoked: ``NAME`` or ``NAME.NAMESPACE``."""
    caller: str = ""
    """Who sent it, as known when it was accepted, whatever becomes of his key; empty: nobody in particular."""
    weight: float = 1.0
    priority: int = NORMAL_PRIORITY
    state: str = QUEUED
    """``queued``: it will be tried (again). ``dead``: given up, kept to be looked at."""
    attempts: int = 0
    status: int = 0
    """HTTP status of the last attempt; 0: none was made."""
    reason: str = ""
    accepted_at_s: float
    """Unix time."""
    body_bytes: int = 0


class AsyncCalls:
    """The queue. Every method blocks, the writing ones for about one disk flush; any thread may call them."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME
        self._lock = threading.Lock()
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._connection = open_migrated(self._path, MIGRATIONS)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self._path} cannot be opened ({error}); restore or remove it") from error

    def write(self, added: Sequence[tuple[AsyncCall, AsyncRequest, bytes]], ended: Sequence[int] = ()) -> list[int]:
        """Add some and forget those that ended, in one transaction; returns the numbers of the new ones."""
        with self._transaction() as connection:
            connection.executemany("DELETE FROM calls WHERE number = ?", [(number,) for number in ended])
            return [
                connection.execute(
                    f"INSERT INTO calls ({', '.join(_WRITTEN)}, request, body)"  # noqa: S608
                    f" VALUES ({'?, ' * len(_WRITTEN)}?, ?) RETURNING number",
                    (*(getattr(call, name) for name in _WRITTEN), msgspec.json.encode(request).decode(), body),
                ).fetchone()[0]
                for call, request, body in added
            ]

    def queued(self) -> list[AsyncCall]:
        """All that will be tried (again), oldest first."""
        return self._list("WHERE state = ? ORDER BY number", (QUEUED,))

    def listed(self, state: str | None, most: int) -> list[AsyncCall]:
        """The newest first; None: in any state."""
        if state is None:
            return self._list("ORDER BY number DESC LIMIT ?", (most,))
        return self._list("WHERE state = ? ORDER BY number DESC LIMIT ?", (state, most))

    def find(self, call_id: str) -> AsyncCall | None:
        found = self._list("WHERE call_id = ? ORDER BY number DESC LIMIT 1", (call_id,))
        return found[0] if found else None

    def request(self, number: int) -> tuple[AsyncRequest, bytes] | None:
        """What is to be sent; None: the call was removed."""
        with self._lock, self._errors("read"):
            row = self._connection.execute("SELECT request, body FROM calls WHERE number = ?", (number,)).fetchone()
        return None if row is None else (msgspec.json.decode(row[0], type=AsyncRequest), row[1])

    def note(self, number: int, *, state: str, attempts: int, status: int, reason: str) -> None:
        """How its last attempt ended; of dead letters the newest ``MOST_DEAD`` are kept."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE calls SET state = ?, attempts = ?, status = ?, reason = ? WHERE number = ?",
                (state, attempts, status, reason, number),
            )
            if state == DEAD:
                connection.execute(
                    "DELETE FROM calls WHERE state = ? AND number NOT IN"
                    " (SELECT number FROM calls WHERE state = ? ORDER BY number DESC LIMIT ?)",
                    (DEAD, DEAD, MOST_DEAD),
                )

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _list(self, clause: str, parameters: tuple[str | int, ...]) -> list[AsyncCall]:
        with self._lock, self._errors("read"):
            rows = self._connection.execute(f"SELECT {_ROW} FROM calls {clause}", parameters).fetchall()  # noqa: S608
        return [msgspec.convert(dict(zip(_COLUMNS, row, strict=True)), AsyncCall) for row in rows]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors("written"):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"{self._path} cannot be {what} ({error}); see that its disk has room") from error
