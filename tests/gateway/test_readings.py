"""State, traces, explanations, metrics: what people and programs read off a running server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gateway_world import GPU, MIB, World, run, version

from hotset.cli.replay import arrivals_of, read_recording
from hotset.gateway.callers import NOBODY, Caller
from hotset.gateway.metrics import BUCKETS_S, HotsetCollector, exposition
from hotset.gateway.readings import (
    gpu_metrics,
    learned,
    memory_margin,
    prefetches,
    processes,
    smallest_gpu_bytes,
    thrashing,
    waiting,
)
from hotset.gateway.state import TracedModel, TraceHeader, TraceRow, explain, state_of, trace, trace_header
from hotset.simulation.traces import open_trace
from hotset.vocabulary import NORMAL_PRIORITY, Gpu


def test_a_recording_tells_callers_apart_and_so_does_its_replay():
    async def story():
        world = await World().start(version("cat"))
        for caller in (Caller("team-a", 2.0, 3), NOBODY):
            await world.finish(world.control.submit("cat", b"x", caller=caller))
        control = world.control
        lines = b"".join(trace(list(control.records), trace_header(control), control.started_s)).splitlines()
        theirs, nobodys = arrivals_of(read_recording(lines, "live"))
        assert (theirs.caller, theirs.weight, theirs.priority) == ("team-a", 2.0, 3)
        assert (nobodys.caller, nobodys.weight, nobodys.priority) == ("", 1.0, NORMAL_PRIORITY)
        assert b"caller" not in lines[2]

    run(story)


async def busy_world() -> World:
    """Two functions, three calls and one that waits."""
    world = await World().start(version("cat"), version("dog"))
    world.behave("cat@1", memory_bytes=80 * MIB)
    for name in ("cat", "dog", "cat"):
        await world.finish(world.control.submit(name, b"x"))
    world.behave("cat@1", inference_s=5.0)
    world.control.submit("cat", b"runs")
    world.control.submit("dog", b"waits")
    return world


def test_the_state_shows_what_is_in_each_gpus_memory_now():
    async def story():
        control = (await busy_world()).control
        state = state_of(control, processes(control))
        (gpu,) = state.gpus
        assert (gpu.gpu_id, gpu.used_bytes, gpu.running) == (GPU, 180 * MIB, "cat@1")
        assert [(each.model, each.state, each.in_use, each.uses) for each in gpu.residents] == [
            ("dog@1", "hot", False, 1),
            ("cat@1", "hot", True, 3),
        ]
        assert (state.policy, state.eviction, state.waiting, state.requests) == ("lalb_o3", "lru", 1, 3)
        assert (state.hits, state.misses) == (2, 2)
        assert state.hit_ratio == 0.5
        assert {each.name: (each.requests, each.errors, each.waiting) for each in state.functions} == {
            "cat": (2, 0, 0),
            "dog": (1, 0, 1),
        }
        assert state.processes is not None
        assert {each.model for each in state.processes} == {"cat@1", "dog@1"}

    run(story)


def test_a_fresh_server_has_no_hit_ratio():
    async def story():
        state = state_of((await World().start(version("cat"))).control)
        assert state.hit_ratio is None
        assert state.functions[0].mean_latency_s is None
        assert state.processes is None

    run(story)


def test_an_explanation_joins_what_was_decided_and_what_happened():
    async def story():
        control = (await busy_world()).control
        first = explain(control, control.ids.public(1))
        assert first is not None
        assert first.request is not None
        assert first.decisions is not None
        assert (first.request.function, first.request.hit) == ("cat", False)
        assert first.decisions.decisions[0].gpu_id == GPU
        assert explain(control, "1") == first
        running = explain(control, "4")
        assert running is not None
        assert running.request is None
        assert explain(control, "999") is None
        assert explain(control, "nonsense") is None

    run(story)


def test_a_recorded_trace_can_be_replayed(tmp_path):
    async def story():
        control = (await busy_world()).control
        path = tmp_path / "live.ndjson"
        path.write_bytes(b"".join(trace(list(control.records), trace_header(control), control.started_s)))
        header = json.loads(path.read_text().splitlines()[0])
        assert header["models"]["cat"]["memory_bytes"] == 80 * MIB
        assert (header["models"]["cat"]["max_batch"], header["models"]["cat"]["batch_marginal"]) == (1, 1.0)
        assert header["settings"]["o3_limit"] == 25
        assert [each["gpu_id"] for each in header["gpus"]] == [GPU]
        rows = list(open_trace(path).rows())
        assert [each.function for each in rows] == ["cat", "dog", "cat"]
        assert [each.inference_s for each in rows] == [0.01] * 3

    run(story)


def test_whatever_a_recording_says_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "traces.md").read_text()
    for record in (TraceHeader, TracedModel, TraceRow, Gpu):
        for field in record.__struct_fields__:
            assert f"`{field}`" in page, f"{record.__name__}.{field}"


def test_metrics_are_prometheus_text():
    async def story():
        control = (await busy_world()).control
        collector = HotsetCollector(
            list(control.functions.metrics()),
            gpu_metrics(control),
            waiting(control),
            ["gone"],
            prefetches(control),
            thrashing=thrashing(control) is not None,
        )
        body, content_type = exposition(collector)
        lines = body.decode().splitlines()
        assert content_type.startswith("text/plain")
        for line in (
            'hotset_requests_total{code="200",function="cat"} 2.0',
            'hotset_request_seconds_count{function="cat"} 2.0',
            'hotset_request_seconds_bucket{function="cat",le="+Inf"} 2.0',
            'hotset_request_seconds_bucket{function="cat",le="0.001"} 0.0',
            'hotset_hits_total{function="cat"} 2.0',
            'hotset_misses_total{function="dog"} 1.0',
            'hotset_false_misses_total{function="dog"} 0.0',
            'hotset_evictions_total{function="dog"} 0.0',
            'hotset_queue_length{function="dog"} 1.0',
            "hotset_thrashing 0.0",
            f'hotset_gpu_memory_used_bytes{{gpu="{GPU}"}} 1.8874368e+08',
            f'hotset_gpu_up{{gpu="{GPU}"}} 1.0',
            'hotset_gpu_up{gpu="gone"} 0.0',
            'hotset_prefetches_total{outcome="useful"} 0.0',
            'hotset_prefetches_total{outcome="useless"} 0.0',
            f'hotset_gpu_busy_ratio{{gpu="{GPU}"}} 1.0',
        ):
            assert line in lines, line
        assert list(BUCKETS_S) == sorted(BUCKETS_S)

    run(story)


def test_what_was_learned_is_ready_for_the_datastore():
    async def story():
        world = await busy_world()
        profiles = {each.model: each for each in learned(world.control)}
        cat, dog = profiles["cat@1"], profiles["dog@1"]
        assert (cat.gpu_kind, cat.loads, cat.runs, cat.memory_bytes) == ("virtual", 1, 2, 80 * MIB)
        assert cat.load_s == pytest.approx(0.1)
        assert cat.inference_s == pytest.approx(0.01)
        assert dog.memory_bytes is None
        assert smallest_gpu_bytes(world.control) == 320 * MIB

    run(story)


def test_a_model_that_outgrew_every_gpu_has_no_margin():
    async def story():
        world = await World().start(version("cat"))
        world.behave("cat@1", memory_bytes=80 * MIB)
        for _ in range(2):
            await world.finish(world.control.submit("cat", b"x"))
        largest_bytes = world.control.scheduler.cluster.gpus[GPU].memory.capacity_bytes
        world.control.measured(GPU, "cat@1", 2 * largest_bytes)
        assert memory_margin(world.control, "cat@1") == 0

    run(story)
