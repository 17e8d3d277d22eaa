"""Opening a SQLite file of this server: created, or brought to the form that this version reads."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from hotset.errors import StoreError


def open_migrated(path: Path, migrations: Sequence[str]) -> sqlite3.Connection:
    """A connection that any thread may use, one at a time, and whose transactions begin and end where the caller says.

    ``migrations``: step n brings a file of version n to n + 1; steps are only ever added. Raises ``sqlite3.Error``, and
    ``StoreError`` for a file of a newer version.
    """
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # What was answered must survive a power cut; FULL costs one disk flush per transaction.
        connection.execute("PRAGMA synchronous = FULL")
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(migrations):
            raise StoreError(f"{path} was written by a newer hotset; upgrade hotset or give another --data-dir")
        for step in range(version, len(migrations)):
            # One transaction per step, its version number included: a crash between two steps is taken up here.
            connection.executescript(f"BEGIN IMMEDIATE; {migrations[step]} PRAGMA user_version = {step + 1}; COMMIT;")
    except BaseException:
        connection.close()
        raise
    return connection
