"""Fast loads are compared with ordinary ones once a version is deployed, and not used where they come out otherwise."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hotset.gateway.load_checks import check_load
from hotset.node.spawner import child_environment
from hotset.node.worker.check import compare

HEAD = """
import os
import torch
from safetensors.torch import load_file
import hotset

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(4, 4)
        self.more = torch.nn.Linear(4, 4)

@hotset.function(gpu_memory="1MiB")
class Model:
    def load(self, device: str) -> None:
"""
TAIL = """
    def predict(self, value: int) -> int:
        return value
"""
LOADS = "        self.net = Net()\n        self.net.load_state_dict(load_file('net.safetensors'))\n"
MANY = 1 << 30


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    state = {
        f"{part}.{kind}": torch.randn(shape)
        for part in ("body", "more")
        for kind, shape in (("weight", (4, 4)), ("bias", (4,)))
    }
    save_file(state, tmp_path / "net.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "checked_model", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def checked(folder: Path, load: str, most_bytes: int = MANY) -> tuple[bool, str]:
    (folder / "checked_model.py").write_text(HEAD + load + TAIL)
    found = compare(str(folder), "checked_model:Model", most_bytes).check
    return found.fast, found.text


def test_a_load_that_comes_out_the_same(folder: Path) -> None:
    assert checked(folder, LOADS) == (True, "equal to the ordinary load, bit by bit")


def test_a_load_that_leaves_parameters_as_they_were_initialised(folder: Path) -> None:
    fast, text = checked(folder, LOADS + "        self.head = torch.nn.Linear(2, 2)\n")
    assert (fast, text) == (False, "not used: 2 parameters are initialised by the function and not loaded")


def test_a_load_that_counts_on_the_random_numbers_of_an_initialisation(folder: Path) -> None:
    fast, text = checked(folder, LOADS + "        self.noise = torch.randn(3)\n")
    assert (fast, text) == (False, "not used: a tensor of (3,) differs from the ordinary load's")


def test_a_load_that_looks_at_weights_before_they_are_loaded(folder: Path) -> None:
    """A view made before the state is bound keeps the old memory."""
    load = "        self.net = Net()\n        self.row = self.net.body.weight.data[0]\n" + LOADS.partition("\n")[2]
    fast, text = checked(folder, load)
    assert (fast, text) == (False, "not used: a tensor of (4,) differs from the ordinary load's")


def test_what_cannot_be_compared_is_said(folder: Path) -> None:
    assert checked(folder, "        self.words = ['a']\n") == (True, "not checked: the object holds no tensors")
    fast, text = checked(folder, LOADS, most_bytes=1)
    assert fast
    assert text.startswith("not checked: an ordinary load beside it would take ")
    fast, text = checked(folder, "        raise RuntimeError('needs a GPU')\n")
    assert (fast, text) == (
        True,
        "not checked: load does not run on this machine's CPU (RuntimeError: needs a GPU)",
    )


def test_it_runs_in_a_process_of_its_own_and_is_bounded(folder: Path) -> None:
    (folder / "other_model.py").write_text(HEAD + LOADS.replace("'net.", f"'{folder}/net.") + TAIL)
    env = child_environment({})

    async def story() -> None:
        found = await check_load(sys.executable, folder, "other_model:Model", env, 60.0)
        assert (found.fast, found.text) == (True, "equal to the ordinary load, bit by bit")
        found = await check_load(sys.executable, folder, "other_model:Model", env, 0.05)
        assert (found.fast, found.text) == (True, "not checked: it took longer than 0.05 s")
        (folder / "dies.py").write_text("import os\nos._exit(1)\n")
        found = await check_load(sys.executable, folder, "dies:Model", env, 60.0)
        assert (found.fast, found.text) == (
            True,
            "not checked: the process that loaded it both ways did not survive",
        )

    asyncio.run(story())
