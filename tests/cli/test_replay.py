"""What ``hotset replay`` makes of a recording of functions that batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from command_line import hotset

from hotset.cli import replay
from hotset.cli.replay import (
    Recording,
    arrivals_of,
    batch_cost,
    batches_of,
    hardware_of,
    load_pace_of,
    measured,
    simulated,
)
from hotset.gateway.state import TracedModel, TraceHeader, TraceRow
from hotset.scheduling.policies.interface import PolicySettings
from hotset.vocabulary import Gpu

MIB = 1 << 20
BASE_S, EACH_S = 0.08, 0.02
"""A run of n calls takes ``BASE_S + n * EACH_S``."""


def recorded(*sizes: int, max_batch: int = 8) -> Recording:
    """Runs of so many calls, each begun as the one before ends; each call came a second before its run."""
    rows, now_s = [], 1.0
    for size in sizes:
        run_s = BASE_S + size * EACH_S
        for number in range(size):
            waited_s = 1.0 - number * 1e-3
            rows.append(
                TraceRow(
                    arrival_s=round(now_s - waited_s, 6),
                    function="f",
                    inference_s=run_s,
                    status=200,
                    gpu_id="local/virtual:0",
                    hit=True,
                    queue_s=round(waited_s, 6),
                    duration_s=waited_s + run_s,
                )
            )
        now_s += run_s
    header = TraceHeader(
        recorded_from_unix_s=0.0,
        policy="lb",
        eviction="lru",
        burst_s=0.0,
        gpus=[Gpu(gpu_id="local/virtual:0", memory_bytes=200 * MIB)],
        models={
            "f": TracedModel(
                memory_bytes=100 * MIB, load_s=0.5, inference_s=0.3, max_batch=max_batch, batch_marginal=0.5
            )
        },
    )
    return Recording(header, sorted(rows, key=lambda row: row.arrival_s))


def test_calls_that_began_together_on_one_gpu_were_one_run() -> None:
    recording = recorded(3, 1, 8)

    assert [len(batch) for batch in batches_of(recording, "f")] == [3, 1, 8]
    assert measured(recording).gpu_utilisation * measured(recording).makespan_s == pytest.approx(
        3 * BASE_S + 12 * EACH_S, rel=0.01
    )


def test_the_cost_of_a_batch_is_the_line_through_the_recorded_runs() -> None:
    cost = batch_cost(recorded(3, 1, 8, 2), "f")

    assert cost is not None
    assert cost.inference_s == pytest.approx(BASE_S + EACH_S)
    assert cost.marginal == pytest.approx(EACH_S / (BASE_S + EACH_S))
    model = hardware_of(recorded(3, 1, 8, 2)).costs["f"]
    assert model.run_s(8) == pytest.approx(BASE_S + 8 * EACH_S)
    assert model.max_batch == 8


def test_runs_of_one_size_tell_no_line_and_what_the_server_had_learned_is_taken() -> None:
    assert batch_cost(recorded(4, 4), "f") is None
    model = hardware_of(recorded(4, 4)).costs["f"]

    assert (model.inference_s, model.batch_marginal) == (0.3, 0.5)


def test_a_replay_joins_waiting_calls_as_the_server_did() -> None:
    """Ten calls at once on one GPU: eight in one run, two in the next."""
    recording = recorded(1, 3)
    rows = [TraceRow(arrival_s=0.0, function="f", inference_s=9.9, status=200, gpu_id="x") for _ in range(11)]
    crowd = Recording(recording.header, rows)
    hardware = hardware_of(recording)
    assert [arrival.inference_s for arrival in arrivals_of(crowd)] == [None] * 11

    metrics = simulated(crowd, hardware, "lb", "lru")

    run_s = hardware.costs["f"].run_s
    assert metrics.makespan_s == pytest.approx(0.5 + run_s(8) + run_s(3))
    assert metrics.miss_ratio == pytest.approx(1 / 11)


def test_a_call_of_a_function_that_does_not_batch_takes_as_long_as_it_did() -> None:
    recording = recorded(1, 1, max_batch=1)

    assert [arrival.inference_s for arrival in arrivals_of(recording)] == [pytest.approx(BASE_S + EACH_S)] * 2
    assert len(batches_of(recording, "f")) == 2


def test_a_call_alone_in_its_run_held_the_gpu_until_its_answer_was_there() -> None:
    """On a busy machine frames wait, too: the model ran for 0.1 s, its GPU was taken for 0.13 s."""
    recording = recorded(1, 2, max_batch=1)
    rows = [msgspec.structs.replace(row, duration_s=row.duration_s + 0.03) for row in recording.rows]

    alone, *joined = (arrival.inference_s for arrival in arrivals_of(Recording(recording.header, rows)))

    assert alone == pytest.approx(0.13)
    assert joined == [BASE_S + 2 * EACH_S] * 2, "what two calls of a burst waited for each other is no one's run"


def test_a_call_that_waited_for_a_gpu_holds_it_from_the_answer_before() -> None:
    """Handing a GPU over takes 4 ms; who waits for half a second beside a free GPU waits for something else."""
    first, second, third = recorded(1, 1, 1, max_batch=1).rows
    second, third = (
        msgspec.structs.replace(row, queue_s=row.queue_s + late_s, duration_s=row.duration_s + late_s)
        for row, late_s in ((second, 0.004), (third, 0.504))
    )
    recording = Recording(recorded(1, max_batch=1).header, [first, second, third])

    taken_s = [arrival.inference_s for arrival in arrivals_of(recording)]

    assert taken_s == [pytest.approx(0.1), pytest.approx(0.104), pytest.approx(0.1)]


def test_a_call_that_found_the_gpu_free_holds_it_only_from_then_on() -> None:
    first, second = recorded(1, 1, max_batch=1).rows
    came_late = msgspec.structs.replace(
        second, arrival_s=first.arrival_s + first.duration_s + 0.001, queue_s=0.002, duration_s=0.102
    )

    *_, taken_s = (
        each.inference_s for each in arrivals_of(Recording(recorded(1, max_batch=1).header, [first, came_late]))
    )

    assert taken_s == pytest.approx(0.1)


def test_loads_take_longer_while_the_machine_was_slow() -> None:
    """Ten loads of 0.2 s, then, while somebody else used the machine, ten of 0.6 s; one by itself tells nothing."""
    times = [*((number * 0.1, 0.2) for number in range(10)), *((10 + number * 0.1, 0.6) for number in range(10))]
    rows = [
        TraceRow(arrival_s=5 + at_s, function="f", inference_s=0.1, status=200, gpu_id="x", load_s=load_s)
        for at_s, load_s in [*times, (30.0, 0.4)]
    ]
    recording = Recording(recorded(1).header, rows)

    pace = load_pace_of(recording)

    assert hardware_of(recording).costs["f"].load_s == pytest.approx(0.4)
    assert [pace(0.5), pace(10.5), pace(30.0)] == [pytest.approx(0.5), pytest.approx(1.5), 1.0]


def test_restores_tell_nothing_of_how_fast_loads_are() -> None:
    rows = [
        TraceRow(arrival_s=at_s, function="f", inference_s=0.1, status=200, gpu_id="x", load_s=load_s, warm=warm)
        for at_s, load_s, warm in (
            *((number * 0.1, 0.2, False) for number in range(5)),
            *((number * 0.1, 0.01, True) for number in range(5)),
            *((10 + number * 0.1, 0.6, False) for number in range(5)),
        )
    ]

    assert load_pace_of(Recording(recorded(1).header, rows))(0.2) == pytest.approx(0.5)


def test_policies_run_with_the_recorded_settings_but_for_those_that_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = recorded(1, 1, 1)
    header = msgspec.structs.replace(recording.header, settings=PolicySettings(max_skips=7, overrun_s=6.0))
    saved = tmp_path / "calls.ndjson"
    saved.write_bytes(b"\n".join(map(msgspec.json.encode, (header, *recording.rows))))
    used: list[PolicySettings] = []
    really: Callable[..., Any] = replay.engine_of

    def spied(*arguments: Any) -> Any:
        used.append(arguments[-1])
        return really(*arguments)

    monkeypatch.setattr(replay, "engine_of", spied)
    for given in ((), ("--o3-limit", "1", "--max-wait", "2s", "--overrun", "3s")):
        result = hotset("replay", str(saved), "--policy", "mqfq_sticky", *given)
        assert result.exit_code == 0, result.output
    assert used == [header.settings, PolicySettings(o3_limit=1, max_skips=7, max_wait_s=2.0, overrun_s=3.0)]
