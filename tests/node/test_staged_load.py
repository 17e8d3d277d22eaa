"""What a ``load`` moves to the GPU goes through the ring, and is what it would have been.

Memory of the CPU is in the GPU's place, and a tensor is on the GPU if a ``LateStream`` made it. There is no CUDA here,
so that what the ring leaves to torch fails, and is seen.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from late_stream import LateStream
from safetensors.torch import load_file, save_file

from hotset.node.worker import fast_load as fast_load_module
from hotset.node.worker import staged_load as staged_load_module
from hotset.node.worker.fast_load import fast_load
from hotset.node.worker.replaced import replaced
from hotset.node.worker.staged_load import staged_load
from hotset.node.worker.staging import StagingRing

GPU = torch.device("cuda", 0)
UNPATCHED = {name: getattr(torch.Tensor, name) for name in ("to", "cuda", "copy_")}
UNCUDA = (AssertionError, RuntimeError)
"""What a torch without CUDA raises."""


class Net(torch.nn.Module):
    """Tied weights, a buffer, a norm's counter, and something that is no tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(40, 40)
        self.norm = torch.nn.BatchNorm1d(40)
        self.tied = torch.nn.Linear(40, 40)
        self.tied.weight = self.first.weight
        self.register_buffer("nothing", torch.empty(0))


class OnGpu:
    """A ring and how to tell what it brought."""

    def __init__(self) -> None:
        self.stream = LateStream()
        self._ring = StagingRing(self.stream, threads=2, buffers=3, buffer_bytes=1024)

    def ring(self) -> StagingRing:
        return self._ring

    def holds(self, tensor: torch.Tensor) -> bool:
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        return plain and tensor.data_ptr() in self.stream.on_device


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[OnGpu]:
    """Inside, loads are staged."""
    gpu = OnGpu()
    monkeypatch.setattr(staged_load_module, "LEAST_BYTES", 0)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(gpu.holds), raising=False)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: not gpu.holds(tensor)), raising=False)

    def staying(original: Any) -> Any:
        return lambda tensor, *wish, **more: tensor if gpu.holds(tensor) else original(tensor, *wish, **more)

    with contextlib.ExitStack() as stack:
        for name in ("to", "cuda"):
            stack.enter_context(replaced(torch.Tensor, name, staying(getattr(torch.Tensor, name))))
        stack.enter_context(staged_load(gpu.ring))
        yield gpu


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    net = Net()
    net.norm.running_mean.uniform_()
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_file({name: tensor.clone() for name, tensor in net.state_dict().items()}, path)
    torch.save(net.state_dict(), path.with_suffix(".pt"))
    return path


def holds(gpu: OnGpu, state: dict[str, torch.Tensor], path: Path) -> None:
    """It is all there, by now, and right."""
    assert gpu.stream.unfinished == 0
    known = load_file(path)
    assert state.keys() == known.keys()
    for name, tensor in state.items():
        assert gpu.holds(tensor) or not tensor.numel()
        assert torch.equal(tensor, known[name])


@pytest.mark.parametrize("move", [lambda net: net.to("cuda"), lambda net: net.cuda(), lambda net: net.to(device=GPU)])
def test_a_module_is_moved_at_once(gpu: OnGpu, state: Path, move: Any) -> None:
    with fast_load():
        net = Net()
        net.load_state_dict(load_file(state))
        parameters = dict(net.named_parameters())
        assert move(net) is net
    assert dict(net.named_parameters()) == parameters  # the same objects, tied ones too
    assert net.tied.weight is net.first.weight
    holds(gpu, net.state_dict(), state)
    # One turn of the ring: the streams wait for each other once, and the host once for all.
    assert [gpu.stream.calls.count(call) for call in ("after current", "before current", "synchronize")] == [1, 1, 1]


def test_files_are_moved_from_their_pages(gpu: OnGpu, state: Path) -> None:
    with fast_load():
        loaded = load_file(state, device="cuda:0")
        again = torch.load(state.with_suffix(".pt"), map_location="cuda")
    holds(gpu, loaded, state)
    holds(gpu, again, state)
    assert gpu.stream.calls.count("synchronize") == 2  # one a file
    assert again["first.weight"].data_ptr() == again["tied.weight"].data_ptr()


