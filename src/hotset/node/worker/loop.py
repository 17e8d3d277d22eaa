"""What a GPU process does: load one model, then run what it is sent, until the node says bye or is gone.

A plain blocking loop. Nothing runs beside the model: no thread, no event loop, no timer; whether a run takes too long
is for the node to judge.
"""

from __future__ import annotations

import os
import pkgutil
import sys
import traceback
from contextlib import nullcontext
from enum import IntEnum
from time import perf_counter
from typing import TYPE_CHECKING

import msgspec

from hotset.functions.http_envelope import PROCESS_ENTRY
from hotset.functions.loading import load_entry
from hotset.functions.runtime import Call as Argument
from hotset.functions.runtime import Outcome, Runtime, Stream
from hotset.node.frames import (
    MAX_BODY_BYTES,
    Failed,
    ImportOrder,
    Inspected,
    InspectOrder,
    Kind,
    Loaded,
    LoadOrder,
    OpenOrder,
)
from hotset.node.interface import Call
from hotset.node.worker import environment
from hotset.node.worker.channel import ByeError, Channel, ClosedError
from hotset.node.worker.converted_sessions import watched_sessions
from hotset.node.worker.fast_load import Incomplete, fast_load
from hotset.node.worker.faults import classify, describe, load_failure
from hotset.node.worker.imports import frameworks_of, watched
from hotset.node.worker.memory import trim_heap
from hotset.node.worker.model_memory import LOOK_AGAIN_S, ModelMemory
from hotset.node.worker.residency import CannotPark, Residency, pace
from hotset.node.worker.staged_load import staged_load
from hotset.vocabulary import FailureKind

if TYPE_CHECKING:
    from hotset.functions.process import ProcessRuntime

_HELD_S = 60e-6
"""Answers leave together, but none waits longer than this for the next call, or item of a stream, to begin: the node
works on what it has while this process works on the rest."""
_TOO_LARGE = b'{"error":"the answer has more than %d bytes: return less, or yield it in parts"}' % MAX_BODY_BYTES


class Exit(IntEnum):
    """Exit codes of a GPU process that ends by itself."""

    BYE = 0
    LOAD_FAILED = 70
    DEVICE_FAILED = 71
    MOVE_FAILED = 72


class FatalError(Exception):
    """Something failed that this process cannot go on after."""

    def __init__(self, failed: Failed, code: Exit) -> None:
        self.failed = failed
        self.code = code


