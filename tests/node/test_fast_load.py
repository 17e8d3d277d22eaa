"""Fast loads give the very model that an ordinary load gives, or say that they cannot."""

from __future__ import annotations

import sys
from pathlib import Path

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


def test_torch_is_as_it_was_afterwards() -> None:
    init, load = torch.nn.init.kaiming_uniform_, torch.nn.Module.load_state_dict
    with fast_load():
        assert torch.nn.init.kaiming_uniform_ is not init
    assert torch.nn.init.kaiming_uniform_ is init
    assert torch.nn.Module.load_state_dict is load
    with pytest.raises(ValueError, match="the function's own"), fast_load():
        raise ValueError("the function's own")
    assert torch.nn.init.kaiming_uniform_ is init


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


def test_without_torch_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with fast_load():
        pass
