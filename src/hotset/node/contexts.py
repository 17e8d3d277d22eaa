"""Processes that wait with their GPU open, so that a load need not wait for that: tenths of a second on CUDA.

    pool of a zygote -> OPEN -> opening -> OPENED -> waiting -> ``spawn`` takes it; once it has loaded, one more opens

A process that has opened a GPU can use no other (CUDA reads ``CUDA_VISIBLE_DEVICES`` once), so each GPU has its own. A
load that finds none open takes one from the pool, and never waits. They cost GPU memory, so there are few: ``size`` a
GPU, of the interpreters that were deployed or loaded last there. With more interpreters than that, one that is loaded
takes the place of the one that was not for the longest time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

import msgspec

from hotset.functions.http_envelope import PROCESS_ENTRY
from hotset.node.devices.device import Device, OpensAhead
from hotset.node.frames import HEADER, HEADER_BYTES, Failed, Kind, OpenOrder, control
from hotset.node.interface import LaunchSpec
from hotset.node.process import GRACE_S
from hotset.node.spawner import Spawned, return_code_text
from hotset.node.zygote import STARTUP_ONLY, ZygoteSource

MOST_CONTEXT_BYTES = 1 << 30
"""A CUDA context with its kernels takes a few hundred MiB; what a GPU lost beyond that is somebody else's."""
OPENS_WITHIN_S = 60.0
MOST_FAILURES = 8
FIRST_BACK_OFF_S = 1.0
"""After a failure the next try waits, twice as long each time, and after ``MOST_FAILURES`` in a row there is none."""
_MOST_ANSWER_BYTES = 4096
_COUNT_WHEN_OPENED = (*STARTUP_ONLY, "CUDA_", "NVIDIA_", "CUBLAS_", "CUDNN_", "PYTORCH_", "TORCH_")
"""Variables that come too late once the GPU is open: who wants others than are set there gets a process without."""

log = logging.getLogger("hotset.node")


class ContextPool:
    """A ``ProcessSource`` for one GPU's lane: those with the GPU open first, then those of ``source``."""

    def __init__(self, device: Device, opens: OpensAhead, source: ZygoteSource, size: int) -> None:
        self._device = device
        self._opens = opens
        self._source = source
        self._size = size
        self._loop = asyncio.get_running_loop()
        self._recent: list[str] = []
        """Interpreters, the latest first."""
        self._processes: list[_Process] = []
        """Those that open, wait or are ended."""
        self._loading: set[int] = set()
        """Those that were taken and have not loaded: nothing is opened beside their loads."""
        self._failures = 0
        self._resting: asyncio.TimerHandle | None = None
        self._closed = False
        self._emptied: asyncio.Future[None] | None = None
        source.watch(self._refill)

    def serves(self, spec: LaunchSpec) -> bool:
        """Whether a model uses what these processes have opened. Others would only pay for it with memory."""
        return self._opens.framework in spec.frameworks and spec.entry != PROCESS_ENTRY

    def expect(self, spec: LaunchSpec) -> None:
        """This model was deployed, or loaded: its interpreter will be wanted again."""
        if self.serves(spec):
            self._recent = [spec.python, *(each for each in self._recent if each != spec.python)][: self._size]
            self._refill()

    def loaded(self, pid: int, spec: LaunchSpec) -> None:
        self._loading.discard(pid)
        self.expect(spec)

    def waiting(self) -> list[int]:
        """Process ids of those that have the GPU open."""
        return [each.spawned.process.pid for each in self._processes if each.is_open]

    def renew(self) -> None:
        """The GPU failed somebody: whoever has it open may have been hit too."""
        for each in self._processes:
            each.end()

    async def stop(self) -> None:
        """``close``; returns when all are reaped."""
        self.close()
        if self._processes:
            self._emptied = self._loop.create_future()
            await self._emptied

    # ProcessSource

    def spawn(self, python: str, env: Mapping[str, str]) -> Spawned:
        for each in self._processes:
            if each.is_open and each.python == python and _counting(each.env) == _counting(env):
                self._processes.remove(each)
                self._failures = 0
                self._loading.add(each.spawned.process.pid)
                return each.taken()
        return self._source.spawn(python, env)

    def prepare(self, python: str, modules: Iterable[str]) -> None:
        self._source.prepare(python, modules)

    def forget(self, pid: int) -> None:
        self._source.forget(pid)
        self._loading.discard(pid)
        self._refill()

    def close(self) -> None:
        """The GPU is lost or given back: nobody waits any more."""
        if not self._closed:
            self._closed = True
            self._source.unwatch(self._refill)
            if self._resting is not None:
                self._resting.cancel()
            self.renew()

    # Inside

    def _refill(self) -> None:
        """End those that nobody is expected to want any more, and open those that lack."""
        if self._closed or self._loading or self._resting is not None or self._failures >= MOST_FAILURES:
            return
        lacking = [self._recent[each % len(self._recent)] for each in range(self._size)] if self._recent else []
        for each in self._processes:
            if each.python in lacking and not each.ending and not self._is_outdated(each):
                lacking.remove(each.python)
            else:
                each.end()
        for python in lacking[: self._size - len(self._processes)]:
            free_bytes = self._device.free_bytes()
            if free_bytes is not None and free_bytes < self._opens.memory_bytes:
                return  # models' runs have taken it; looked at again after the next load
            spawned = self._source.spare(python, self._opens.framework)
            if spawned is not None:
                zygote_pid = self._source.zygote_pid(python)
                self._processes.append(_Process(self._device, self._opens, python, zygote_pid, spawned, self._gone))

    def _is_outdated(self, process: _Process) -> bool:
        """Others of its interpreter have more imported by now."""
        python = process.python
        return self._source.ready(python) and self._source.zygote_pid(python) != process.zygote_pid

    def _gone(self, process: _Process, reason: str) -> None:
        self._processes.remove(process)
        if self._emptied is not None and not self._processes:
            self._emptied.set_result(None)
        if not process.ending:
            self._failed(reason)
        self.forget(process.spawned.process.pid)

    def _failed(self, reason: str) -> None:
        self._failures += 1
        gpu_id = self._device.gpu.gpu_id
        if self._failures >= MOST_FAILURES:
            log.warning(
                "no process waits with %s open any more: %d in a row failed (%s)", gpu_id, MOST_FAILURES, reason
            )
            return
        if self._failures == 1:
            log.warning("a process that waited with %s open, or was to, is gone (%s): another is tried", gpu_id, reason)
        self._resting = self._loop.call_later(FIRST_BACK_OFF_S * 2 ** (self._failures - 1), self._rested)

    def _rested(self) -> None:
        self._resting = None
        self._refill()