class Worker:
    """One process, one model."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._imported: Runtime | ProcessRuntime | None = None
        self._runtime: Runtime | ProcessRuntime | None = None
        """Once it is loaded."""
        self._residency: Residency | None = None
        self._flushed_s = 0.0

    def main(self) -> Exit:
        """Live and die. Every way out but a crash comes through here."""
        try:
            order = self._channel.next_order()
            if isinstance(order, OpenOrder):
                self._open(order)
                order = self._channel.next_order()
            if isinstance(order, InspectOrder):
                return self._inspect(order)
            assert isinstance(order, LoadOrder)
            failed = self._import(order)
            if failed is None and isinstance(order, ImportOrder):
                order = self._channel.next_order()
                assert isinstance(order, LoadOrder)
            if failed is None:
                failed = self._load(order)
            if failed is not None:
                self._channel.failed(failed)
                return Exit.LOAD_FAILED
            while True:
                work = self._channel.next_work(LOOK_AGAIN_S if self._memory.ran else None)
                if isinstance(work, list):
                    self._run(work)
                    self._memory.ran = self._memory.counted
                elif work is not None:
                    self._move(work)
                if self._memory.ran and perf_counter() >= self._memory.due_s:
                    self._look()
        except FatalError as error:
            self._channel.failed(error.failed)
            return error.code
        except ByeError:
            self._unload()
        except ClosedError:
            pass
        return Exit.BYE

    # Open, inspect, load and unload

    def _open(self, order: OpenOrder) -> None:
        """Have the device open before anybody waits for it."""
        environment.apply(order.env)
        try:
            pkgutil.resolve_name(order.opener)()
        except Exception as error:  # noqa: BLE001 - whatever the device or its framework raises is reported
            raise FatalError(load_failure(error), Exit.DEVICE_FAILED) from None
        self._channel.opened()

    def _inspect(self, order: InspectOrder) -> Exit:
        """What its code raises is for the log, which whoever asked for this reads."""
        _enter(order)
        already = environment.imported_frameworks()
        try:
            with watched():
                # Imported by processes that need it: most do not.
                from hotset.functions.description import Description, describe_entry

                described = describe_entry(order.code_path, order.entry)
        except BaseException:  # noqa: BLE001 - a module may also exit
            traceback.print_exc()
            return Exit.LOAD_FAILED
        if isinstance(described, Description):
            needed = frameworks_of(order.entry.partition(":")[0])
            new = [each for each in environment.imported_frameworks() if each in needed or each not in already]
            described = msgspec.structs.replace(described, frameworks=tuple(new))
        self._channel.inspected(Inspected(description=msgspec.json.encode(described)))
        return Exit.BYE

    def _import(self, order: LoadOrder) -> Failed | None:
        _enter(order)
        begin_s = perf_counter()
        try:
            self._imported = _runtime(order)
        except Exception as error:  # noqa: BLE001 - whatever a user's module raises is reported, with its traceback in the log
            traceback.print_exc()
            return load_failure(error)
        self._import_s = perf_counter() - begin_s
        return None

    def _load(self, order: LoadOrder) -> Failed | None:
        runtime = self._imported
        assert runtime is not None
        begin_s = perf_counter()
        try:
            limited = _limit_cuda(order)
            self._memory = memory = ModelMemory(order)
            runtime, mapped_bytes = self._run_load(runtime, order)
            if not limited:
                _limit_cuda(order)  # its load imported torch: from here on, at least
        except Exception as error:  # noqa: BLE001 - whatever a user's load raises is reported, with its traceback in the log
            traceback.print_exc()
            return load_failure(error)
        memory_bytes = memory.loaded(runtime.instance, mapped_bytes)
        if order.limit_bytes is not None and memory_bytes > order.limit_bytes:
            return Failed(
                kind=FailureKind.OUT_OF_MEMORY,
                reason=f"takes {_mib(memory_bytes)} once loaded, but its GPU had {_mib(order.limit_bytes)} free",
                memory_bytes=memory_bytes,
            )
        pace(begin_s, memory_bytes, order.copy_bandwidth)
        self._runtime = runtime
        self._residency = Residency(runtime.instance, order.device, memory_bytes, order.copy_bandwidth)
        self._channel.loaded(
            Loaded(
                memory_bytes=memory_bytes,
                frameworks=environment.imported_frameworks(),
                import_s=self._import_s,
                load_s=perf_counter() - begin_s,
            )
        )
        return None

    def _run_load(self, runtime: Runtime | ProcessRuntime, order: LoadOrder) -> tuple[Runtime | ProcessRuntime, int]:
        """The function's ``load``; what is loaded then, and the bytes of files that its ONNX sessions have mapped."""
        with staged_load() if order.device.startswith("cuda") else nullcontext():
            try:
                way = fast_load(order.code_path) if order.fast else watched_sessions("")
                with way as sessions:
                    runtime.load()
                return runtime, sum(each.mapped_bytes for each in sessions)
            except Incomplete as reason:
                sys.stderr.write(f"hotset: load is run as it is, which is slower: {reason}\n")
                runtime = _runtime(order)
                trim_heap()
                runtime.load()
                return runtime, 0

    def _move(self, order: Kind) -> None:
        """Offload or restore. After a failure nobody knows where the weights are, so the process ends."""
        assert self._residency is not None
        if self._memory.ran and not self._memory.on_cuda:
            self._look()  # it is parked as it is now
        try:
            moved = self._residency.offload() if order is Kind.OFFLOAD else self._residency.restore()
        except CannotPark as reason:
            failed = Failed(kind=FailureKind.ERROR, reason=f"cannot be parked: {reason}")
            raise FatalError(failed, Exit.MOVE_FAILED) from None
        except Exception as error:  # noqa: BLE001 - a user's hook, or the device: reported, with its traceback in the log
            traceback.print_exc()
            raise FatalError(load_failure(error), Exit.MOVE_FAILED) from None
        self._channel.moved(moved)

    def _look(self) -> None:
        """Tell the node what the model takes, if that is news, unless a call is there."""
        self._channel.flush()
        self._channel.poll()
        if self._channel.idle and (measured := self._memory.look()) is not None:
            self._channel.measured(measured)
            assert self._residency is not None
            self._residency.memory_bytes = self._memory.memory_bytes

    def _unload(self) -> None:
        if self._runtime is None:
            return
        try:
            self._runtime.unload()
        except Exception:  # noqa: BLE001 - the process ends either way; its log says what went wrong
            traceback.print_exc()

    # Run

    def _run(self, calls: list[Call]) -> None:
        assert self._runtime is not None
        if len(calls) == 1:
            self._run_one(calls.pop(), ends=True)
        else:
            begin_s = perf_counter()
            if self._runtime.signature.batched:
                self._run_batch(calls)
            else:
                # Popped, so that nothing here keeps a call's shared-memory slot once it is answered.
                calls.reverse()
                while calls:
                    self._run_one(calls.pop())
            self._channel.ran(perf_counter() - begin_s)
        if self._channel.cancelled and self._channel.idle:
            self._channel.cancelled.clear()

    def _run_one(self, call: Call, *, ends: bool = False) -> None:
        assert self._runtime is not None
        begin_s = self._flush_if_due()
        if call.request_id in self._channel.cancelled:
            self._channel.answer(call.request_id, 200, call.content_type, b"", 0.0, final=True, ends=ends)
            return
        outcome = self._runtime.call(call.body, call.content_type, call.accept)
        self._answer(call.request_id, outcome, begin_s, ends)

    def _run_batch(self, calls: list[Call]) -> None:
        assert self._runtime is not None
        begin_s = perf_counter()
        request_ids = [call.request_id for call in calls]
        arguments = [Argument(call.body, call.content_type, call.accept) for call in calls]
        calls.clear()
        outcomes = self._runtime.call_batch(arguments)
        for request_id, outcome in zip(request_ids, outcomes, strict=True):
            self._answer(request_id, outcome, begin_s)

    def _answer(self, request_id: int, outcome: Outcome, begin_s: float, ends: bool = False) -> None:
        if outcome.error is not None:
            _raise_device_error(outcome.error)
        status, content_type, body, rest = outcome.status, outcome.content_type, outcome.body, outcome.rest
        if outcome.stream is not None:
            self._stream(request_id, outcome, outcome.stream, begin_s)
            body = b""
        elif len(body) + sum(map(len, rest)) > MAX_BODY_BYTES:
            status, content_type, body, rest = 500, "application/json", _TOO_LARGE, ()
        spent_s = perf_counter() - begin_s
        self._channel.answer(request_id, status, content_type, body, spent_s, rest=rest, final=True, ends=ends)

    def _stream(self, request_id: int, outcome: Outcome, stream: Stream, begin_s: float) -> None:
        """Send the chunks; the final, empty answer is the caller's."""
        channel = self._channel
        try:
            for item in stream:
                spent_s = perf_counter() - begin_s
                channel.answer(request_id, outcome.status, outcome.content_type, item, spent_s, final=False)
                self._flush_if_due()
                channel.poll()
                if request_id in channel.cancelled:
                    break
        finally:
            stream.close()
        if stream.error is not None:
            _raise_device_error(stream.error)

    def _flush_if_due(self) -> float:
        """Before work of unknown length: gathered answers leave, unless they are fresh. The time."""
        now_s = perf_counter()
        if now_s - self._flushed_s > _HELD_S:
            self._channel.flush()
            self._flushed_s = now_s
        return now_s


