"""`make demo`: real models on virtual GPUs too small for all of them, called by hand, then under load.

1. install what the examples import, 2. start a server, 3. deploy every example, 4. call each and judge its answers,
5. send the same skewed load under each policy and compare. Everything it starts, it ends; it ends by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import httpx
from demo_load import LoadReport, arrivals, drive, fitting_rate
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
HOTSET = Path(sys.executable).with_name("hotset")
REQUIREMENTS = (ROOT / "examples" / "requirements.txt", ROOT / "examples" / "weights.txt")

OF_PAPER = ("lb", "lalb", "lalb_o3")
"""Policies that are shown as the paper has them: what must leave a GPU is unloaded, the least recently used first."""
READY_WITHIN_S = 60.0
STOP_WITHIN_S = 20.0
DEPLOY_WITHIN_S = 120.0
CALL_WITHIN_S = 120.0

progress_console = Console(stderr=True)
# A pipe has no width: tables then take what they need.
result_console = Console(width=None if sys.stdout.isatty() else 140)


class DemoError(Exception):
    """The demo cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Answered:
    """What one example answered in step 4. ``first_s``: its first call, the model's load included."""

    function: str
    inputs: list[str]
    answers: list[str]
    truths: list[str]
    right: bool
    first_s: float
    load_s: float
    inference_s: float


def pins(file: Path) -> dict[str, str]:
    """``name==version`` lines of a requirements file."""
    lines = (line.split("#")[0].strip() for line in file.read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def missing(file: Path) -> list[str]:
    """Names pinned in a requirements file that are not installed here in that version (``+cpu`` builds count)."""

    def installed(name: str) -> str | None:
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            return None

    return [name for name, pinned in pins(file).items() if installed(name) != pinned]


def install() -> float:
    """Install both requirements files into this environment; returns the seconds it took, 0 if all was there."""
    if not any(missing(file) for file in REQUIREMENTS):
        progress_console.print("1. Packages and weights are installed.")
        return 0.0
    started = time.perf_counter()
    for file, options in zip(REQUIREMENTS, ((), ("--no-deps",)), strict=True):
        _pip_install(file, options)
    return time.perf_counter() - started


def _pip_install(file: Path, options: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "install", "--progress-bar=off", "--disable-pip-version-check", *options]
    command += ["-c", str(ROOT / "constraints.txt"), "-r", str(file)]
    names = pins(file)
    with _progress() as progress:
        task = progress.add_task(f"1. Installing {file.name}", total=2 * len(names))
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip,
            ended(pip),
        ):
            lines = []
            for line in pip.stdout or ():
                lines.append(line)
                word, _, rest = line.strip().partition(" ")
                if word == "Collecting" and rest.partition("==")[0] in names:
                    progress.update(task, advance=1, description=f"1. Installing {rest.partition('==')[0]}")
                elif line.startswith("Installing collected packages"):
                    progress.update(task, completed=len(names), description=f"1. Unpacking {file.name}")
            if pip.wait() != 0:
                raise DemoError(f"pip could not install {file.name}:\n{''.join(lines[-15:])}")
        progress.update(task, completed=2 * len(names), description=f"1. Installed {file.name}")


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Ends the process, politely first, when the block is left by whatever way."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def server(policy: str, options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """A server on a free port, with its data and log in ``folder``; yields its URL once it is healthy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(HOTSET), "serve", "--policy", policy, "--port", str(port), "--data-dir", str(folder / "data")]
    command += ["--virtual-gpus", str(options.virtual_gpus), "--gpu-memory", options.gpu_memory]
    if policy in OF_PAPER:
        command += ["--eviction", "lru", "--host-memory", "0"]
    log = folder / f"server-{policy}.log"
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, env=_environment(url))
    try:
        with ended(process):
            _await_health(process, url)
            yield url
    except DemoError as error:
        raise DemoError(f"{error}\nThe server's log ends with:\n{log.read_text()[-1500:]}") from None


