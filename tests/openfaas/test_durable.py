"""Accepted means that it will be made, whatever happens to the server."""

from __future__ import annotations

from kill_and_restart import kill_in_the_middle

CALLS = 200


def test_a_server_killed_in_the_middle_loses_no_accepted_call(tmp_path):
    outcome = kill_in_the_middle(tmp_path, CALLS)
    assert len(outcome.accepted) == CALLS
    assert outcome.before_kill == CALLS // 2, "it was killed in the middle"
    assert set(outcome.called_back) == outcome.accepted, "each at least once, none that was not sent"
    assert set(outcome.statuses) == {"200"}
