"""The file of the asynchronous queue: what is in it survives restarts and new versions."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from hotset.errors import StoreError
from hotset.store.async_calls import FILE_NAME, MIGRATIONS, AsyncCall, AsyncCalls, AsyncRequest

REQUEST = AsyncRequest(path="/", query="", headers=(("content-type", "text/plain"),))


def test_calls_are_kept_with_their_callers(tmp_path: Path) -> None:
    call = AsyncCall(call_id="mine", function="cat", caller="team-a", weight=2.5, priority=-1, accepted_at_s=1.5)
    with closing(AsyncCalls(tmp_path)) as calls:
        (number,) = calls.write([(call, REQUEST, b"body")])
    with closing(AsyncCalls(tmp_path)) as calls:
        (kept,) = calls.queued()
        assert (kept.number, kept.call_id, kept.function, kept.body_bytes) == (number, "mine", "cat", 4)
        assert (kept.caller, kept.weight, kept.priority, kept.accepted_at_s) == ("team-a", 2.5, -1, 1.5)
        assert calls.request(number) == (REQUEST, b"body")


def test_a_file_from_before_callers_were_kept_is_taken_over(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.executescript(MIGRATIONS[0])  # and no version number
        connection.execute(
            "INSERT INTO calls (call_id, function, state, attempts, status, reason, accepted_at_s, request, body)"
            """ VALUES ('old', 'cat', 'queued', 2, 503, 'busy', 1.5, '{"path":"/","query":"","headers":[]}', x'00')"""
        )
        connection.commit()
    for _ in range(2):
        with closing(AsyncCalls(tmp_path)) as calls:
            (old,) = calls.queued()
            assert (old.call_id, old.attempts, old.status, old.reason, old.body_bytes) == ("old", 2, 503, "busy", 1)
            assert (old.caller, old.weight, old.priority) == ("", 1.0, 0)
            found = calls.request(old.number)
            assert found is not None
            assert found[0].path == "/"


def test_a_file_that_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    AsyncCalls(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(StoreError, match="newer hotset"):
        AsyncCalls(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match="cannot be opened"):
        AsyncCalls(tmp_path)
