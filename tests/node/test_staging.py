"""The staging ring, with memory of the CPU in the GPU's place and copies that are made as late as they may."""

from __future__ import annotations

import sys
from concurrent import futures
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from late_stream import LateStream

from hotset.node.worker import staging
from hotset.node.worker.context import open_cuda
from hotset.node.worker.staging import Copy, CudaStream, StagingRing, dense, is_gpu, pieces, whole

SMALL = 1024
"""A buffer's bytes, here."""
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.complex64]


def small_ring(stream: LateStream, *, threads: int = 1, buffers: int = 3) -> StagingRing:
    return StagingRing(stream, threads=threads, buffers=buffers, buffer_bytes=SMALL)


def numbers(size: int) -> torch.Tensor:
    return torch.randint(0, 255, (size,), dtype=torch.uint8)


def copies_of(sources: list[torch.Tensor]) -> list[Copy]:
    return [Copy(torch.zeros_like(each), each) for each in sources]


def arrived(copies: list[Copy]) -> bool:
    return all(torch.equal(each.destination, each.source) for each in copies)


sizes = st.lists(st.integers(0, 5 * SMALL), max_size=12)


@given(sizes)
def test_every_byte_goes_through_one_buffer_once_and_none_overlaps(of: list[int]) -> None:
    covered = [0] * len(of)
    groups = list(pieces(of, SMALL))
    for group in groups:
        end = 0
        for piece in group:
            assert piece.begin == covered[piece.copy]  # in order, without a gap
            covered[piece.copy] += piece.size_bytes
            assert piece.offset >= end
            assert piece.offset % 512 == 0
            end = piece.offset + piece.size_bytes
        assert 0 < end <= SMALL
    assert covered == of
    # No more buffers than it takes: each but the last is full, up to where the next piece would be aligned.
    assert all(group[-1].offset + group[-1].size_bytes > SMALL - 512 for group in groups[:-1])


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.integers(1, 3), st.integers(2, 4))
def test_what_arrives_is_what_was_sent_both_ways(
    inwards: list[int], outwards: list[int], threads: int, buffers: int
) -> None:
    stream = LateStream()
    ring = small_ring(stream, threads=threads, buffers=buffers)
    for _ in range(2):  # a ring is used again
        sent = copies_of([numbers(size) for size in inwards])
        kept = [each.source.clone() for each in sent]
        ring.copy_in(sent)
        for each in sent:
            each.source.zero_()  # its owner may do that: it is in the ring
        back = copies_of([numbers(size) for size in outwards])
        ring.copy_out(back)
        assert arrived(back)
        ring.synchronize()
        assert all(torch.equal(each.destination, was) for each, was in zip(sent, kept, strict=True))
    assert stream.unfinished == 0


def test_the_order_of_copies_and_events_is_the_documented_one() -> None:
    """The stream follows the current one, which then follows it; a buffer is used again after its event only."""
    stream = LateStream()
    ring = small_ring(stream, buffers=2)
    sent = copies_of([numbers(3 * SMALL)])
    ring.copy_in(sent)
    assert stream.calls == ["pin 2048", "after current", "copy", "copy", "event 1", "copy", "before current"]
    assert stream.unfinished == 2  # the host has not waited: it has other things to do
    stream.calls.clear()
    ring.synchronize()
    assert arrived(sent)
    ring.copy_out(copies_of([numbers(3 * SMALL)]))
    # Two are on their way before the first is waited for.
    assert stream.calls[:6] == ["synchronize", "after current", "event 2", "copy", "event 3", "copy"]
    assert stream.calls[6:] == ["event 4", "event 4", "copy", "event 5", "event 6"]


def test_memory_is_pinned_once_whatever_is_copied() -> None:
    stream = LateStream()
    ring = small_ring(stream)
    assert ring.pinned_bytes == 3 * SMALL
    for size in (1, SMALL, 20 * SMALL):
        ring.copy_in(copies_of([numbers(size)]))
        ring.copy_out(copies_of([numbers(size)]))
    assert [call for call in stream.calls if call.startswith("pin")] == ["pin 3072"]
    assert ring.pinned_bytes == 3 * SMALL


def test_where_nothing_can_be_pinned_copies_are_made_without_it_and_it_is_said_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stream = LateStream(pins=False)
    ring = small_ring(stream)
    assert ring.pinned_bytes == 0
    for _ in range(2):
        sent, back = copies_of([numbers(3000), numbers(5)]), copies_of([numbers(3000)])
        ring.copy_in(sent)
        ring.synchronize()
        ring.copy_out(back)
        assert arrived(sent)
        assert arrived(back)
    assert [call for call in stream.calls if call.startswith("pin")] == ["pin 3072"]
    assert capsys.readouterr().err.count("pins no host memory") == 1


class Breaks(LateStream):
    """Fails at one of its copies, as a GPU does whose context is gone."""

    at = 2

    def copy(self, destination: Any, source: Any) -> None:
        self.at -= 1
        if not self.at:
            raise RuntimeError("CUDA error: unspecified launch failure")
        super().copy(destination, source)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("way", ["copy_in", "copy_out"])
