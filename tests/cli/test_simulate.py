"""``hotset``, ``hotset simulate`` and ``hotset paper`` as a person or a script uses them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hotset.cli import output
from hotset.cli.main import COMMANDS, main
from hotset.cli.output import Table, progress, show_table, write_json
from hotset.cli.simulate import read_models
from hotset.errors import TraceError
from hotset.simulation import evaluation as paper
from hotset.simulation import evaluation_report, report
from hotset.simulation.presets import PRESETS, Preset

DATA = Path(__file__).parents[1] / "data" / "traces"
QUICK = ["--minutes", "0.5", "--seeds", "1", "--working-set", "15"]


def hotset(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def simulate(*arguments: str | Path) -> list[dict[str, Any]]:
    """The runs of ``hotset simulate --json -``."""
    result = hotset("simulate", "--json", "-", *arguments)
    assert result.exit_code == 0, result.output
    return list(json.loads(result.stdout)["runs"])


def refused(*arguments: str | Path) -> str:
    """What ``hotset simulate`` says to options that cannot be honoured."""
    result = hotset("simulate", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr.strip()


def test_help_lists_every_command_without_importing_any() -> None:
    check = (
        "import sys; from click.testing import CliRunner; from hotset.cli.main import main;"
        "print(CliRunner().invoke(main, ['--help']).output);"
        "print(sorted(name for name in sys.modules if name.startswith('hotset.') or name in ('numpy', 'rich')))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)

    for name, command in COMMANDS.items():
        assert f"  {name}" in done.stdout
        assert command.summary in done.stdout
    assert done.stdout.splitlines()[-1] == "['hotset.cli', 'hotset.cli.main', 'hotset.errors']"


def test_the_version_is_told_and_an_unknown_command_is_refused() -> None:
    assert hotset("--version").output.startswith("hotset 0.")
    assert hotset("simulation").exit_code == 2


def test_the_json_has_the_keys_that_the_documentation_promises() -> None:
    (run,) = simulate("--policy", "lalb_o3", *QUICK)

    assert {
        "policy", "eviction", "working_set", "seeds", "mean_latency_s", "p50_latency_s", "p95_latency_s",
        "p99_latency_s", "latency_variance", "miss_ratio", "false_miss_ratio", "gpu_utilisation", "top_model_copies",
        "requests", "ideal_mean_latency_s", "vs_lb",
    } <= set(run)  # fmt: skip
    assert {"latency_reduction", "miss_reduction", "speedup"} <= set(run["vs_lb"])
    assert (run["policy"], run["eviction"], run["working_set"], run["seeds"]) == ("lalb_o3", "lru", 15, 1)
    assert (run["requests"], run["o3_limit"], run["load_scale"]) == (163, 25, 1.0)
    documented = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text()
    for key in run:
        assert f"`{key}`" in documented


def test_two_calls_write_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    for path in (first, second):
        assert hotset("simulate", *QUICK, "--json", path).exit_code == 0

    assert first.read_bytes() == second.read_bytes()
    assert first.read_text() != hotset("simulate", *QUICK, "--first-seed", "1", "--json", "-").stdout


def test_the_default_is_the_papers_evaluation() -> None:
    runs = simulate("--seeds", "1", "--no-baseline", "--minutes", "0.2")

    assert [(run["working_set"], run["policy"]) for run in runs] == [
        (size, policy) for size in (15, 25, 35) for policy in ("lb", "lalb", "lalb_o3")
    ]


def test_the_table_names_policies_bounds_and_gains() -> None:
    text = hotset("simulate", *QUICK, "--seeds", "2").stdout

    assert text.splitlines()[0] == "12 GPUs with 7.6 GiB each; synthetic, Zipf 0.9; 2 seeds from 0"
    latency, time, memory = text.split("\n\n")[1:]
    for words in ("LB", "LALB", "LALB+O3", "no loads", "speed-up", "p99", "variance", "1.0x"):
        assert words in latency
    for words in ("queueing", "load", "inference", "fairness", "utilisation", "busy", "requests/s"):
        assert words in time
    for words in ("misses", "false", "clairvoyant", "top copies", "evictions", "163"):
        assert words in memory


def test_requests_that_could_not_run_show_in_the_table(tmp_path: Path) -> None:
    table = tmp_path / "models.csv"
    table.write_text("function,memory,load,inference\nf00,1GiB,2s,1s\nf01,20GiB,2s,1s\n")
    text = hotset("simulate", "--working-set", "2", "--minutes", "0.2", "--rate", "300", "--models", table).stdout

    assert re.search(r"\b\d+ of 60\n", text)


def test_the_bounds_on_waiting_can_be_set() -> None:
    crowded = ("--policy", "hotset", "--rate", "900", "--working-set", "35", "--minutes", "0.5", "--seeds", "1")
    (usual,), (few_skips,), (short_wait,) = (
        simulate(*crowded, *bound) for bound in ((), ("--max-skips", "1"), ("--max-wait", "1s"))
    )

    # In order of arrival hits wait for loads, so there are more of these.
    assert few_skips["miss_ratio"] > 1.2 * usual["miss_ratio"]
    assert short_wait["miss_ratio"] > 1.2 * usual["miss_ratio"]


def test_how_far_a_function_may_run_ahead_can_be_set() -> None:
    crowded = ("--policy", "mqfq_sticky", "--rate", "900", "--working-set", "35", "--minutes", "0.5", "--seeds", "1")
    (usual,), (short,) = (simulate(*crowded, *overrun) for overrun in ((), ("--overrun", "1s")))

    # Functions that are hot wait for ones that are not, so there are more loads.
    assert short["miss_ratio"] > 1.2 * usual["miss_ratio"]


def test_every_combination_of_a_list_is_run() -> None:
    runs = simulate(*QUICK, "--policy", "lalb,lalb_o3", "--o3-limit", "0,5", "--load-scale", "1,0.1")

    assert [(run["policy"], run["o3_limit"], run["load_scale"]) for run in runs] == [
        ("lalb", None, 1.0),
        ("lalb", None, 0.1),
        ("lalb_o3", 0, 1.0),
        ("lalb_o3", 0, 0.1),
        ("lalb_o3", 5, 1.0),
        ("lalb_o3", 5, 0.1),
    ]
    assert runs[1]["mean_load_s"] < runs[0]["mean_load_s"]


def test_other_hardware_is_described_in_options() -> None:
    equal = ("--model-memory", "2GiB", "--inference", "500ms", "--gpus", "2", "--gpu-memory", "4GiB")
    (fixed,) = simulate(*QUICK, "--policy", "lalb", *equal, "--load", "2s")
    (copied,) = simulate(*QUICK, "--policy", "lalb", *equal, "--bandwidth", "1GiB")

    assert fixed["mean_inference_s"] == 0.5
    assert fixed == copied


def test_batching_drains_the_queue_faster() -> None:
    (single,) = simulate(*QUICK, "--policy", "lalb", "--gpus", "3")
    (batched,) = simulate(*QUICK, "--policy", "lalb", "--gpus", "3", "--max-batch", "8", "--batch-marginal", "0.1")

    assert batched["makespan_s"] < single["makespan_s"]
    assert batched["completed"] == single["completed"]


def test_a_deadline_is_kept_or_counted() -> None:
    options = (*QUICK, "--policy", "lb", "--gpus", "2", "--deadline", "4s")
    (run,) = simulate(*options)

    assert run["completed"] + run["rejected"] == run["requests"]
    assert run["deadline_misses"] >= run["rejected"] > 0
    assert run["goodput_per_s"] <= run["throughput_per_s"]
    text = hotset("simulate", *options).stdout
    assert "Deadlines" in text
    assert "in time/s" in text


def test_models_are_read_from_a_table(tmp_path: Path) -> None:
    table = tmp_path / "models.csv"
    lines = [f"f{number:02d},1GiB,2s,{number + 1}s" for number in range(15)]
    table.write_text("\n".join(["function,memory,load,inference", *lines]))
    (run,) = simulate(*QUICK, "--policy", "lalb", "--models", table)

    assert run["ideal_mean_latency_s"] > 1
    assert "no row for function 'f15'" in refused(*QUICK[:4], "--working-set", "16", "--models", table)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("function,memory\nf,1GiB\n", 1, "columns function, memory, load, inference"),
        ("function,memory,load,inference\nf00,1GiB,2s,1s\nf01,much,2s,1s\n", 3, "'much' is no size"),
        ("function,memory,load,inference\nf00,1GiB\n", 2, "load"),
    ],
)
def test_a_bad_table_of_models_is_told_with_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    table = tmp_path / "models.csv"
    table.write_text(text)
    with pytest.raises(TraceError, match=message) as caught:
        read_models(table)
    assert caught.value.line == line


def test_a_failed_gpu_is_felt() -> None:
    (whole,) = simulate(*QUICK, "--policy", "lb", "--gpus", "2")
    (hurt,) = simulate(*QUICK, "--policy", "lb", "--gpus", "2", "--fail", "1@5s:20s")

    assert hurt["completed"] == whole["completed"]
    assert hurt["makespan_s"] > whole["makespan_s"]


def test_arrivals_come_in_the_asked_rhythm() -> None:
    found = {
        kind: simulate(*QUICK, "--policy", "lalb", "--arrivals", kind, "--zipf", "1.2", "--rate", "200")[0]
        for kind in ("even", "poisson", "bursts")
    }

    assert found["even"]["requests"] == 100
    assert len({run["mean_latency_s"] for run in found.values()}) == 3


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    """Azure 2019: ten functions for five minutes, one of which makes half of all calls; five are called by http."""
    path = tmp_path / "counts.csv"
    rows = [
        f"o,a,f{number},{'http' if number % 2 else 'queue'},{','.join([str(90 if number == 0 else 10)] * 5)}"
        for number in range(10)
    ]
    path.write_text("HashOwner,HashApp,HashFunction,Trigger,1,2,3,4,5\n" + "\n".join(rows) + "\n")
    return path


def test_a_trace_is_cut_and_scaled_to_the_preset_as_in_the_paper(counts: Path) -> None:
    (run,) = simulate("--trace", counts, "--policy", "lalb", "--working-set", "10", "--seeds", "1")

    assert run["requests"] == 5 * 325  # the trace is shorter than six minutes
    assert run["workload"] == "azure2019 replayed"


@pytest.mark.parametrize(
    ("options", "size", "requests"),
    [
        (["--rate", "own", "--working-set", "all"], 10, 900),
        (["--rate", "own", "--working-set", "all", "--choice", "trigger:http"], 5, 250),
        (["--rate", "own", "--working-set", "9", "--choice", "skip:1", "--minutes", "2"], 9, 180),
        (["--rate", "100", "--working-set", "10", "--start-minute", "3"], 10, 200),
        (["--rate", "own", "--working-set", "10", "--compression", "5"], 10, 900),
        (["--rate", "100", "--working-set", "10", "--minutes", "1", "--arrivals", "own"], 10, 100),
        (["--trace-mode", "shares", "--working-set", "10", "--minutes", "1", "--arrivals", "even"], 10, 325),
    ],
)
def test_part_of_a_trace_is_chosen_with_options(counts: Path, options: Sequence[str], size: int, requests: int) -> None:
    (run,) = simulate("--trace", counts, "--policy", "lalb", "--seeds", "1", *options)

    assert (run["working_set"], run["requests"]) == (size, requests)


def test_a_recording_of_hotsets_own_is_replayed_as_it_was(tmp_path: Path) -> None:
    recording = tmp_path / "live.csv"
    recording.write_text(
        "# hotset-trace 1\narrival_s,function,inference_s,caller\n0.0,a,0.5,\n1.0,b,0.25,\n30.0,a,0.75,\n"
    )
    (run,) = simulate("--trace", recording, "--policy", "lalb", "--seeds", "1")

    assert (run["working_set"], run["requests"]) == (2, 3)
    assert run["mean_inference_s"] == 0.5


def test_a_trace_without_functions_gets_them_from_a_popularity() -> None:
    options = ("--trace", DATA / "azure_llm.csv", "--policy", "lalb", "--seeds", "1", "--rate", "own")

    assert simulate(*options, "--working-set", "4")[0]["working_set"] == 4
    assert "names no functions; say how large" in refused(*options, "--working-set", "all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "fifo"], "unknown policy 'fifo'; known: lb, lalb"),
        (["--eviction", "mru"], "unknown eviction policy 'mru'"),
        (["--working-set", "x"], "'x' is no list such as 15,25,35"),
        (["--working-set", "0"], "'0' is no list"),
        (["--working-set", "all"], "only a trace has functions"),
        (["--rate", "own"], "only a trace has functions, a rate or arrivals of its own"),
        (["--rate", "fast"], "'fast' is no number of requests a minute"),
        (["--gpu-memory", "much"], "--gpu-memory: 'much' is no size"),
        (["--gpu-memory", "1MiB"], "no model fits"),
        (["--fail", "0"], "'0' is not GPU@TIME"),
        (["--fail", "12@1s"], "unknown GPU '12'"),
        (["--fail", "1@9s:3s"], "brings the GPU back before it fails"),
        (["--gpus", "1", "--fail", "0@1s"], "every GPU failed"),
        (["--max-batch", "4"], "--max-batch and --batch-marginal go together"),
        (["--deadline", "0s"], "a deadline must be above 0"),
        (["--max-wait", "soon"], "--max-wait: 'soon' is no duration"),
        (["--load", "1s"], "equal models need --model-memory"),
        (["--model-memory", "1GB", "--inference", "1s", "--bandwidth", "0"], "--bandwidth must be above 0"),
        (["--models", "m.csv", "--load", "1s"], "--models says it all"),
        (["--trace", "missing.csv"], "missing.csv"),
        (["--json", "missing/out.json"], "the folder of missing/out.json does not exist"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(options: Sequence[str], message: str) -> None:
    said = refused("--seeds", "1", "--minutes", "0.2", *options)

    assert message in said
    assert len([line for line in said.splitlines() if line.startswith("Error: ")]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--choice", "best"], "'best' is none of top, skip:K"),
        (["--arrivals", "poisson"], "a replayed trace has arrivals 'own' or 'even'"),
        (["--trace-mode", "shares", "--arrivals", "own"], "shares makes arrivals up"),
        (["--trace-mode", "shares", "--compression", "2"], "leave compression and timing out"),
        (["--working-set", "11"], "calls only 10 matching functions"),
    ],
)
def test_a_trace_cannot_do_everything(counts: Path, options: Sequence[str], message: str) -> None:
    assert message in refused("--trace", counts, "--working-set", "10", *options)


def test_a_report_is_written_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "bars", lambda *_: b"")
    result = hotset("simulate", *QUICK, "--policy", "lalb", "--report", tmp_path / "report")

    assert result.exit_code == 0
    assert "12 GPUs with 7.6 GiB each" in (tmp_path / "report" / "index.html").read_text()
    assert str(tmp_path / "report" / "index.html") in result.stderr


def test_a_file_that_cannot_be_written_is_an_error_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = hotset("simulate", *QUICK, "--policy", "lb", "--report", tmp_path / "file" / "report")

    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path / 'file' / 'report'}: Not a directory")


def test_the_papers_evaluation_is_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "paper", Preset(minutes=0.5))  # type: ignore[arg-type]
    monkeypatch.setattr(paper, "ZIPF_EXPONENTS", (0.9,))
    monkeypatch.setattr(paper, "LOAD_SCALES", (1.0,))
    monkeypatch.setattr(paper, "O3_LIMITS", (0, 25))
    # How the pictures look is test_report's business, and drawing them most of the cost.
    monkeypatch.setattr(report, "bars", lambda *_: b"")
    monkeypatch.setattr(evaluation_report, "lines", lambda *_, **__: b"")
    monkeypatch.setattr(evaluation_report, "comparison", lambda *_, **__: b"")
    result = hotset("paper", "--seeds", "1", "--out", tmp_path / "out", "--jobs", "1")

    assert result.exit_code == 0, result.output
    assert "LALB+O3 cuts LB's miss ratio, 35 functions" in result.stdout
    assert "-81.16%" in result.stdout
    assert "48.0x" in result.stdout
    assert (tmp_path / "out" / "index.html").is_file()

    result = hotset("paper", "--seeds", "1", "--out", tmp_path / "again", "--jobs", "1", "--json")
    said = json.loads(result.stdout)
    assert said["report"] == str(tmp_path / "again" / "index.html")
    (verdict,) = (
        each for each in said["verdicts"] if each["claim"]["text"] == "LALB+O3 cuts LB's miss ratio, 35 functions"
    )
    assert (verdict["claim"]["value"], verdict["outcome"]) == (0.8116, "gains less here")


def test_on_a_terminal_tables_are_drawn_and_progress_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    for stream in (output.sys.stdout, output.sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    show_table(Table(columns=("policy", "mean"), rows=[("lb", "1.0"), ("[mine]", "2.0")], title="Latency", breaks=[1]))
    with progress("simulating") as heard:
        heard(0.5)
    with progress("hidden", quiet=True) as heard:
        heard(0.5)
    captured = capsys.readouterr()

    assert "Latency" in captured.out
    assert "[mine]" in captured.out
    assert "─" in captured.out
    assert "simulating" in captured.err
    assert "hidden" not in captured.err


def test_elsewhere_tables_are_plain_columns(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(Table(columns=("policy", "mean"), rows=[("lb", "1.0"), ("lalb", "12.0")], title="Latency", breaks=[1]))

    assert capsys.readouterr().out == "Latency\npolicy  mean\nlb       1.0\n\nlalb    12.0\n"


def test_json_is_sorted_and_ends_with_a_line_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json({"b": 1, "a": [1.5, None]}, tmp_path / "out.json")
    write_json({"b": 1, "a": []})

    assert (tmp_path / "out.json").read_text() == '{\n  "a": [\n    1.5,\n    null\n  ],\n  "b": 1\n}\n'
    assert capsys.readouterr().out == '{\n  "a": [],\n  "b": 1\n}\n'
