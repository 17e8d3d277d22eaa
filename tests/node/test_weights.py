"""The copies that park a CUDA model and bring it back, with tensors on the CPU in their place."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from late_stream import LateStream

from hotset.node.worker import residency
from hotset.node.worker.memory import reachable
from hotset.node.worker.residency import CannotPark, Residency, Weights
from hotset.node.worker.slab import Slab
from hotset.node.worker.staging import StagingRing


class Holder:
    """Weights as functions hold them: tied, viewed, of every kind, in modules and beside them."""

    def __init__(self) -> None:
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 16))
        self.net[2].weight = self.net[0].weight
        self.half = torch.randn(7, 3).half()
        self.row = self.half[2]
        self.turned = torch.arange(12).view(3, 4).t()
        self.nothing = torch.empty(0)

    def tensors(self) -> list[torch.Tensor]:
        return list(reachable(self).tensors)


@contextlib.contextmanager
def parked(tensors: list[torch.Tensor]) -> Iterator[Weights]:
    """Inside, the weights are in a slab; afterwards they are back."""
    weights = Weights(tensors)
    slab = Slab(weights.size_bytes, pinned=False)
    ring = StagingRing(LateStream(), threads=2, buffers=3, buffer_bytes=1024)
    try:
        weights.leave(slab.tensor, ring)
        yield weights
        weights.come_back(slab.tensor, ring)
    finally:
        slab.close()


def test_the_very_same_values_come_back_into_the_very_same_tensors() -> None:
    holder = Holder()
    before = [each.clone() for each in holder.tensors()]
    given_objects = [id(each) for each in holder.tensors()]
    words = torch.randn(4, 16)
    answer = holder.net.eval()(words)
    with parked(holder.tensors()):
        assert sum(each.untyped_storage().nbytes() for each in holder.tensors()) == 0
    assert [id(each) for each in holder.tensors()] == given_objects
    for one, other in zip(holder.tensors(), before, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(one, other)
    assert torch.equal(holder.net(words), answer)
    assert holder.turned.stride() == (1, 4)


def test_what_shared_memory_shares_it_again() -> None:
    holder = Holder()
    storages = {each.untyped_storage().data_ptr() for each in holder.tensors() if each.numel()}
    with parked(holder.tensors()) as weights:
        assert len(weights._storages) == len(storages)
    assert holder.net[2].weight is holder.net[0].weight
    assert holder.row.data_ptr() == holder.half[2].data_ptr()
    holder.half.fill_(1)
    assert holder.row.eq(1).all()


def test_gradients_and_flags_are_left_alone() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    with parked([parameter, frozen]):
        pass
    assert (parameter.requires_grad, frozen.requires_grad) == (True, False)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([torch.float32, torch.int8, torch.float64, torch.bool]), st.integers(0, 2000)),
        min_size=1,
        max_size=8,
    )
)
def test_any_sizes_fit_the_slab_without_overlap(kinds: list[tuple[torch.dtype, int]]) -> None:
    tensors = [torch.randint(0, 2, (size,)).to(dtype) for dtype, size in kinds]
    before = [each.clone() for each in tensors]
    weights = Weights(tensors)
    assert weights.size_bytes % 512 == 0
    if not weights.size_bytes:
        return
    with parked(tensors):
        pass
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to give them up
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 3, torch.qint8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.ones(3).as_subclass(type("Own", (torch.Tensor,), {})),
        quantised,
        lambda: torch.conj(torch.ones(3, dtype=torch.complex64)),
        lambda: torch.conj(torch.ones(3, dtype=torch.complex64)).imag,
    ],
    ids=["sparse", "subclass", "quantised", "conjugated", "negated"],
)
def test_what_is_more_than_plain_memory_is_not_parked(make: Callable[[], torch.Tensor]) -> None:
    """Their memory alone would come back as other numbers."""
    with pytest.raises(CannotPark):
        Weights([make()])


def test_memory_that_two_storages_claim_is_not_parked() -> None:
    numbers = numpy.ones(8, numpy.float32)
    with pytest.raises(CannotPark, match="the same memory"):
        Weights([torch.from_numpy(numbers), torch.from_numpy(numbers[:4])])


def test_what_predict_made_in_inference_mode_can_still_be_changed_there() -> None:
    """A cache that is written in place: torch lets nobody do that to an inference tensor that is none any more."""
    with torch.inference_mode():
        cache = torch.ones(4, 4)
        row = cache[1]
    with parked([cache, row]):
        pass
    assert (cache.is_inference(), row.is_inference()) == (True, True)
    with torch.inference_mode():
        cache.add_(1)
    assert row.tolist() == [2.0] * 4


class FakeCuda:
    """``torch.cuda`` as far as parking calls it."""

    class CUDAGraph:
        """A captured graph."""

    def __init__(self, refuses: int = 0) -> None:
        self.calls: list[str] = []
        self.refuses = refuses

    def cudart(self) -> FakeCuda:
        return self

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        self.calls.append("register")
        return self.refuses

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append("unregister")
        return 0

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def is_initialized(self) -> bool:
        return True

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")

    def memory_reserved(self) -> int:
        return 7


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(sys.modules["torch"], "cuda", fake)
    return fake


def test_a_slab_is_pinned_where_the_driver_agrees_and_released_once(cuda: FakeCuda) -> None:
    slab = Slab(4096, pinned=True)
    assert slab.pinned
    slab.close()
    assert cuda.calls == ["register", "unregister"]


def flags_of(address: int) -> list[str]:
    """What the kernel notes of the mapping that holds this address (``VmFlags`` in proc(5))."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


