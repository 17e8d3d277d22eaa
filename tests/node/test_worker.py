"""The GPU process's loop, in this process: what it is sent waits in the socket, what it says is read afterwards."""

from __future__ import annotations

import mmap
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import numpy
import pytest
from recording import FUNCTIONS, MIB

from hotset.node.frames import ANSWER_PREFIX, HEADER, Failed, Flag, Kind, LoadOrder, OpenOrder, call_prefix, control
from hotset.node.slots import create_arena
from hotset.node.worker import loop, memory
from hotset.node.worker.channel import Channel
from hotset.node.worker.faults import classify, describe, load_failure
from hotset.node.worker.loop import Exit, Worker
from hotset.vocabulary import FailureKind


class Said:
    """One frame from the process."""

    def __init__(self, kind: int, flags: int, status: int, id: int, payload: bytes) -> None:
        self.kind = Kind(kind)
        self.final = bool(flags & Flag.LAST)
        self.status = status
        self.id = id
        self.payload = payload

    @property
    def body(self) -> bytes:
        _, size = ANSWER_PREFIX.unpack_from(self.payload)
        return self.payload[ANSWER_PREFIX.size + size :]


class Desk:
    """The node's side: send, let the worker live, read."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        for end in (self.socket, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.theirs = theirs
        self._stream = self.socket.makefile("rb")
        self.arena_fd = create_arena(1 << 20)
        self.worker = Worker(Channel(theirs, self.arena_fd))

    def load(self, name: str, limit_bytes: int | None = None, device: str = "cpu") -> None:
        order = LoadOrder(
            model=f"{name}@1", entry=f"basic:{name}", code_path=str(FUNCTIONS), device=device, limit_bytes=limit_bytes
        )
        self.socket.sendall(control(Kind.LOAD, order))

    def run(self, *calls: tuple[int, bytes]) -> None:
        for index, (request_id, body) in enumerate(calls, 1):
            payload = call_prefix("application/json", "*/*") + body
            flags = Flag.LAST if index == len(calls) else 0
            self.socket.sendall(HEADER.pack(len(payload), Kind.CALL, flags, 0, request_id) + payload)

    def live(self, end: Kind | None = Kind.BYE) -> Exit:
        if end is None:
            self.socket.shutdown(socket.SHUT_WR)
        else:
            self.socket.sendall(control(end))
        return self.worker.main()

    def close(self) -> None:
        self._stream.close()
        self.socket.close()
        self.theirs.close()
        os.close(self.arena_fd)

    def hear(self) -> Said:
        """The next frame."""
        length, kind, flags, status, id = HEADER.unpack(self._stream.read(HEADER.size))
        return Said(kind, flags, status, id, self._stream.read(length))

    def said(self) -> list[Said]:
        """What is left, once the worker has ended."""
        self.theirs.close()
        frames = []
        while self._stream.peek(1):
            frames.append(self.hear())
        return frames


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.chdir(os.getcwd())
    monkeypatch.setattr(sys, "path", list(sys.path))
    made = Desk()
    yield made
    made.close()


def test_load_run_and_bye(desk: Desk) -> None:
    desk.load("Holder", limit_bytes=10 * MIB)
    desk.run((1, b'"a"'), (2, b"17"))
    assert desk.live() is Exit.BYE
    loaded, first, bad, ran = desk.said()
    assert loaded.kind is Kind.LOADED
    assert (first.id, first.status, first.body, first.final) == (1, 200, b'"cpu a"', True)
    assert (bad.id, bad.status) == (2, 400)
    assert ran.kind is Kind.RAN
    assert struct.unpack("<d", ran.payload)[0] > 0


def test_the_node_is_gone(desk: Desk) -> None:
    assert desk.live(end=None) is Exit.BYE


def test_bye_before_any_model(desk: Desk) -> None:
    assert desk.live() is Exit.BYE
    assert desk.said() == []


def test_a_device_is_opened_before_the_model_is_known(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(loop, "open_it", lambda: seen.append(os.environ.get("CUDA_VISIBLE_DEVICES")), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    order = OpenOrder(opener="hotset.node.worker.loop:open_it", env={"CUDA_VISIBLE_DEVICES": "GPU-7"})
    desk.socket.sendall(control(Kind.OPEN, order))
    desk.load("Holder", limit_bytes=10 * MIB)
    assert desk.live() is Exit.BYE
    assert [frame.kind for frame in desk.said()] == [Kind.OPENED, Kind.LOADED]
    assert seen == ["GPU-7"]


def test_a_device_that_cannot_be_opened_ends_the_process(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_it() -> None:
        raise RuntimeError("CUDA error: out of memory\nCompile with ...")

    monkeypatch.setattr(loop, "open_it", open_it, raising=False)
    desk.socket.sendall(control(Kind.OPEN, OpenOrder(opener="hotset.node.worker.loop:open_it")))
    assert desk.live() is Exit.DEVICE_FAILED
    (failed,) = desk.said()
    assert msgspec.msgpack.decode(failed.payload, type=Failed) == Failed(
        kind=FailureKind.OUT_OF_MEMORY, reason="RuntimeError: CUDA error: out of memory"
    )


def test_a_load_that_does_not_fit_says_what_it_takes(desk: Desk) -> None:
    desk.load("Holder", limit_bytes=MIB)
    assert desk.live() is Exit.LOAD_FAILED
    (failed,) = desk.said()
    assert failed.kind is Kind.FAILED
    assert b"takes 8.0 MiB once loaded, but its GPU had 1.0 MiB free" in failed.payload


def test_a_load_that_raises(desk: Desk, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LOAD", "raise")
    desk.load("LoadTrouble")
    assert desk.live() is Exit.LOAD_FAILED
    assert b"ValueError: no weights" in desk.said()[0].payload
    assert "in sight" in capfd.readouterr().err


def test_a_batch_is_one_run(desk: Desk) -> None:
    desk.load("Batch")
    desk.run((1, b"10"), (2, b"20"))
    assert desk.live() is Exit.BYE
    assert [frame.body for frame in desk.said()[1:3]] == [b"[10,2]", b"[20,2]"]


def test_streams_and_clients_that_leave(desk: Desk, capfd: pytest.CaptureFixture[str]) -> None:
    """The process in a thread: here what it hears depends on what it said."""
    living = threading.Thread(target=desk.worker.main)
    living.start()
    desk.load("Numbers")
    desk.run((1, b"3"))
    assert desk.hear().kind is Kind.LOADED
    assert [desk.hear().body.strip() for _ in range(4)] == [b"0", b"1", b"2", b""]

    desk.run((2, b"-1"))
    assert [desk.hear().body.strip() for _ in range(3)] == [b"0", b"1", b"2"]
    desk.socket.sendall(control(Kind.CANCEL, id=2))
    while not desk.hear().final:
        pass
    assert "closed\nclosed" in capfd.readouterr().out

    # Left before its turn: answered without a run. A later request of the same number is another one.
    desk.socket.sendall(control(Kind.CANCEL, id=4))
    desk.run((3, b"0"), (4, b"-1"))
    assert [(frame.id, frame.final) for frame in (desk.hear(), desk.hear())] == [(3, True), (4, True)]
    assert desk.hear().kind is Kind.RAN
    desk.run((4, b"1"))
    assert [desk.hear().body.strip() for _ in range(2)] == [b"0", b""]
    desk.socket.sendall(control(Kind.BYE))
    living.join()


def test_an_answer_over_the_limit_is_an_error(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "MAX_BODY_BYTES", 10)
    desk.load("Holder")
    desk.run((1, b'"abcdefghij"'))
    assert desk.live() is Exit.BYE
    answer = desk.said()[1]
    assert answer.status == 500
    assert b"yield it in parts" in answer.body


def test_a_device_error_ends_the_process(desk: Desk) -> None:
    desk.load("Trouble")
    desk.run((1, b'"fine"'), (2, b'"device_error"'))
    assert desk.live() is Exit.DEVICE_FAILED
    *_, fine, failed = desk.said()
    assert fine.body == b'"fine"'
    assert failed.kind is Kind.FAILED
    assert b"illegal memory access" in failed.payload


def test_an_unload_that_raises_is_logged(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def unload() -> None:
        raise RuntimeError("will not let go")

    desk.load("Echo")
    order = desk.worker._channel.next_order()
    assert desk.worker._import(order) is desk.worker._load(order) is None
    assert desk.worker._runtime is not None
    monkeypatch.setattr(desk.worker._runtime, "unload", unload)
    desk.worker._unload()
    assert "will not let go" in capfd.readouterr().err


# Memory


def test_tensors_count_once_wherever_they_are() -> None:
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(16, 16, bias=False)
    tied = torch.nn.Linear(16, 16, bias=False)
    tied.weight = layer.weight
    layer.register_buffer("scale", torch.ones(8))

    class Function:
        def __init__(self) -> None:
            self.model = torch.nn.Sequential(layer, tied)
            self.parts = {"view": layer.weight[:2], "arrays": [numpy.ones(4)[1:]], "me": self, "module": torch}

    assert memory.found_bytes(Function()) == (16 * 16 * 4 + 8 * 4, 32)
    assert memory.measure(Function(), growth_bytes=1 << 40) == 16 * 16 * 4 + 8 * 4 + 32


def test_tensors_without_memory_of_their_own_kind_are_counted_by_their_numbers() -> None:
    torch = pytest.importorskip("torch")
    function = SimpleNamespace(meta=torch.empty(1 << 20, device="meta"), sparse=torch.eye(4).to_sparse())
    assert memory.found_bytes(function) == (16 * 4, 0)


def test_without_tensors_growth_counts_unless_arrays_explain_it() -> None:
    function = SimpleNamespace(table=numpy.ones(1000))
    assert memory.found_bytes(function) == (0, 8000)
    assert memory.measure(function, growth_bytes=16_000) == 8000
    assert memory.measure(function, growth_bytes=16_001) == 16_001


def test_private_memory_is_what_was_allocated() -> None:
    before = memory.private_bytes()
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, 32 * MIB, flags=private) as held:  # the allocator might give what it had before
        held.write(b"x" * (32 * MIB))
        assert memory.private_bytes() - before > 30 * MIB


def fake_torch(initialized: bool = True) -> ModuleType:
    """Keeps what it is told to call once it opens the GPU, as torch does."""
    torch = ModuleType("torch")
    fractions: list[tuple[float, int]] = []
    queued: list[Callable[[], None]] = []
    torch.fractions, torch.queued = fractions, queued  # type: ignore[attr-defined]
    torch.cuda = SimpleNamespace(  # type: ignore[attr-defined]
        is_initialized=lambda: initialized,
        _lazy_call=queued.append,
        memory_reserved=lambda: 5 * MIB,
        get_device_properties=lambda index: SimpleNamespace(total_memory=100 * MIB),
        set_per_process_memory_fraction=lambda fraction, index: fractions.append((fraction, index)),
    )
    return torch


def test_torch_is_held_to_the_limit_and_asked_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    order = LoadOrder(model="a@1", entry="a:A", code_path=".", device="cuda:0", limit_bytes=25 * MIB)
    assert not loop._limit_cuda(order)
    assert memory.cuda_bytes() is None
    monkeypatch.setitem(sys.modules, "torch", torch := fake_torch())
    assert loop._limit_cuda(order)
    # Not yet: a function that does not use the torch that is imported opens no context, and a torch for CPUs beside an
    # onnxruntime for GPUs is no reason to fail.
    assert torch.fractions == []
    (opens_the_gpu,) = torch.queued
    opens_the_gpu()
    assert torch.fractions == [(0.25, 0)]
    assert memory.cuda_bytes() == 5 * MIB
    monkeypatch.setitem(sys.modules, "torch", fake_torch(initialized=False))
    assert memory.cuda_bytes() is None


@pytest.mark.parametrize(("device", "staged"), [("cuda:0", True), ("cpu", False)])
@pytest.mark.parametrize("fast", [True, False])
def test_a_load_for_a_gpu_is_staged(device: str, staged: bool, fast: bool) -> None:
    torch = pytest.importorskip("torch")
    seen: list[bool] = []
    runtime: Any = SimpleNamespace(load=lambda: seen.append("to" in vars(torch.Tensor)))
    order = LoadOrder(model="a@1", entry="a:A", code_path="", device=device, fast=fast)
    unused: Any = None
    assert loop.Worker(unused)._run_load(runtime, order) == (runtime, 0)
    assert seen == [staged]
    assert "to" not in vars(torch.Tensor)


# Faults


class OutOfMemoryError(RuntimeError):
    __module__ = "torch.cuda"


class AcceleratorError(RuntimeError):
    __module__ = "torch"


class RuntimeException(Exception):
    __module__ = "onnxruntime.capi.onnxruntime_pybind11_state"


class CUDARuntimeError(RuntimeError):
    __module__ = "cupy_backends.cuda.api.runtime"


class JaxRuntimeError(RuntimeError):
    __module__ = "jaxlib._jax"


ORT = "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node."


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OutOfMemoryError("tried to allocate"), FailureKind.OUT_OF_MEMORY),
        (RuntimeError("CUDA out of memory. Tried"), FailureKind.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: out of memory"), FailureKind.OUT_OF_MEMORY),
        (AcceleratorError("CUDA error: out of memory"), FailureKind.OUT_OF_MEMORY),
        (
            RuntimeException(f"{ORT} BFCArena: Failed to allocate memory for requested buffer of size 9"),
            FailureKind.OUT_OF_MEMORY,
        ),
        (RuntimeException(f"{ORT} CUDA failure 2: out of memory ; GPU=0"), FailureKind.OUT_OF_MEMORY),
        (RuntimeException(f"{ORT} CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED"), FailureKind.OUT_OF_MEMORY),
        (
            JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"),
            FailureKind.OUT_OF_MEMORY,
        ),
        (AcceleratorError("an illegal access"), FailureKind.DEVICE),
        (AcceleratorError("CUDA error: an illegal memory access was encountered"), FailureKind.DEVICE),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), FailureKind.DEVICE),
        (RuntimeException(f"{ORT} CUDA failure 700: an illegal memory access was encountered"), FailureKind.DEVICE),
        (CUDARuntimeError("cudaErrorIllegalAddress: an illegal memory access"), FailureKind.DEVICE),
        (JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access"), FailureKind.DEVICE),
        (AcceleratorError("CUDA error: invalid device ordinal"), None),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), None),
        (RuntimeException("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions"), None),
        (RuntimeError("CUDA error: device-side assert triggered"), FailureKind.DEVICE),
        (RuntimeError("shapes do not match"), None),
        (ValueError("CUDA error: says the user's input"), None),
        (MemoryError(), None),
    ],
)
def test_what_the_gpu_said(error: Exception, kind: FailureKind | None) -> None:
    assert classify(error) is kind
    wrapped = ValueError("prediction failed")
    wrapped.__cause__ = error
    assert classify(wrapped) is kind
    error.__context__ = wrapped  # a circle
    assert classify(wrapped) is kind


def test_load_failures() -> None:
    assert load_failure(MemoryError()) == Failed(kind=FailureKind.OUT_OF_MEMORY, reason="MemoryError")
    assert load_failure(KeyError("x")) == Failed(kind=FailureKind.ERROR, reason="KeyError: 'x'")
    assert describe(ValueError("one\ntwo")) == "ValueError: one"
