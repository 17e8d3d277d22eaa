"""Fast loads give the very model that an ordinary load gives, or say that they cannot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hotset.node.worker.fast_load import Incomplete, fast_load


class Net(torch.nn.Module):
    """Linear, convolution, norm with buffers, embedding: initialised in four ways."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(10, 8)
        self.body = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
        self.conv = torch.nn.Conv1d(1, 4, 3)
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(self.body(self.words(words)).mean(1, keepdim=True)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    net = Net()
    net.norm.running_mean.uniform_()
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_file(net.state_dict(), path)
    return path


def loaded(weights: Path) -> Net:
    net = Net()
    net.load_state_dict(load_file(weights))
    return net.eval()


def test_the_outputs_are_those_of_an_ordinary_load(weights: Path) -> None:
    ordinary = loaded(weights)
    with fast_load():
        fast = loaded(weights)
    words = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.inference_mode():
        assert torch.equal(fast(words), ordinary(words))
    assert fast.state_dict().keys() == ordinary.state_dict().keys()
    assert all(torch.equal(value, fast.state_dict()[name]) for name, value in ordinary.state_dict().items())


def test_nothing_is_initialised_and_nothing_is_copied(weights: Path) -> None:
    state = load_file(weights)
    with fast_load():
        before = torch.get_rng_state()
        net = Net()
        assert torch.equal(torch.get_rng_state()[:16], before[:16])
        net.load_state_dict(state)
    assert net.words.weight.data_ptr() == state["words.weight"].data_ptr()


def test_torch_does_what_it_ever_did_afterwards(weights: Path) -> None:
    with fast_load():
        skipped = Net()
        skipped.load_state_dict(load_file(weights))
    with pytest.raises(ValueError, match="the function's own"), fast_load():
        raise ValueError("the function's own")
    torch.manual_seed(7)
    first = Net()
    torch.manual_seed(7)
    second = Net()
    assert torch.equal(first.words.weight, second.words.weight)
    assert first.words.weight.std() > 0.5  # initialised
    state = load_file(weights)
    address = first.words.weight.data_ptr()
    first.load_state_dict(state)
    assert first.words.weight.data_ptr() == address  # copied
    assert first.to("cpu", torch.float64) is first
    assert first.words.weight.dtype == torch.float64


def test_a_parameter_that_keeps_its_initial_value_is_noticed(weights: Path) -> None:
    state = load_file(weights)
    del state["body.0.bias"]
    net = Net.__new__(Net)

    def load() -> None:
        net.__init__()  # type: ignore[misc]
        net.load_state_dict(state, strict=False)

    with pytest.raises(Incomplete, match="1 parameters are initialised"), fast_load():
        load()


def test_a_head_that_is_not_in_the_file_is_noticed(weights: Path) -> None:
    kept: list[torch.nn.Module] = []

    def load() -> None:
        kept.extend((loaded(weights), torch.nn.Linear(3, 3)))

    with pytest.raises(Incomplete, match="2 parameters"), fast_load():
        load()


def test_modules_that_are_thrown_away_need_no_values(weights: Path) -> None:
    with fast_load():
        torch.nn.Linear(3, 3)
        loaded(weights)


def test_what_is_no_parameter_is_initialised_as_ever() -> None:
    with fast_load():
        assert torch.nn.init.ones_(torch.zeros(3)).sum() == 3


def test_another_dtype_is_copied_as_the_module_wants_it(weights: Path) -> None:
    state = {name: value.half() if value.is_floating_point() else value for name, value in load_file(weights).items()}
    with fast_load():
        net = Net()
        net.load_state_dict(state)
    assert net.words.weight.dtype is torch.float32
    assert torch.equal(net.words.weight, state["words.weight"].float())


def test_a_state_that_does_not_fit_is_the_functions_error(weights: Path) -> None:
    with pytest.raises(RuntimeError, match="size mismatch"), fast_load():
        torch.nn.Embedding(3, 3).load_state_dict({"weight": torch.zeros(2, 2)})


def test_tied_weights_stay_equal() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = torch.nn.Embedding(5, 4)
            self.head = torch.nn.Linear(4, 5, bias=False)
            self.head.weight = self.words.weight

    torch.manual_seed(1)
    state = Tied().state_dict()
    with fast_load():
        net = Tied()
        net.load_state_dict(state)
    assert torch.equal(net.head.weight, net.words.weight)
    assert torch.equal(net.words.weight, state["words.weight"])


class Layers(torch.nn.Module):
    """Layers that are alike, and some that nearly are."""

    def __init__(self) -> None:
        super().__init__()
        self.same = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0) for _ in range(3)
        )
        self.nearly = torch.nn.ModuleList(
            [
                torch.nn.Linear(8, 8),
                torch.nn.Linear(8, 8, bias=False),
                torch.nn.Linear(8, 8, dtype=torch.float64),
                torch.nn.BatchNorm1d(8),
                torch.nn.BatchNorm1d(8),
                torch.nn.BatchNorm1d(8, affine=False),
                torch.nn.LSTM(8, 8),
                torch.nn.LSTM(8, 8),
            ]
        )