def test_a_slab_is_private_and_not_handed_down_to_children() -> None:
    slab = Slab(4 << 20, pinned=False)
    flags = flags_of(slab.tensor.data_ptr())
    assert "dc" in flags  # do not copy area on fork
    assert "sh" not in flags
    slab.close()


def test_what_the_driver_refused_is_not_blamed_on_the_next_kernel(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``cudaHostRegister`` leaves its error behind, and whatever launches a kernel next is told of it, once."""
    cuda.refuses = 2

    def ones(size: int, device: str) -> None:
        cuda.calls.append("kernel")
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "ones", ones)
    slab = Slab(4096, pinned=True)
    assert not slab.pinned
    slab.close()
    assert cuda.calls == ["register", "kernel"]


def test_a_cuda_model_is_parked_and_comes_back(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    stream = LateStream()
    stream.calls = cuda.calls
    monkeypatch.setattr(residency, "process_ring", functools.cache(lambda: StagingRing(stream, buffer_bytes=4096)))
    holder = Holder()
    before = [each.clone() for each in holder.tensors()]
    slab_bytes = Weights(holder.tensors()).size_bytes
    model = Residency(holder, "cuda:0", memory_bytes=99)
    away = model.offload()
    # What its process holds of the host: the slab, and the ring, which stays.
    assert (away.device_bytes, away.host_bytes) == (7, slab_bytes + 8 * 4096)
    # All that ran is over before the copies begin, and they are done before the memory goes back.
    assert cuda.calls[:3] == ["synchronize", "pin 32768", "after current"]
    assert cuda.calls[-1] == "empty_cache"
    assert stream.unfinished == 0
    assert sum(each.untyped_storage().nbytes() for each in holder.tensors()) == 0
    back = model.restore()
    assert (back.device_bytes, back.host_bytes) == (7, 0)
    assert all(torch.equal(one, other) for one, other in zip(holder.tensors(), before, strict=True))
    for _ in range(3):
        model.offload()
        model.restore()
    assert [call for call in cuda.calls if "pin" in call or "register" in call] == ["pin 32768"]
    assert all(torch.equal(one, other) for one, other in zip(holder.tensors(), before, strict=True))


def test_a_captured_graph_wherever_it_is_kept_forbids_parking(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    graph = cuda.CUDAGraph()
    kept_in_a_closure = SimpleNamespace(replay=lambda: graph, net=Holder())
    with pytest.raises(CannotPark, match="CUDA graphs remember"):
        Residency(kept_in_a_closure, "cuda:0", memory_bytes=99).offload()
    assert cuda.calls == []


def test_a_model_whose_tensors_are_empty_cannot_be_parked(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    with pytest.raises(CannotPark, match="are empty"):
        Residency(SimpleNamespace(nothing=torch.empty(0)), "cuda:0", memory_bytes=99).offload()


def test_a_model_without_tensors_on_the_gpu_cannot_be_parked(cuda: FakeCuda) -> None:
    with pytest.raises(CannotPark, match="give its class offload and restore"):
        residency.Residency(SimpleNamespace(words=["a"]), "cuda:0", 1).offload()
