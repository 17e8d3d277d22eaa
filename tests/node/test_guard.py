"""The guard, and where processes come from."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from recording import STUB

from hotset.node.guard import end, watch
from hotset.node.spawner import Spawner, child_environment, return_code_text


def test_the_guard_remembers_who_is_left() -> None:
    read_fd, write_fd = os.pipe()
    os.write(write_fd, b"+1\n+2\n+3\n-2\n-9\n+4")  # cut off in the middle of a line
    os.close(write_fd)
    assert watch(read_fd) == {1, 3}
    os.close(read_fd)


def test_the_guard_ends_whole_groups() -> None:
    with subprocess.Popen(["sleep", "60"], process_group=0) as child:
        end({child.pid})
        assert child.wait() == -signal.SIGKILL
    end({child.pid})  # gone already


def test_a_guard_that_was_killed_is_replaced() -> None:
    spawner = Spawner(STUB)
    spawned = [spawner.spawn(sys.executable, {})]
    guard = spawner._guard
    assert guard is not None
    guard.kill()
    guard.wait()
    spawned += [spawner.spawn(sys.executable, {}) for _ in range(2)]
    assert spawner._guard is not None
    assert spawner._guard is not guard
    for each in spawned:
        each.socket.close()  # it ends
        codes: list[int] = []
        each.process.reap(codes.append)
        assert codes == [0]
        for descriptor in (each.arena_fd, each.log_fd, each.pidfd):
            os.close(descriptor)
    assert guard.stdin is not None
    guard.stdin.close()
    spawner.close()


def test_what_a_process_inherits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTSET_PORT", "1")
    monkeypatch.setenv("LANG", "C")
    environment = child_environment({"LANG": "en", "KEY": "value"})
    assert "HOTSET_PORT" not in environment
    assert (environment["LANG"], environment["KEY"]) == ("en", "value")


def test_return_codes_in_words() -> None:
    assert return_code_text(3) == "exited with code 3"
    assert return_code_text(-11) == "killed by SIGSEGV"
    assert return_code_text(-63) == "killed by signal 63"
