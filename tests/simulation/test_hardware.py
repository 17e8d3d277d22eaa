"""Simulated clusters and what loads and runs cost on them."""

from __future__ import annotations

import pytest

from hotset.errors import ConfigurationError
from hotset.simulation.hardware import (
    MIB,
    PAPER_GPU_MEMORY_BYTES,
    PAPER_MODELS,
    Hardware,
    ModelCost,
    bandwidth_costs,
    make_gpus,
    paper_costs,
    scaled,
)
from hotset.simulation.workloads import function_names


def test_the_papers_table_has_its_22_models_all_of_which_fit():
    assert len(PAPER_MODELS) == 22
    assert PAPER_MODELS["resnet50"] == ModelCost(memory_bytes=1701 * MIB, load_s=2.67, inference_s=1.28)
    assert all(cost.memory_bytes <= PAPER_GPU_MEMORY_BYTES for cost in PAPER_MODELS.values())
    assert all(2.3 <= cost.load_s <= 4.5 for cost in PAPER_MODELS.values())


def test_functions_take_every_architecture_before_any_repeats():
    names = function_names(35)
    costs = paper_costs(names, seed=3)
    assert set(map(id, (costs[name] for name in names[:22]))) == set(map(id, PAPER_MODELS.values()))
    assert costs[names[22]] is costs[names[0]]


def test_the_seed_decides_which_function_has_which():
    names = function_names(22)
    assert paper_costs(names, 1) == paper_costs(names, 1)
    assert paper_costs(names, 1) != paper_costs(names, 2)


def test_loads_can_be_made_cheaper():
    names = function_names(3)
    cheap, dear = paper_costs(names, 1, load_scale=0.5), paper_costs(names, 1)
    assert [cheap[name].load_s for name in names] == [dear[name].load_s / 2 for name in names]
    assert [cheap[name].inference_s for name in names] == [dear[name].inference_s for name in names]
    cost = PAPER_MODELS["vgg19"]
    assert scaled(cost, 1.0) is cost


def test_a_load_is_a_fixed_part_and_a_copy():
    costs = bandwidth_costs(
        ["a", "b"], memory_bytes=1000, inference_s=0.1, fixed_s=2.0, bandwidth_bytes_per_s=500.0, load_scale=0.5
    )
    assert costs["a"] == ModelCost(memory_bytes=1000, load_s=2.0, inference_s=0.1)
    assert list(costs) == ["a", "b"]


def test_a_batch_costs_its_marginal_share():
    cost = ModelCost(memory_bytes=1, load_s=1.0, inference_s=2.0, batch_marginal=0.25)
    assert [cost.run_s(batch) for batch in (1, 2, 5)] == [2.0, 2.5, 4.0]


def test_gpus_are_named_and_equal():
    gpus = make_gpus(2, 100)
    assert [(gpu.gpu_id, gpu.memory_bytes, gpu.kind) for gpu in gpus] == [
        ("sim/gpu:0", 100, "sim"),
        ("sim/gpu:1", 100, "sim"),
    ]


@pytest.mark.parametrize(("count", "memory_bytes"), [(0, 1), (1, 0)])
def test_a_cluster_of_nothing_is_refused(count: int, memory_bytes: int):
    with pytest.raises(ConfigurationError, match="at least one GPU with some memory"):
        make_gpus(count, memory_bytes)


def test_the_scheduler_is_told_the_true_figures():
    cost = ModelCost(memory_bytes=7, load_s=3.0, inference_s=0.5)
    (model,) = Hardware(gpus=make_gpus(1, 10), costs={"a": cost}).models()
    assert (model.name, model.memory_bytes) == ("a", 7)
    assert (model.profile.load_s, model.profile.inference_s) == (3.0, 0.5)