def test_what_was_saved_on_a_gpu_goes_back_to_it_from_the_pages(gpu: OnGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    restore = fast_load_module._to_where_it_was
    pages = torch.arange(5)
    moved = restore(pages.untyped_storage(), "cuda:0")
    assert moved.tolist() == pages.untyped_storage().tolist()
    assert moved.data_ptr() in gpu.stream.on_device
    assert restore(pages.untyped_storage(), "cpu") is None  # torch's own way
    assert restore(pages.untyped_storage(), "cuda:1") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert restore(pages.untyped_storage(), "cuda:0") is None


def test_a_state_on_the_cpu_is_copied_into_a_module_on_the_gpu(gpu: OnGpu, state: Path) -> None:
    net = Net().to("cuda")
    before = net.first.weight.data_ptr()
    gpu.stream.calls.clear()
    net.load_state_dict(load_file(state))
    assert net.first.weight.data_ptr() == before
    assert gpu.stream.calls.count("synchronize") == 1
    holds(gpu, net.state_dict(), state)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
    shape=st.lists(st.integers(1, 12), min_size=0, max_size=3),
    how=st.sampled_from(["plain", "turned", "part", "repeated", "channels last"]),
    to=st.sampled_from([None, torch.float32, torch.float64]),
)
def test_any_tensor_comes_out_as_torch_would_have_it(
    dtype: torch.dtype, shape: list[int], how: str, to: torch.dtype | None
) -> None:
    gpu = OnGpu()
    to = None if dtype.is_complex else to  # which would lose a part
    tensor = torch.randint(0, 2, shape).to(dtype)
    if how == "turned" and shape:
        tensor = tensor.transpose(0, -1)
    elif how == "part":
        tensor = torch.stack([tensor, tensor, tensor], -1)[..., 1]
    elif how == "repeated":
        tensor = tensor.expand(4, *shape)
    elif how == "channels last":
        tensor = torch.randint(0, 2, (2, 3, 4, 5)).to(dtype).to(memory_format=torch.channels_last)
    with staged_load(gpu.ring), mock.patch.object(staged_load_module, "LEAST_BYTES", 0):
        there = tensor.to("cuda", to)
    expected = tensor.to(to or dtype)
    as_a_copy = torch.empty_like(expected)
    assert (there.dtype, there.shape, there.stride()) == (expected.dtype, expected.shape, as_a_copy.stride())
    assert torch.equal(there, expected)
    assert gpu.holds(there)
    assert gpu.stream.unfinished == 0


def test_what_is_small_and_alone_is_left_to_the_driver(gpu: OnGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_load_module, "LEAST_BYTES", 400)
    with pytest.raises(UNCUDA, match="CUDA"):
        torch.ones(99).to("cuda")
    assert gpu.holds(torch.ones(100).to("cuda"))
    assert gpu.holds(torch.nn.Linear(2, 2).to("cuda").bias)  # among others, it would make them wait


def test_whoever_asks_not_to_wait_does_not(gpu: OnGpu) -> None:
    there = torch.ones(8).cuda(non_blocking=True)
    assert gpu.stream.unfinished == 1
    gpu.ring().synchronize()
    assert there.tolist() == [1.0] * 8


def odd(name: str) -> torch.Tensor:
    made = {
        "subclass": torch.ones(3).as_subclass(type("Own", (torch.Tensor,), {})),
        "sparse": torch.eye(3).to_sparse(),
        "conjugated": torch.conj(torch.ones(3, dtype=torch.complex64)),
        "followed by autograd": torch.ones(3, requires_grad=True),
    }
    return made[name]


@pytest.mark.parametrize("name", ["subclass", "sparse", "conjugated", "followed by autograd"])
def test_what_is_more_than_its_bytes_is_left_to_torch(gpu: OnGpu, name: str) -> None:
    tensor = odd(name)
    with pytest.raises(UNCUDA, match="CUDA"):
        tensor.to("cuda")
    assert gpu.stream.calls == ["pin 3072"]


class Mode(torch.overrides.TorchFunctionMode):
    """Answers in torch's place."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function)
        return "mine" if function in (UNPATCHED["to"], UNPATCHED["copy_"]) else function(*args, **(kwargs or {}))


class Own(torch.Tensor):
    """A tensor with a way of its own to the GPU."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return "mine" if function in UNPATCHED.values() else super().__torch_function__(function, types, args, kwargs)


def test_modes_and_tensors_with_ways_of_their_own_are_asked_and_recognise_what_they_are_asked() -> None:
    gpu, mode = OnGpu(), Mode()
    with staged_load(gpu.ring):
        with mode:
            assert torch.ones(3).to("cuda") == "mine"
            assert torch.ones(3).copy_(torch.ones(3)) == "mine"
        own = torch.ones(3).as_subclass(Own)
        assert own.to("cuda") == own.cuda() == torch.zeros(3).copy_(own) == "mine"
        with pytest.raises(UNCUDA, match="CUDA"):  # not: that is nothing which this class can do
            torch.nn.parameter.UninitializedParameter(requires_grad=False).to("cuda")
    assert mode.seen[-1] is UNPATCHED["copy_"]
    assert gpu.stream.calls == ["pin 3072"]