class _Process:
    """One process, from the pool until it is taken or gone. ``gone`` gets it and why, once it is reaped."""

    def __init__(
        self,
        device: Device,
        opens: OpensAhead,
        python: str,
        zygote_pid: int,
        spawned: Spawned,
        gone: Callable[[_Process, str], object],
    ) -> None:
        self.python = python
        self.zygote_pid = zygote_pid
        self.spawned = spawned
        self.env = {**device.defaults(), **device.environment()}
        self.is_open = False
        """It waits for its order."""
        self.ending = False
        """It was asked to."""
        self._device = device
        self._gone = gone
        self._answer = b""
        self._reason = ""
        self._free_before_bytes = device.free_bytes()
        self._loop = asyncio.get_running_loop()
        self._late = self._loop.call_later(OPENS_WITHIN_S, self._end, f"did not open within {OPENS_WITHIN_S:g} s")
        self._loop.add_reader(spawned.socket.fileno(), self._heard)
        self._loop.add_reader(spawned.pidfd, self._exited)
        with suppress(OSError):  # it is gone, which is seen anyway
            spawned.socket.send(control(Kind.OPEN, OpenOrder(opener=opens.opener, env=self.env)))

    def taken(self) -> Spawned:
        """It is somebody else's from here on."""
        self._loop.remove_reader(self.spawned.pidfd)
        return self.spawned

    def end(self) -> None:
        if not self.ending:
            self.ending = True
            self._end("was ended")

    def _heard(self) -> None:
        try:
            piece = self.spawned.socket.recv(_MOST_ANSWER_BYTES)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        self._answer += piece
        if len(self._answer) < HEADER_BYTES:
            if not piece:
                self._end("")
            return
        length, kind, *_ = HEADER.unpack_from(self._answer)
        if piece and len(self._answer) < HEADER_BYTES + length <= _MOST_ANSWER_BYTES:
            return
        if kind == Kind.OPENED and not self.ending:
            self._stop_listening()
            self.is_open = True
            self.spawned = msgspec.structs.replace(self.spawned, context_bytes=self._context_bytes())
            return
        try:
            failed = msgspec.msgpack.decode(self._answer[HEADER_BYTES:], type=Failed)
        except msgspec.MsgspecError:
            self._end("what it said cannot be read")
            return
        # It exits by itself now.
        self._reason = failed.reason
        self._stop_listening()
        self._late = self._loop.call_later(GRACE_S, self._end, failed.reason)

    def _context_bytes(self) -> int:
        """The driver's figure; else what the device has lost meanwhile."""
        seen_bytes, now_bytes = self._device.process_bytes(self.spawned.process.pid), self._device.free_bytes()
        if seen_bytes is not None:
            return seen_bytes
        if self._free_before_bytes is None or now_bytes is None:
            return 0
        return min(max(0, self._free_before_bytes - now_bytes), MOST_CONTEXT_BYTES)

    def _end(self, reason: str) -> None:
        """The first reason counts; without any, how it ends does."""
        self._stop_listening()
        self._reason = self._reason or reason
        self.is_open = False
        with suppress(ProcessLookupError):
            os.killpg(self.spawned.process.pid, signal.SIGKILL)

    def _stop_listening(self) -> None:
        self._late.cancel()
        self._loop.remove_reader(self.spawned.socket.fileno())

    def _exited(self) -> None:
        self._end("")
        self._loop.remove_reader(self.spawned.pidfd)
        self.spawned.process.reap(self._reaped)

    def _reaped(self, return_code: int) -> None:
        self.spawned.close()
        self._gone(self, self._reason or return_code_text(return_code))


def _counting(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(_COUNT_WHEN_OPENED)}