def _enter(order: LoadOrder | InspectOrder) -> None:
    """The function's folder and environment become the process's."""
    if os.path.isdir(order.code_path):
        os.chdir(order.code_path)
    environment.apply(order.env)


def _runtime(order: LoadOrder) -> Runtime | ProcessRuntime:
    if order.entry != PROCESS_ENTRY:
        return Runtime(load_entry(order.code_path, order.entry), order.device)
    # Imported by processes that need it: most do not.
    from hotset.functions.process import ProcessRuntime

    return ProcessRuntime(order.model.partition("@")[0], order.code_path, order.device)


def _raise_device_error(error: Exception) -> None:
    kind = classify(error)
    if kind is not None:
        raise FatalError(Failed(kind=kind, reason=describe(error)), Exit.DEVICE_FAILED)


def _limit_cuda(order: LoadOrder) -> bool:
    """Make torch refuse what is over the model's limit: a greedy model fails alone, its neighbours do not. False: torch
    is not imported. It is told when it opens the GPU, which this does not do: that takes memory and time, and what uses
    another framework never needs the torch that its process has imported."""
    torch = sys.modules.get("torch")
    limit_bytes = order.limit_bytes
    if torch is None or limit_bytes is None or not order.device.startswith("cuda"):
        return False

    def limit() -> None:
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total_bytes), 0)

    torch.cuda._lazy_call(limit)
    return True


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"
