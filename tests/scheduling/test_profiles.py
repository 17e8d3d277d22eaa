"""Estimates: declared at first, then learned; per model, GPU kind and size of the batch."""

from __future__ import annotations

import pytest
from scheduling_world import World, model

from hotset.scheduling.profiles import DEFAULT_INFERENCE_S, DEFAULT_LOAD_S, Average, BatchLine, Profiles, Typical


def test_what_is_declared_counts_until_something_was_measured():
    profiles = Profiles()
    profiles.add(model("a", load_s=3.0, inference_s=0.5))
    assert profiles.load_s("a", "h100") == 3.0
    assert profiles.inference_s("a", "h100") == 0.5
    profiles.observe_load("a", "h100", 1.0)
    profiles.observe_run("a", "h100", 1, 0.25)
    assert profiles.load_s("a", "h100") == 1.0
    assert profiles.inference_s("a", "h100") == 0.25
    assert profiles.load_s("a", "t4") == 3.0, "another kind of GPU says nothing"


def test_what_nobody_declared_is_guessed_from_other_models():
    profiles = Profiles()
    assert profiles.load_s("a", "h100") == DEFAULT_LOAD_S
    assert profiles.inference_s("a", "h100", 3) == pytest.approx(3 * DEFAULT_INFERENCE_S)
    profiles.observe_load("b", "h100", 7.0)
    profiles.observe_run("b", "h100", 4, 2.0)
    assert profiles.load_s("a", "h100") == 7.0
    assert profiles.inference_s("a", "h100", 3) == pytest.approx(1.5)


def test_a_load_from_host_memory_is_another_one():
    profiles = Profiles()
    profiles.add(model("a", load_s=3.0))
    assert profiles.load_s("a", "h100", near=True) == 3.0, "none was seen yet"
    profiles.observe_load("a", "h100", 0.1, near=True)
    assert (profiles.load_s("a", "h100", near=True), profiles.load_s("a", "h100")) == (0.1, 3.0)
    assert profiles.reload_s("a", "h100") == 0.1
    assert profiles.reload_s("a", "t4") is None
    profiles.remove("a")
    assert profiles.reload_s("a", "h100") is None


def test_an_average_is_exact_at_first_and_follows_later():
    average = Average(None)
    for value in (1.0, 2.0, 6.0):
        average.observe(value)
    assert average.mean == pytest.approx(3.0)
    for _ in range(200):
        average.observe(9.0)
    assert average.mean == pytest.approx(9.0, rel=1e-6)


def test_a_first_load_that_had_to_import_a_framework_is_soon_forgotten():
    profiles = Profiles()
    profiles.observe_load("a", "h100", 2.0)
    assert profiles.load_s("a", "h100") == 2.0
    profiles.observe_load("a", "h100", 0.04)
    assert profiles.load_s("a", "h100") == 0.04
    for seconds in (0.05, 0.06, 3.0):
        profiles.observe_load("a", "h100", seconds)
    assert profiles.load_s("a", "h100") == 0.06, "nor does one slow load among others count"


def test_a_load_that_becomes_slower_is_noticed():
    typical = Typical(None)
    for seconds in (0.1, 0.1, 0.1, 0.1, 0.1, 0.5, 0.5, 0.5):
        typical.observe(seconds)
    assert typical.value == 0.5


def test_a_batch_is_priced_in_proportion_until_two_sizes_were_seen():
    line = BatchLine(None)
    assert line.estimate(4) is None
    line.observe(4, 2.0)
    line.observe(4, 2.0)
    assert line.estimate(4) == 2.0
    assert line.estimate(8) == 4.0


def test_a_batch_is_priced_by_a_line_once_two_sizes_were_seen():
    line = BatchLine(None)
    for _ in range(30):
        for batch in (1, 4, 16):
            line.observe(batch, 0.5 + 0.125 * batch)
    for batch in (1, 2, 8, 32):
        assert line.estimate(batch) == pytest.approx(0.5 + 0.125 * batch)


def test_a_line_follows_a_function_that_became_slower():
    line = BatchLine(1.0)
    for _ in range(20):
        for batch in (1, 8):
            line.observe(batch, 1.0 + batch)
    for _ in range(100):
        for batch in (1, 8):
            line.observe(batch, 2.0 + 3.0 * batch)
    assert line.estimate(4) == pytest.approx(14.0, rel=0.01)


def test_larger_batches_are_never_taken_for_faster():
    line = BatchLine(None)
    for _ in range(5):
        line.observe(1, 2.0)
        line.observe(8, 1.0)
    estimates = [line.estimate(batch) for batch in (1, 8, 64)]
    assert estimates[0] == estimates[1] == estimates[2]


def test_the_scheduler_learns_from_what_the_gpus_report():
    world = World("lb", models=[model("a", load_s=None, inference_s=None, max_batch=2)])
    world.arrive("a")
    world.arrive("a")
    world.loaded("g0", load_s=5.0)
    world.finish("g0", inference_s=3.0)
    cluster = world.scheduler.cluster
    assert cluster.load_s("a", cluster.gpus["g0"]) == 5.0
    assert cluster.inference_s("a", cluster.gpus["g0"], 2) == 3.0


def test_each_kind_of_gpu_has_its_own_figures():
    world = World("lb", gpus=())
    fast, slow = world.join(2.0, kind="fast"), world.join(2.0, kind="slow")
    world.arrive("a")
    world.arrive("a")
    world.loaded(fast, load_s=1.0)
    world.loaded(slow, load_s=8.0)
    cluster = world.scheduler.cluster
    assert cluster.load_s("a", cluster.gpus[fast]) == 1.0
    assert cluster.load_s("a", cluster.gpus[slow]) == 8.0


def test_a_removed_model_leaves_nothing_behind():
    profiles = Profiles()
    profiles.add(model("a", load_s=3.0))
    profiles.observe_load("a", "h100", 1.0)
    profiles.observe_run("a", "h100", 1, 1.0)
    profiles.remove("a")
    assert (profiles._loads, profiles._runs, profiles._models) == ({}, {}, {})


def test_a_restore_is_learned_of_a_model_that_nobody_added():
    profiles = Profiles()
    profiles.observe_restore("a", "h100", 0.5, 100)
    assert profiles.restore_s("a", "h100") == 0.5


def test_what_is_expected_of_runs_lies_within_what_was_declared_and_seen():
    profiles = Profiles()
    assert profiles.shortest_each_s == float("inf")
    profiles.add(model("a", inference_s=1.0))
    profiles.add(model("b", inference_s=None, max_batch=4))
    assert profiles.shortest_each_s == pytest.approx(1.0)
    profiles.observe_run("b", "h100", 2, 2.0)
    assert profiles.shortest_each_s == pytest.approx(0.5), "four might have shared it"
    profiles.observe_run("b", "h100", 1, 8.0)
    profiles.observe_run("gone", "h100", 1, 0.125)
    assert profiles.shortest_each_s == pytest.approx(0.125)
    assert profiles.shortest_each_s <= 0.125
    assert profiles.longest_run_s >= 8.0