def test_what_fails_half_way_is_raised_once_and_the_ring_goes_on(way: str, threads: int) -> None:
    stream = Breaks()
    ring = small_ring(stream, threads=threads)
    with pytest.raises(RuntimeError, match="launch failure"):
        getattr(ring, way)(copies_of([numbers(4 * SMALL)]))
    if way == "copy_in":
        assert stream.calls[-1] == "before current"  # what was sent must be over before its memory is another's
    again = copies_of([numbers(7 * SMALL), numbers(3)])
    getattr(ring, way)(again)
    ring.synchronize()
    assert arrived(again)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.booleans()),
        min_size=1,
        max_size=6,
    )
)
def test_bytes_of_a_tensor_are_its_own_only(kinds: list[tuple[torch.dtype, list[int], bool]]) -> None:
    ring = small_ring(LateStream())
    sources = []
    for dtype, shape, turned in kinds:
        room = torch.randint(0, 2, (3, *shape)).to(dtype)
        sources.append(room[1].transpose(0, -1) if turned else room[1])  # a part of more, its axes in any order
    there = [torch.zeros_like(each) for each in sources]
    ring.copy_in([Copy(dense(to), dense(each)) for to, each in zip(there, sources, strict=True)])
    ring.synchronize()
    for to, each in zip(there, sources, strict=True):
        assert torch.equal(to, each)
        assert len(whole(each)) == 3 * len(dense(each))


class RecordingCuda:
    """``torch.cuda`` as far as a ``CudaStream`` calls it; copies are made at once."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.refuses = 0
        self.entered = False

    def init(self) -> None:
        self.calls.append("init")

    def synchronize(self) -> None:
        self.calls.append("synchronize all")

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")

    def Stream(self) -> Any:
        return SimpleNamespace(
            wait_stream=lambda other: self.calls.append(f"side waits for {other.name}"),
            record_event=lambda: self.calls.append("event") or SimpleNamespace(synchronize=lambda: None),
            synchronize=lambda: self.calls.append("synchronize"),
            name="side",
        )

    def current_stream(self) -> Any:
        return SimpleNamespace(
            name="current", wait_stream=lambda other: self.calls.append(f"current waits for {other.name}")
        )

    def stream(self, stream: Any) -> RecordingCuda:
        self.calls.append(f"on {stream.name}")
        return self

    def __enter__(self) -> None:
        self.entered = True

    def __exit__(self, *_: object) -> None:
        self.entered = False

    def cudart(self) -> RecordingCuda:
        return self

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        self.calls.append(f"register {size_bytes}")
        return self.refuses

    def cudaHostUnregister(self, address: int) -> int:
        raise AssertionError("a ring stays pinned")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> RecordingCuda:
    recording = RecordingCuda()
    monkeypatch.setattr(sys.modules["torch"], "cuda", recording)
    staging.process_ring.cache_clear()
    yield recording
    staging.process_ring.cache_clear()


def test_a_gpu_is_opened_ahead_with_its_ring_and_without_memory_of_torchs(
    cuda: RecordingCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "zeros", lambda *size, device: cuda.calls.append(f"zeros {size} on {device}"))
    open_cuda()
    registered = f"register {staging.BUFFERS * staging.BUFFER_BYTES}"
    assert cuda.calls == ["init", "zeros (1,) on cuda", registered, "synchronize all", "empty_cache"]
    assert staging.process_ring().pinned_bytes == staging.BUFFERS * staging.BUFFER_BYTES
    assert cuda.calls[-1] == "empty_cache", "the load finds the ring"


def test_a_ring_has_the_threads_that_torch_has_when_it_copies(
    cuda: RecordingCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be older than the function that sets ``OMP_NUM_THREADS``."""
    pools: list[int] = []
    original = futures.ThreadPoolExecutor

    def recorded(threads: int) -> futures.ThreadPoolExecutor:
        pools.append(threads)
        return original(threads)

    monkeypatch.setattr(futures, "ThreadPoolExecutor", recorded)
    ring = staging.process_ring()
    for threads in (2, 1, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        sent = copies_of([numbers(2 * staging.BUFFER_BYTES)])
        ring.copy_in(sent)
        assert arrived(sent)
    assert pools == [2, staging.MOST_THREADS]


def test_copies_on_cuda_are_asynchronous_and_on_a_stream_of_their_own(
    cuda: RecordingCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    original = torch.Tensor.copy_

    def copy_(tensor: Any, source: Any, non_blocking: bool = False) -> Any:
        asked.append(non_blocking and cuda.entered)
        return original(tensor, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_, raising=False)
    ring = staging.process_ring()
    assert staging.process_ring() is ring
    assert ring.pinned_bytes == staging.BUFFERS * staging.BUFFER_BYTES
    sent = copies_of([numbers(100)])
    ring.copy_in(sent)
    ring.synchronize()
    assert arrived(sent)
    assert asked == [True]
    registered = f"register {ring.pinned_bytes}"
    assert cuda.calls == [
        *(registered, "side waits for current", "on side", "event", "current waits for side", "synchronize")
    ]


def test_a_driver_that_pins_nothing_costs_no_memory(
    cuda: RecordingCuda, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda.refuses = 2
    monkeypatch.setattr(torch, "ones", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("CUDA error")))
    stream = CudaStream()
    assert stream.pinned(4096) is None
    assert StagingRing(stream).pinned_bytes == 0
    assert "pins no host memory" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 0)])
def test_the_gpu_has_several_names(device: Any) -> None:
    assert is_gpu(device)


@pytest.mark.parametrize(
    "device", ["cpu", "cuda:1", 1, None, False, torch.device("cuda", 1), torch.float16, "meta", torch.ones(3)]
)
def test_other_devices_are_none_of_them(device: Any) -> None:
    assert not is_gpu(device)