def names_and_values(module: torch.nn.Module) -> list[tuple[object, ...]]:
    """All that a module is, in order, but for its parameters' values."""
    return [
        (name, type(part), part.extra_repr(), sorted(vars(part)), list(part._parameters), list(part._buffers))
        for name, part in module.named_modules()
    ]


def test_copied_layers_are_what_built_ones_are() -> None:
    torch.manual_seed(3)
    ordinary = Layers()
    state = ordinary.state_dict()
    with fast_load():
        fast = Layers()
        assert names_and_values(fast) == names_and_values(ordinary)
        parameters = list(fast.parameters())
        assert len({id(each) for each in parameters}) == len({each.data_ptr() for each in parameters})
        fast.load_state_dict(state)
    for one, other in zip(ordinary.parameters(), fast.parameters(), strict=True):
        assert (one.dtype, one.requires_grad) == (other.dtype, other.requires_grad)
        assert torch.equal(one, other)
    words = torch.randn(1, 4, 8)
    with torch.inference_mode():
        for one, other in zip(ordinary.eval().same, fast.eval().same, strict=True):
            assert torch.equal(one(words), other(words))
        assert torch.equal(ordinary.nearly[6](words)[0], fast.nearly[6](words)[0])
    fast.same[0].linear1.weight.data.zero_()
    assert fast.same[1].linear1.weight.any()


def test_layers_are_built_as_ever_where_building_means_more() -> None:
    with fast_load():
        first = torch.nn.Linear(3, 3)
        with torch.device("meta"):
            assert torch.nn.Linear(3, 3).weight.is_meta
        hook = torch.nn.modules.module.register_module_parameter_registration_hook(
            lambda module, name, parameter: torch.nn.Parameter(torch.ones_like(parameter))
        )
        try:
            assert torch.equal(torch.nn.Linear(3, 3).weight, torch.ones(3, 3))
        finally:
            hook.remove()
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.nn.Linear(3, 3).weight.dtype is torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
        del first


def test_a_state_in_parts_is_bound_part_by_part(weights: Path) -> None:
    state = load_file(weights)
    head = {name: state.pop(name) for name in list(state) if name.startswith("conv")}
    ordinary = Net().load_state_dict(state, strict=False)
    with fast_load():
        net = Net()
        fast = net.load_state_dict(state, strict=False)
        net.load_state_dict(head, strict=False)
    assert (fast.missing_keys, fast.unexpected_keys) == (ordinary.missing_keys, [])
    assert net.conv.weight.data_ptr() == head["conv.weight"].data_ptr()
    assert net.words.weight.data_ptr() == state["words.weight"].data_ptr()


def test_a_module_with_its_own_way_of_loading_is_asked() -> None:
    class Doubled(torch.nn.Linear):
        def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *rest: object) -> None:
            state_dict[f"{prefix}weight"] = 2 * state_dict[f"{prefix}weight"]
            super()._load_from_state_dict(state_dict, prefix, *rest)

    with fast_load():
        net = torch.nn.Sequential(Doubled(2, 2, bias=False))
        net.load_state_dict({"0.weight": torch.ones(2, 2)})
    assert torch.equal(net[0].weight, torch.full((2, 2), 2.0))


def test_only_what_is_on_the_cpu_already_stays_as_it_is(weights: Path) -> None:
    moved: list[torch.nn.Module] = []

    class OwnWay(torch.nn.Module):
        def _apply(self, *args: Any, **kwargs: Any) -> Any:
            moved.append(self)
            return super()._apply(*args, **kwargs)

    with fast_load():
        net = loaded(weights)
        before = {name: each.data_ptr() for name, each in net.state_dict().items()}
        assert net.to("cpu") is net
        assert net.to(torch.device("cpu")) is net
        assert {name: each.data_ptr() for name, each in net.state_dict().items()} == before
        assert net.to(torch.float64).norm.running_mean.dtype == torch.float64
        assert net.to("cpu", torch.float32).words.weight.dtype == torch.float32
        assert net.to("meta").words.weight.is_meta
        with pytest.raises(NotImplementedError, match="meta"):
            net.to("cpu")
        assert not moved
        own = OwnWay()
        torch.nn.Sequential(own).to("cpu")
        assert moved == [own]


def test_a_pt_file_is_mapped(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save(load_file(weights), path)
    with fast_load():
        net = Net()
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        mapped = Path("/proc/self/maps").read_text()
        old = tmp_path / "old.pt"
        torch.save({"a": torch.ones(2)}, old, _use_new_zipfile_serialization=False)
        assert torch.equal(torch.load(old)["a"], torch.ones(2))
    assert str(path) in mapped
    assert torch.equal(net.words.weight, load_file(weights)["words.weight"])


def test_without_torch_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with fast_load():
        pass
