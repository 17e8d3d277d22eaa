"""The demo's own logic: what it installs, sends and counts, and that it leaves no process behind."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import stat
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from test_examples import demo, script

demo_load = script("demo_load")
demo_calls = script("demo_calls")

SERVER = """#!{python}
import http.server, os, pathlib, sys

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, *args):
        pass

arguments = dict(zip(sys.argv[2::2], sys.argv[3::2]))
pathlib.Path(arguments["--data-dir"] + ".pid").write_text(str(os.getpid()))
http.server.HTTPServer(("127.0.0.1", int(arguments["--port"])), Health).serve_forever()
"""

RECORDER = """#!{python}
import os, pathlib, sys

pathlib.Path(sys.argv[0] + ".log").write_text(" ".join([*sys.argv[1:], os.environ["HOTSET_GATEWAY"]]))
"""


def program(path: Path, source: str) -> Path:
    path.write_text(source.replace("{python}", sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def showcase(name: str) -> Any:
    call = demo_calls.Call("a body", "1", b"1", "application/json")
    return demo_calls.Showcase(name, [call], lambda answers: demo_calls.Verdict([str(answers[0])], answers == [1]))


@pytest.fixture
def options() -> argparse.Namespace:
    chosen: argparse.Namespace = demo.parse(["--policies", "lb"])
    return chosen


def test_pins_that_are_not_installed_are_missing(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text("# a comment\npytest==0.0.1  # not this version\nno-such-package==1\n")
    assert demo.missing(file) == ["pytest", "no-such-package"]
    file.write_text(f"pytest=={pytest.__version__}\n")
    assert demo.missing(file) == []


def test_pip_is_told_of_only_when_it_fails(tmp_path: Path) -> None:
    impossible = tmp_path / "requirements.txt"
    impossible.write_text("pytest==not.a.version\n")
    with pytest.raises(demo.DemoError, match=r"requirements\.txt"):
        demo._pip_install(impossible, ["--no-index"])


def test_the_load_is_zipf_poisson_and_repeatable() -> None:
    schedule = demo_load.arrivals([1, 2, 3], rate=100, seconds=60, seed=7)
    assert schedule == demo_load.arrivals([1, 2, 3], rate=100, seconds=60, seed=7)
    assert schedule != demo_load.arrivals([1, 2, 3], rate=100, seconds=60, seed=8)
    assert len(schedule) == pytest.approx(6000, rel=0.1)
    assert all(a.at_s <= b.at_s < 60 for a, b in pairwise(schedule))

    counts = Counter(arrival.function for arrival in schedule)
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.15)
    assert counts[0] / counts[2] == pytest.approx(3, rel=0.15)
    assert {arrival.call for arrival in schedule if arrival.function == 2} == {0, 1, 2}


def test_the_rate_keeps_the_gpus_busy_if_half_of_the_calls_miss() -> None:
    assert demo_load.fitting_rate([1.0], [0.5], gpus=2) == pytest.approx(2 / (0.5 + 0.5))
    # The first is called twice as often as the second.
    assert demo_load.fitting_rate([1.0, 4.0], [0.5, 1.0], gpus=1) == pytest.approx(3 / (2 * 1.0 + 3.0))
    assert demo_load.fitting_rate([0.0], [0.0], gpus=2) == pytest.approx(40)


def test_the_report_counts_what_the_answers_say() -> None:
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, request.content))
        if request.url.path.endswith("broken"):
            return httpx.Response(500, json={"error": "broken"})
        if request.url.path.endswith("gone"):
            raise httpx.ConnectError("gone")
        first = len([path for path, _ in seen if path == request.url.path]) == 1
        headers = {"X-Hotset-Cache": "miss" if first else "hit", "X-Hotset-Load-Seconds": "1.5" if first else "0"}
        return httpx.Response(200, json=1, headers=headers)

    showcases = [showcase(name) for name in ("one", "two", "broken", "gone")]
    schedule = [demo_load.Arrival(0.0, function, 0) for function in (0, 0, 1, 2, 3)]
    shown: list[int] = []
    report = asyncio.run(
        demo_load.drive(
            "lalb",
            "http://hotset",
            showcases,
            schedule,
            lambda so_far: shown.append(so_far.requests),
            transport=httpx.MockTransport(answer),
        )
    )

    assert sorted(path for path, _ in seen) == [
        "/function/broken",
        "/function/gone",
        *["/function/one"] * 2,
        "/function/two",
    ]
    assert {body for _, body in seen} == {b"1"}
    assert (report.requests, report.failed, report.hits, report.misses) == (3, 2, 1, 2)
    assert report.failures == {"500 broken": 1, "ConnectError('gone')": 1}
    assert report.miss_ratio == pytest.approx(2 / 3)
    assert report.mean_load_s == 1.5
    assert shown[-1] == 3
    figures = report.as_json()
    assert 0 < figures["p50_latency_s"] <= figures["p95_latency_s"]
    assert json.loads(json.dumps(figures))["policy"] == "lalb"


def test_a_server_runs_while_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: argparse.Namespace
) -> None:
    monkeypatch.setattr(demo, "HOTSET", program(tmp_path / "hotset", SERVER))

    def interrupted() -> None:
        with demo.server("lb", options, tmp_path) as url:
            assert httpx.get(f"{url}/healthz").status_code == 200
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    pid = int((tmp_path / "data.pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_server_that_ends_at_once_shows_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: argparse.Namespace
) -> None:
    source = "#!{python}\nimport sys\nprint('no room')\nsys.exit(3)\n"
    monkeypatch.setattr(demo, "HOTSET", program(tmp_path / "hotset", source))
    with pytest.raises(demo.DemoError, match=r"(?s)ended with status 3.*no room"), demo.server("lb", options, tmp_path):
        pass


def test_deploying_names_the_file_and_shows_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hotset = program(tmp_path / "hotset", RECORDER)
    monkeypatch.setattr(demo, "HOTSET", hotset)
    demo.deploy([showcase("embed-text")], "http://127.0.0.1:1")
    words = (tmp_path / "hotset.log").read_text()
    assert words.startswith("deploy ")
    assert words.endswith("examples/embed_text.py --name embed-text http://127.0.0.1:1")

    program(hotset, "#!{python}\nimport sys\nsys.exit('no such option')\n")
    with pytest.raises(demo.DemoError, match=r"(?s)embed_text\.py.*no such option"):
        demo.deploy([showcase("embed-text")], "http://127.0.0.1:1")


def test_answers_are_judged_and_shown_beside_their_inputs() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        right = request.url.path == "/function/one"
        headers = {"X-Hotset-Load-Seconds": "1.5", "X-Hotset-Inference-Seconds": "0.25"}
        return httpx.Response(200, json=1 if right else 2, headers=headers)

    with httpx.Client(base_url="http://hotset", transport=httpx.MockTransport(answer)) as client:
        rows = [demo._call(showcase(name), client) for name in ("one", "two")]
    assert [row.right for row in rows] == [True, False]
    assert (rows[0].load_s, rows[0].inference_s) == (1.5, 0.25)
    assert (rows[1].inputs, rows[1].answers, rows[1].truths) == (["a body"], ["2"], ["1"])
    assert demo.answers_table(rows).row_count == 2


def test_an_error_answer_stops_the_demo() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(503, json={"error": "no GPU"})

    with (
        httpx.Client(base_url="http://hotset", transport=httpx.MockTransport(answer)) as client,
        pytest.raises(demo.DemoError, match=r"answered 503.*no GPU"),
    ):
        demo._call(showcase("one"), client)