def test_other_wishes_are_left_to_torch(gpu: OnGpu) -> None:
    tensor = torch.ones(3)
    for wish in ({"device": "cuda", "copy": True}, {"device": "cuda:1"}):
        with pytest.raises(UNCUDA, match="CUDA"):
            tensor.to(**wish)
    with pytest.raises(UNCUDA, match="CUDA"):
        tensor.cuda(memory_format=torch.preserve_format)
    assert tensor.to(torch.float64).dtype is torch.float64
    assert tensor.to("cpu") is tensor
    assert tensor.to(torch.ones(2, dtype=torch.int8)).dtype is torch.int8
    assert torch.zeros(3).copy_(tensor).tolist() == [1.0] * 3
    assert torch.zeros(3).copy_(other=tensor, non_blocking=True).tolist() == [1.0] * 3
    assert gpu.stream.calls == ["pin 3072"]


def test_a_copy_that_is_more_than_one_of_bytes_is_left_to_torch(gpu: OnGpu) -> None:
    there = torch.zeros(4, 3).to("cuda")
    gpu.stream.calls.clear()
    there.copy_(torch.ones(4, 3, dtype=torch.float64))
    there.copy_(torch.ones(3))
    there.copy_(torch.ones(3, 4).t())
    there.t().copy_(torch.ones(3, 4))
    assert gpu.stream.calls == []
    there.copy_(torch.full((4, 3), 2.0))
    assert there.eq(2).all()
    assert "copy" in gpu.stream.calls


@pytest.mark.parametrize("made_there", [False, True])
@pytest.mark.parametrize("moved_there", [False, True])
def test_inference_mode_makes_of_tensors_what_it_does(gpu: OnGpu, made_there: bool, moved_there: bool) -> None:
    with torch.inference_mode(made_there):
        tensor = torch.arange(3.0)
        module = torch.nn.Linear(2, 2)
    with torch.inference_mode(moved_there):
        expected, there = tensor.to(torch.float64), tensor.to("cuda")
        module.to("cuda")
    assert gpu.holds(there)
    assert gpu.holds(module.weight)
    assert there.is_inference() is expected.is_inference()
    assert torch.equal(there, tensor)


def test_a_tensor_of_inference_mode_is_filled_only_there(gpu: OnGpu) -> None:
    with torch.inference_mode():
        there = torch.zeros(3).to("cuda")
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        there.copy_(torch.ones(3))
    with torch.inference_mode():
        there.copy_(torch.ones(3))
    assert there.tolist() == [1.0] * 3


def test_a_module_that_changes_its_dtype_does_so_tensor_by_tensor(gpu: OnGpu) -> None:
    net = torch.nn.BatchNorm1d(40).to("cuda", torch.float16)
    assert (net.weight.dtype, net.num_batches_tracked.dtype) == (torch.float16, torch.int64)
    assert all(map(gpu.holds, net.state_dict().values()))
    assert gpu.stream.calls.count("after current") == 5
    assert gpu.stream.calls.count("synchronize") == 1


def test_a_gpu_without_room_is_said_before_anything_is_copied(gpu: OnGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    like, left = gpu.stream.like, [1]

    def full(tensor: torch.Tensor) -> torch.Tensor:
        if not left:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        left.pop()
        return like(tensor)

    monkeypatch.setattr(gpu.stream, "like", full)
    net = torch.nn.Linear(4, 4)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        net.to("cuda")
    assert "copy" not in gpu.stream.calls
    assert not gpu.holds(net.weight)
    monkeypatch.setattr(gpu.stream, "like", like)
    assert gpu.holds(net.to("cuda").weight)


def test_torch_is_as_it_was_afterwards() -> None:
    tensor, module = torch.Tensor, torch.nn.Module
    before = [tensor.to, tensor.cuda, tensor.copy_, module.to, module.cuda, module.load_state_dict, torch.load]
    with staged_load(OnGpu().ring):
        assert tensor.to is not before[0]
    assert before == [tensor.to, tensor.cuda, tensor.copy_, module.to, module.cuda, module.load_state_dict, torch.load]
    assert "to" not in vars(torch.Tensor)


def test_a_load_that_moves_nothing_makes_no_ring() -> None:
    def ring() -> StagingRing:
        raise AssertionError("nobody needs it")

    with staged_load(ring):
        torch.nn.Linear(3, 3).to(torch.float64).to("cpu")


def test_what_fast_loads_replace_outlives_a_staged_load():
    script = """
import torch
from hotset.node.worker.fast_load import fast_load
from hotset.node.worker.staged_load import staged_load
state = torch.nn.Linear(2, 2).state_dict()
with staged_load(), fast_load():
    torch.nn.Linear(2, 2).load_state_dict(state)
with fast_load():
    module = torch.nn.Linear(2, 2)
    module.load_state_dict(state)
print(module.weight.data_ptr() == state["weight"].data_ptr())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
