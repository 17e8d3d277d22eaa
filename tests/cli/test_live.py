"""The commands of a running server, against a real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import hotset


def test_a_function_is_deployed_called_listed_and_removed(gateway: str, functions: Path, tmp_path: Path) -> None:
    source = tmp_path / "short_lived.py"
    source.write_text((functions / "greet.py").read_text())

    deployed = hotset(
        *("deploy", str(source), "--gateway", gateway, "--env", "TONE=warm", "--label", "team=a"),
        *("--annotation", "note=x", "--gpu-memory", "16MiB", "--timeout", "5s", "--no-retry"),
    )
    assert deployed.exit_code == 0, deployed.output
    assert "Deployed short-lived (short-lived@" in deployed.output

    described = json.loads(hotset("describe", "short-lived", "--gateway", gateway, "--json").output)
    assert described["envVars"] == {"TONE": "warm"}
    assert described["labels"] == {"team": "a", "faas_function": described["name"]}
    assert described["hotset"]["gpu_memory_bytes"] == 16 << 20
    assert described["hotset"]["timeout_s"] == 5.0
    assert described["hotset"]["retry"] is False

    text = hotset("describe", "short-lived", "--gateway", gateway).output
    assert "declared 16 MiB" in text
    assert "envVars: TONE" in text
    assert "short-lived" in hotset("list", "--gateway", gateway).output

    assert hotset("invoke", "short-lived", "name=ada", "--gateway", gateway).output == '"hello ada"\n'
    assert hotset("remove", "short-lived", "--gateway", gateway).output == "Removed short-lived.\n"
    gone = hotset("invoke", "short-lived", "name=ada", "--gateway", gateway)
    assert gone.exit_code == 1
    assert "there is no function 'short-lived'" in gone.output


def test_deploy_answers_json_for_programs(gateway: str, functions: Path) -> None:
    result = hotset("deploy", str(functions / "total.py"), "--gateway", gateway, "--json")
    assert json.loads(result.output)["name"] == "total"
    assert json.loads(hotset("list", "--gateway", gateway, "--json").output)[0]["hotset"]["kind"] in ("cpu", "gpu")


def test_a_body_comes_as_fields_as_json_from_a_file_or_from_standard_input(gateway: str, tmp_path: Path) -> None:
    call = ("--gateway", gateway)
    assert hotset("invoke", "greet", "name=ada", "times=2", *call).output == '"hello adahello ada"\n'
    assert hotset("invoke", "total", "--json", "[1, 2.5]", *call).output == "3.5\n"
    assert hotset("invoke", "total", "--json", "-", *call, stdin="[2, 2]").output == "4.0\n"
    assert hotset("invoke", "total", *call, stdin="[3, 3]").output == "6.0\n"
    body = tmp_path / "body.bin"
    body.write_bytes(b"abc")
    out = tmp_path / "out.bin"
    assert hotset("invoke", "raw", "--file", str(body), "-o", str(out), *call).exit_code == 0
    assert out.read_bytes() == b"cba"


def test_a_call_can_say_where_it_ran(gateway: str) -> None:
    output = hotset("invoke", "greet", "name=ada", "-v", "--gateway", gateway).output
    assert "gpu local/virtual:" in output
    assert "cache " in output


def test_a_stream_is_printed_item_by_item(gateway: str) -> None:
    assert hotset("invoke", "count", "to=3", "--gateway", gateway).output == "0\n1\n2\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("invoke", "greet", "nam=ada"), "unknown field"),
        (("invoke", "greet", "justtext"), "write KEY=VALUE"),
        (("invoke", "greet", "name=x", "--json", "{}"), "give the body once"),
        (("describe", "nobody"), "there is no function 'nobody'"),
        (("remove", "nobody"), "there is no function 'nobody'"),
        (("explain", "nothing"), "nothing is known of the call 'nothing'"),
        (("bench", "--function", "nobody"), "nothing named nobody is deployed"),
        (("bench", "--function", "total", "--input", "nonsense"), "is not JSON"),
        (("bench", "--function", "total", "--input", "greet={}"), "greet is not among the functions"),
        (("bench", "--function", "total", "--input", "@/no/such/file"), "No such file"),
        (("bench", "--function", "total", "--rate", "1e9"), "more than 1000000 calls"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(gateway: str, arguments: tuple[str, ...], sentence: str) -> None:
    result = hotset(*arguments, "--gateway", gateway)
    assert result.exit_code in (1, 2)
    assert sentence in result.output
    assert "Traceback" not in result.output


def test_logs_are_what_the_function_printed(gateway: str) -> None:
    hotset("invoke", "greet", "name=grace", "--gateway", gateway)
    printed = hotset("logs", "greet", "--gateway", gateway).output
    assert "greet is here" in printed
    newest = hotset("logs", "greet", "--tail", "1", "--json", "--gateway", gateway).output
    assert json.loads(newest)["name"] == "greet"
    assert hotset("logs", "greet", "--since", "2999-01-01T00:00:00Z", "--gateway", gateway).output == ""


def test_top_shows_what_is_hot(gateway: str) -> None:
    hotset("invoke", "greet", "name=ada", "--gateway", gateway)
    shown = hotset("top", "--once", "--gateway", gateway).output
    assert shown.startswith("hotset healthy, hotset + hotset")
    state = json.loads(hotset("top", "--json", "--gateway", gateway).output)
    resident = [each["model"].partition("@")[0] for gpu in state["gpus"] for each in gpu["residents"]]
    assert "greet" in resident
    shown = hotset("top", "--once", "--transitions", "--gateway", gateway).output
    assert "last (median), ms" in shown
    assert "last load, ms" in shown
    (greet,) = (each for each in state["functions"] if each["name"] == "greet")
    assert (greet["kind"], greet["transitions"]["load"]["count"] >= 1) == ("gpu", True)
    assert greet["last_load"]["room_s"] >= 0
    assert state["processes"] is None, "only when asked for"
    assert "of host memory" not in shown


def test_the_host_memory_of_processes_is_told_when_asked_for(gateway: str) -> None:
    hotset("invoke", "greet", "name=ada", "--gateway", gateway)
    state = json.loads(hotset("top", "--json", "--processes", "--gateway", gateway).output)
    of_gpus = [each for each in state["processes"] if each["gpu_id"]]
    assert of_gpus
    assert all(each["private_bytes"] > 0 and each["shared_bytes"] > 0 for each in of_gpus)
    shown = hotset("top", "--once", "--processes", "--gateway", gateway).output
    assert " GPU processes take " in shown
    assert "of host memory: " in shown

    described = json.loads(hotset("describe", "greet", "--gateway", gateway, "--json").output)
    assert {each["model"] for each in described["processes"]} == {described["hotset"]["model"]}
    text = hotset("describe", "greet", "--gateway", gateway).output
    assert all(f"process {each['pid']}" in text for each in described["processes"])
    assert "its share of what is shared" in text


def test_explain_says_why(gateway: str, functions: Path, tmp_path: Path) -> None:
    source = tmp_path / "fresh.py"
    source.write_text((functions / "greet.py").read_text())
    hotset("deploy", str(source), "--gateway", gateway)
    output = hotset("invoke", "fresh", "name=ada", "-v", "--gateway", gateway).output
    call_id = output.split("call ")[1].split(":")[0]

    shown = hotset("explain", call_id, "--gateway", gateway).output
    assert "because: " in shown
    assert "fresh: status 200, miss on" in " ".join(shown.split())
    assert "alternatives at that moment" in shown
    report = json.loads(hotset("explain", call_id, "--json", "--gateway", gateway).output)
    assert report["decisions"]["decisions"][0]["hit"] is False

    output = hotset("invoke", "total", "--json", "[1]", "-v", "--gateway", gateway).output
    plain = hotset("explain", output.split("call ")[1].split(":")[0], "--gateway", gateway).output
    assert "it runs on the CPU" in plain
    hotset("remove", "fresh", "--gateway", gateway)


def test_bench_measures_and_replay_asks_what_if(gateway: str, tmp_path: Path) -> None:
    load = ("--function", "greet", "--function", "count", "--rate", "40", "--duration", "1s", "--gateway", gateway)
    inputs = ("--input", 'greet={"name": "x"}', "--input", 'count={"to": 1}')
    report = json.loads(hotset("bench", *load, *inputs, "--json").output)
    assert report["statuses"] == {"200": report["metrics"]["requests"]}
    assert report["metrics"]["completed"] == report["metrics"]["requests"] > 0
    assert report["metrics"]["mean_latency_s"] > 0
    assert "miss ratio" in hotset("bench", *load, *inputs, "--arrivals", "even").output

    saved = tmp_path / "calls.ndjson"
    live = json.loads(hotset("replay", "--save", str(saved), "--gateway", gateway, "--json").output)
    assert [run["policy"] for run in live["runs"] if not run["measured"]] == ["hotset", "lb", "lalb", "lalb_o3"]
    assert live["runs"][0]["measured"] is True
    again = json.loads(hotset("replay", str(saved), "--json").output)
    assert again == live
    bounded = hotset("replay", str(saved), "--policy", "hotset", "--max-skips", "1", "--max-wait", "1s", "--json")
    assert [run["measured"] for run in json.loads(bounded.output)["runs"]] == [True, False]
    bigger = hotset("replay", str(saved), "--policy", "lb", "--gpus", "1", "--gpu-memory", "1GiB", "--load-scale", "2")
    assert "lb + hotset" in bigger.output
    assert "simulated" in bigger.output


def test_bench_can_follow_a_trace(gateway: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.ndjson"
    rows = [{"arrival_s": i * 0.01, "function": f"f{i % 2}"} for i in range(20)]
    trace.write_text("\n".join(json.dumps(row) for row in ({"hotset_trace": 1}, *rows)) + "\n")
    report = json.loads(
        hotset(
            *("bench", "--trace", str(trace), "--function", "total", "--function", "greet", "--duration", "1s"),
            *("--input", "total=[1]", "--input", 'greet={"name": "x"}', "--gateway", gateway, "--json"),
        ).output
    )
    assert report["statuses"] == {"200": 20}


def test_a_trace_that_is_none_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.ndjson"
    broken.write_text("{}\n")
    result = hotset("replay", str(broken))
    assert result.exit_code == 2
    assert "broken.ndjson, line 1: expected the header of a live server's trace" in result.output


@pytest.mark.parametrize("command", [("list",), ("invoke", "f", "a=1"), ("logs", "f"), ("top", "--once")])
def test_without_a_server_the_command_says_how_to_start_one(command: tuple[str, ...]) -> None:
    result = hotset(*command, "--gateway", "http://127.0.0.1:9")
    assert result.exit_code == 2
    assert "no server answers at http://127.0.0.1:9: start one with `hotset serve`" in result.output


def test_a_gateway_must_be_a_url() -> None:
    assert "is no URL" in hotset("list", "--gateway", "localhost").output