def _environment(url: str) -> dict[str, str]:
    return os.environ | {"HOTSET_GATEWAY": url, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _await_health(process: subprocess.Popen[str], url: str) -> None:
    give_up = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < give_up and process.poll() is None:
        try:
            if httpx.get(f"{url}/healthz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    what = "did not get ready" if process.poll() is None else f"ended with status {process.returncode}"
    raise DemoError(f"the server {what}.")


def deploy(showcases: Sequence[Any], url: str) -> None:
    """``hotset deploy`` for each example, as a user would, two at a time."""

    def deployed(showcase: Any) -> subprocess.CompletedProcess[str]:
        command = [str(HOTSET), "deploy", str(showcase.file), "--name", showcase.name]
        return subprocess.run(command, capture_output=True, text=True, env=_environment(url), timeout=DEPLOY_WITHIN_S)

    with _progress() as progress, ThreadPoolExecutor(max_workers=2) as pool:
        task = progress.add_task("3. Deploying", total=len(showcases))
        for showcase, done in zip(showcases, pool.map(deployed, showcases), strict=True):
            if done.returncode != 0:
                pool.shutdown(cancel_futures=True)
                raise DemoError(f"{showcase.file.name} could not be deployed:\n{(done.stderr or done.stdout)[-1500:]}")
            progress.update(task, advance=1, description=f"3. Deployed {showcase.file.name}")
        progress.update(task, description=f"3. Deployed {len(showcases)} functions")


def call_all(showcases: Sequence[Any], url: str) -> list[Answered]:
    """Each example's calls, one after the other, and the judgement of the answers."""
    answered = []
    with _progress() as progress, httpx.Client(base_url=url, timeout=CALL_WITHIN_S) as client:
        task = progress.add_task("4. Calling", total=len(showcases))
        for showcase in showcases:
            progress.update(task, description=f"4. Calling {showcase.name}")
            answered.append(_call(showcase, client))
            progress.advance(task)
        progress.update(task, description=f"4. Called {len(showcases)} functions")
    return answered


def _call(showcase: Any, client: httpx.Client) -> Answered:
    answers, first_s, load_s, inference_s = [], 0.0, 0.0, 0.0
    for call in showcase.calls:
        started = time.perf_counter()
        headers = {"Content-Type": call.content_type, "X-Hotset-Timeout": str(CALL_WITHIN_S)}
        response = client.post(f"/function/{showcase.name}", content=call.body, headers=headers)
        first_s = first_s or time.perf_counter() - started
        if response.status_code != 200:
            raise DemoError(f"{showcase.name} answered {response.status_code}: {response.text[:500]}")
        load_s = max(load_s, float(response.headers["X-Hotset-Load-Seconds"]))
        inference_s = float(response.headers["X-Hotset-Inference-Seconds"])
        answers.append(response.json())
    verdict = showcase.judge(answers)
    return Answered(
        function=showcase.name,
        inputs=[call.shown for call in showcase.calls],
        answers=verdict.answers,
        truths=[call.truth for call in showcase.calls],
        right=verdict.right,
        first_s=first_s,
        load_s=load_s,
        inference_s=inference_s,
    )


def load(showcases: Sequence[Any], rate: float, options: argparse.Namespace, folder: Path) -> list[LoadReport]:
    """The same load under each policy, each on a server that has just started: every policy begins with empty GPUs."""
    schedule = arrivals([len(s.calls) for s in showcases], rate, options.seconds, options.seed)
    reports = []
    for policy in options.policies.split(","):
        with server(policy, options, folder) as url, _progress() as progress:
            task = progress.add_task(f"5. Load under {policy}", total=len(schedule))

            def show(report: LoadReport, task: Any = task, progress: Progress = progress) -> None:
                words = f"5. Load under {report.policy}: {report.hits} hits, {report.misses} misses"
                progress.update(task, completed=report.requests + report.failed, description=words)

            reports.append(asyncio.run(drive(policy, url, showcases, schedule, show)))
    return reports


def answers_table(answered: Sequence[Answered]) -> Table:
    """Inputs beside answers beside what is right."""
    table = Table(title="What the functions answered")
    table.add_column("function", no_wrap=True)
    for heading in ("input", "answer", "should be"):
        table.add_column(heading, overflow="fold")
    table.add_column("", no_wrap=True)
    table.add_column("first call", justify="right")
    table.add_column("inference", justify="right")
    for row in answered:
        mark = "[green]right[/]" if row.right else "[bold red]WRONG[/]"
        name, times = row.function, (mark, f"{row.first_s:.1f} s", f"{1000 * row.inference_s:.0f} ms")
        for texts in zip(row.inputs, row.answers, row.truths, strict=True):
            table.add_row(name, *map(escape, texts), *times)
            name, times = "", ("", "", "")  # said once for all calls of a function
        table.add_section()
    return table


def load_table(reports: Sequence[LoadReport], rate: float) -> Table:
    """Measured latency, hits and misses of each policy."""
    table = Table(title=f"The same {rate:.1f} calls a second under each policy, measured (latency and load in seconds)")
    table.add_column("policy", no_wrap=True)
    for heading in ("answered", "failed", "mean", "p50", "p95", "hits", "misses", "miss %", "load"):
        table.add_column(heading, justify="right", no_wrap=True)
    for report in reports:
        latencies = [f"{value:.2f}" for value in (report.mean_latency_s, report.p50_latency_s, report.p95_latency_s)]
        counts = [str(count) for count in (report.requests, report.failed)]
        cache = [str(report.hits), str(report.misses), f"{100 * report.miss_ratio:.0f}", f"{report.mean_load_s:.2f}"]
        table.add_row(report.policy, *counts, *latencies, *cache)
    if any(report.policy not in OF_PAPER for report in reports):
        table.caption = "hotset is the default: models that leave a GPU wait in host memory, so most misses are short."
    return table


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
    return Progress(*columns, TimeElapsedColumn(), console=progress_console)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--virtual-gpus", type=int, default=2, help="how many (default %(default)s)")
    parser.add_argument("--gpu-memory", default="128MiB", help="memory of each (default %(default)s)")
    parser.add_argument(
        "--policies", default="lb,lalb,lalb_o3,hotset", help="policies to compare (default %(default)s)"
    )
    parser.add_argument("--rate", type=float, help="calls a second (default: what the GPUs can do if half miss)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each load (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the load's arrivals (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of tables")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if every function answered right and no call of the load failed."""
    options = parse(arguments)
    started = time.perf_counter()
    try:
        install_s = install()
        # Only now: the inputs come from packages that were just installed.
        from demo_calls import showcases as make_showcases

        showcases = make_showcases()
        with tempfile.TemporaryDirectory(prefix="hotset-demo-") as name:
            folder = Path(name)
            words = f"{options.virtual_gpus} virtual GPUs of {options.gpu_memory}"
            progress_console.print(f"2. Starting a server with {words}.")
            with server(options.policies.split(",")[-1], options, folder) as url:
                deploy(showcases, url)
                answered = call_all(showcases, url)
            if not options.json:
                result_console.print(answers_table(answered))
            loads_s, inferences_s = [row.load_s for row in answered], [row.inference_s for row in answered]
            rate = options.rate or fitting_rate(loads_s, inferences_s, options.virtual_gpus)
            reports = load(showcases, rate, options, folder)
    except DemoError as error:
        progress_console.print(f"[red]demo stopped:[/] {escape(str(error))}", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    total_s = time.perf_counter() - started
    right = all(row.right for row in answered)
    if options.json:
        results = {
            "answers": [asdict(row) for row in answered],
            "rate": rate,
            "load": [report.as_json() for report in reports],
            "all_right": right,
            "install_s": install_s,
            "total_s": total_s,
        }
        print(json.dumps(results, indent=2, ensure_ascii=False))
    else:
        result_console.print(load_table(reports, rate))
        for report in reports:
            for reason, count in report.failures.items():
                result_console.print(f"{report.policy}: {count} failed: {escape(reason)}")
        progress_console.print(f"{total_s:.0f} s in all, {install_s:.0f} s of them installing.")
    return 0 if right and not any(report.failed for report in reports) else 1


if __name__ == "__main__":
    # Told to stop, it still ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
