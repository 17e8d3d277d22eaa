"""``hotset tune`` as its users call it: on a server's calls, on a trace, on the preset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hotset.cli.main import main
from hotset.cli.serve import serve
from hotset.cli.tune import FLAGS, serve_config, serve_flags
from hotset.scheduling.policies.interface import PolicySettings
from hotset.simulation.candidates import SETTINGS, Candidate

QUICK = ("--preset", "paper", "--minutes", "0.5", "--working-set", "30", "--seeds", "2")
MIB = 1 << 20


def tune(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["tune", *map(str, arguments)])


def told(*arguments: str | Path) -> dict[str, Any]:
    result = tune(*arguments, "--json")
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """What ``hotset replay --save`` keeps of a server under lb: five functions in turn where two fit."""
    path = tmp_path / "calls.ndjson"
    names = [f"f{index}" for index in range(5)]
    header = {
        "hotset_trace": 1,
        "recorded_from_unix_s": 0.0,
        "policy": "lb",
        "eviction": "lru",
        "burst_s": 0.002,
        "gpus": [{"gpu_id": f"local/virtual:{index}", "memory_bytes": 250 * MIB} for index in range(2)],
        "models": {
            name: {"memory_bytes": 100 * MIB, "load_s": 1.0, "inference_s": 0.1, "restore_s": 0.1} for name in names
        },
    }
    row = {"inference_s": 0.1, "status": 200, "gpu_id": "local/virtual:0", "duration_s": 0.1, "hit": True}
    rows = [{**row, "arrival_s": index * 0.3, "function": names[index * 3 % 5]} for index in range(200)]
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *rows)))
    return path


def test_a_servers_calls_are_tuned_for_its_own_machine_and_against_its_own_setting(recording: Path) -> None:
    answer = told(recording)

    assert answer["current"] == {
        "policy": "lb",
        "eviction": "lru",
        "overlap": False,
        "prefetch_recurring": False,
        "host_memory_bytes": 0,
    }
    assert answer["change"] is True
    assert answer["choice"] == answer["best"] != answer["current"]
    assert answer["gain_over"] == "later requests"
    assert answer["gain"]["ci95"][0] > 0
    assert answer["complete"] is True
    assert answer["serve_flags"][:2] == ["--policy", answer["choice"]["policy"]]
    first = answer["candidates"][0]
    assert {"requests", "objective", "mean_latency_s", "p99_latency_s", "miss_ratio"} <= set(first)
    assert answer == told(recording)
    documented = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text()
    for key in (*answer, *answer["gain"], *first):
        assert f"`{key}`" in documented


def test_another_machine_another_answer(recording: Path) -> None:
    """With room for every model on every GPU there is little to gain, and nothing that is sure."""
    assert told(recording, "--policy", "lalb_o3")["change"]
    roomy = told(recording, "--policy", "lalb_o3", "--gpus", "3", "--gpu-memory", "1GiB")

    assert roomy["change"] is False
    assert roomy["choice"] == roomy["current"]


def test_the_table_says_what_to_set(recording: Path, tmp_path: Path) -> None:
    text = tune(recording, "--policy", "lalb_o3", "--eviction", "lru", "--save", tmp_path / "tuned.toml").stdout

    assert text.startswith("recorded calls on 2 GPUs with 250 MiB each\n")
    assert "lb + lru *" in text
    assert "of the mean latency saved against lb + lru (95 % between" in text
    assert "\n  hotset serve --policy lalb_o3 --eviction lru" in text
    context = serve.make_context("serve", ["--config", str(tmp_path / "tuned.toml")])
    assert (context.params["policy"], context.params["eviction"]) == ("lalb_o3", "lru")


def test_it_says_stay_where_nothing_is_better_and_where_nothing_is_sure(recording: Path) -> None:
    roomy = ("--gpus", "3", "--gpu-memory", "1GiB", "--current", "lalb_o3+lru", "--policy", "lb", "--eviction", "lru")
    assert "Stay with lalb_o3 + lru" in tune(recording, *roomy).stdout

    unsure = tune(*QUICK, "--seeds", "1", "--current", "lb+lru", "--policy", "lalb").stdout
    assert "Stay with lb + lru. The best was lalb + " in unsure
    assert "one value, so nobody knows" in unsure


def test_the_preset_and_any_trace_are_tuned_like_simulated(tmp_path: Path) -> None:
    answer = told(*QUICK, "--policy", "lalb_o3,lalb", "--eviction", "lru")
    assert (answer["current"]["policy"], answer["current"]["eviction"]) == ("hotset", "hotset")
    assert answer["gain_over"] == "other seeds"
    assert {score["requests"] for score in answer["candidates"]} == {163}

    trace = tmp_path / "trace.csv"
    calls = "".join(f"{index * 0.5},f{index % 4}\n" for index in range(120))
    trace.write_text("# hotset-trace 1\narrival_s,function\n" + calls)
    equal = (
        "--model-memory",
        "100MiB",
        "--load",
        "2s",
        "--inference",
        "300ms",
        "--gpus",
        "2",
        "--gpu-memory",
        "250MiB",
    )
    text = tune(trace, *equal, "--working-set", "4", "--current", "lb+lru").stdout
    assert "on 2 GPUs with 250 MiB each" in text


def test_goodput_and_its_deadline(recording: Path) -> None:
    answer = told(recording, "--objective", "goodput", "--deadline", "1.5s", "--policy", "lalb_o3")
    assert answer["deadline_s"] == 1.5
    assert answer["candidates"][0]["objective"] > answer["candidates"][-1]["objective"]
    assert "in time" in tune(recording, "--objective", "goodput", "--deadline", "1.5s", "--policy", "lalb_o3").stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--deadline", "1s"), "go together"),
        (("--objective", "goodput"), "go together"),
        (("--zipf", "1"), "leave --zipf out"),
        (("--working-set", "3"), "leave --working-set out"),
        (("--policy", "nobody"), "nobody"),
        (("--current", "lb+nobody"), "nobody"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(recording: Path, arguments: tuple[str, ...], sentence: str) -> None:
    result = tune(recording, *arguments)

    assert result.exit_code == 2
    assert sentence in result.stderr


def test_time_that_ran_out_is_said(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotset.simulation.tuning.FIRST_PREFIX", 20)

    assert "Time ran out before the longest comparison" in tune(recording, "--seconds", "0.0001").stdout


def test_tiers_are_tried_as_far_as_there_is_host_memory(recording: Path) -> None:
    """Five models where two fit: what left a GPU comes back from host memory in a tenth of a load."""
    only = ("--policy", "lb", "--eviction", "lru")
    answer = told(recording, *only, "--host-memory", "2GiB")

    tried = {(each["overlap"], each["prefetch_recurring"], each["host_memory_bytes"]) for each in answer["candidates"]}
    lanes = ((False, False), (True, False), (True, True))
    assert tried == {(*each, gib << 30) for each in lanes for gib in (0, 1, 2)}
    assert answer["choice"]["host_memory_bytes"] > 0
    assert "--host-memory" in answer["serve_flags"]
    assert {each["host_memory_bytes"] for each in told(recording, *only)["candidates"]} == {0}
    assert "host 1 GiB" in tune(recording, *only, "--host-memory", "2GiB").stdout


def test_a_recorded_servers_tiers_and_settings_are_what_is_set_now(recording: Path) -> None:
    header, *rows = recording.read_text().splitlines()
    ran = {
        "overlap": True,
        "prefetch_recurring": True,
        "host_memory_bytes": 300 * MIB,
        "policy": "lalb_o3",
        "settings": {"o3_limit": 3},
    }
    recording.write_text("\n".join([json.dumps(json.loads(header) | ran), *rows]))
    answer = told(recording, "--policy", "lb", "--eviction", "lru")

    assert answer["current"] == {
        "policy": "lalb_o3",
        "eviction": "lru",
        "o3_limit": 3,
        "overlap": True,
        "prefetch_recurring": True,
        "host_memory_bytes": 300 * MIB,
    }
    assert {each["host_memory_bytes"] for each in answer["candidates"]} == {0, 150 * MIB, 300 * MIB}


@pytest.mark.parametrize("now_overlaps", [False, True])
def test_whatever_is_tried_can_be_set(now_overlaps: bool, tmp_path: Path) -> None:
    assert set(FLAGS) == set(SETTINGS)
    settings = PolicySettings(o3_limit=5, max_skips=100, max_wait_s=30.0, overrun_s=3.0)
    current = Candidate(policy="lb", eviction="lru", overlap=now_overlaps, host_memory_bytes=5 * MIB)
    best = Candidate(
        policy="hotset",
        eviction="lru",
        settings=settings,
        overlap=not now_overlaps,
        prefetch_recurring=not now_overlaps,
    )
    flags = serve_flags(best, current)

    assert flags[4:12] == ["--o3-limit", "5", "--max-skips", "100", "--max-wait", "30s", "--overrun", "3s"]
    lanes = ["--no-overlap"] if now_overlaps else ["--overlap", "--prefetch-recurring"]
    assert flags[12:] == [*lanes, "--host-memory", "0MiB"]
    file = tmp_path / "hotset.toml"
    file.write_text(serve_config(best, current))
    for arguments in (flags, ["--config", str(file)]):
        params = serve.make_context("serve", list(arguments)).params
        assert (params["o3_limit"], params["max_skips"], params["max_wait"]) == (5, 100, "30s")
        assert params["overrun"] == "3s"
        assert (params["overlap"], params["host_memory"]) == (not now_overlaps, "0MiB")
        assert params["prefetch_recurring"] is not now_overlaps
