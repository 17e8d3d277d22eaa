"""The system routes: deploying real bundles, in OpenFaaS's shapes, and what they say when something is wrong."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path

import pytest
from gateway_world import GPU, MIB, Client, Reply, World, run

from hotset.errors import BundleError, FunctionError, StoreError
from hotset.gateway import system, web
from hotset.gateway.app import Gateway
from hotset.gateway.deployments import Deployments
from hotset.gateway.description import describe, guess_module
from hotset.gateway.system import SystemApi
from hotset.node.spawner import Spawner
from hotset.scheduling.config import SchedulerConfig
from hotset.store.bundles import Bundles, make_bundle
from hotset.store.environments import Environments
from hotset.store.sqlite import SqliteDatastore

GREET = """
import hotset

print("imported")

@hotset.function(gpu_memory="64MiB", timeout="5s", env={"TONE": "warm"})
class Greet:
    '''Says hello.'''

    def predict(self, name: str) -> str:
        return f"hello {name}"
"""
SHOUT = """
import hotset

@hotset.function
def shout(text: str) -> str:
    return text.upper()
"""


class Server(World):
    """A gateway with everything behind it but GPU processes; the datastore is real, in a temporary directory."""

    def __init__(self, data: Path, **how) -> None:
        super().__init__(**how)
        self.data = data
        self.deployments = Deployments(
            self.control, SqliteDatastore(data), Bundles(data / "bundles"), Environments(data / "environments")
        )
        self.client = Client(Gateway(self.control, SystemApi(self.control, self.deployments).application()))

    async def __aenter__(self) -> Server:
        await self.start()
        await self.deployments.restore()
        return self

    async def __aexit__(self, *_) -> None:
        await self.control.stop()
        await self.deployments.close()

    async def json(self, method: str, path: str, value: object = None, **headers: str) -> Reply:
        body = b"" if value is None else json.dumps(value).encode()
        return await self.client.request(method, path, body, headers)

    async def upload(self, code: str, name: str = "main.py") -> str:
        """Bundle one file, send it in pieces, and return its digest."""
        folder = self.data / "source"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(code)
        archive = io.BytesIO()
        bundle = make_bundle(folder / name, archive)
        content = archive.getvalue()
        reply = await self.client.request("PUT", f"/system/bundles/{bundle.digest}", [content[:50], content[50:]])
        assert reply.status == 201, reply.body
        return bundle.digest

    async def deploy(self, code: str, service: str = "greet", method: str = "POST", **more: object) -> Reply:
        digest = await self.upload(code)
        return await self.json(method, "/system/functions", {"service": service, "image": f"sha256:{digest}", **more})

    async def call(self, function: str, body: bytes) -> Reply:
        task = asyncio.create_task(self.client.request("POST", f"/function/{function}", body))
        while not task.done():
            await self.advance(0.05)
        return task.result()


def serving(story: Callable[[Server], Awaitable[None]], data: Path, **how) -> None:
    async def whole():
        async with Server(data, **how) as server:
            await story(server)

    run(whole)


def test_a_deployed_function_is_listed_described_and_called(tmp_path):
    async def story(server: Server):
        assert (await server.json("GET", "/system/functions")).body == b"[]"
        reply = await server.deploy(GREET, labels={"team": "a"}, annotations={"note": "x"}, envVars={"LANG": "C"})
        assert (reply.status, reply.body) == (202, b"")
        (listed,) = json.loads((await server.json("GET", "/system/functions?namespace=openfaas-fn")).body)
        assert listed == json.loads((await server.json("GET", "/system/function/greet?usage=false")).body)
        assert (listed["name"], listed["namespace"], listed["availableReplicas"]) == ("greet", "openfaas-fn", 1)
        assert listed["labels"] == {"team": "a", "faas_function": "greet"}
        assert listed["annotations"].items() >= {"note": "x", "hotset.gpu-memory-now": "64 MiB"}.items()
        assert listed["envVars"] == {"TONE": "warm", "LANG": "C"}
        assert datetime.fromisoformat(listed["createdAt"]).tzinfo is not None
        details = listed["hotset"]
        assert (details["entry"], details["kind"], details["gpu_memory_bytes"]) == ("main:Greet", "gpu", 64 * MIB)
        assert details["schema"]["description"] == "Says hello."
        assert (await server.call("greet", b'"you"')).body == b'"you"'
        after = json.loads((await server.json("GET", "/system/function/greet.openfaas-fn")).body)
        assert (after["invocationCount"], after["hotset"]["gpus"]) == (1, [GPU])

    serving(story, tmp_path)


def test_a_deploy_can_be_watched(tmp_path):
    async def story(server: Server):
        digest = await server.upload(GREET)
        wanted = {"service": "greet", "image": f"sha256:{digest}"}
        reply = await server.json("POST", "/system/functions", wanted, accept="application/x-ndjson")
        lines = [json.loads(line) for line in reply.body.splitlines()]
        assert lines[:-1] == [{"progress": "importing main"}, {"progress": "imported"}]
        assert lines[-1]["deployed"]["name"] == "greet"
        wanted["hotset"] = {"entry": "main:Missing"}
        reply = await server.json("POST", "/system/functions", wanted, accept="application/x-ndjson")
        last = json.loads(reply.body.splitlines()[-1])
        assert "main has no Missing" in last["error"]
        assert last["status"] == 400

    serving(story, tmp_path)


def test_overrides_of_a_deployment_win_over_the_decorator(tmp_path):
    async def story(server: Server):
        overrides = {"gpu_memory": "32MiB", "timeout": "9s", "load_timeout": 60, "retry": False, "max_batch": 1}
        assert (await server.deploy(GREET, hotset=overrides)).status == 202
        details = json.loads((await server.json("GET", "/system/function/greet")).body)["hotset"]
        assert (details["gpu_memory_bytes"], details["timeout_s"], details["load_timeout_s"]) == (32 * MIB, 9.0, 60.0)
        assert not details["retry"]
        spec = server.control.functions.current["greet"].spec
        assert (spec.launch.memory_bytes, spec.patience_s) == (32 * MIB, 69.0)

    serving(story, tmp_path)


def test_how_long_a_batch_may_be_held_is_said_by_the_code_a_field_or_an_annotation(tmp_path):
    code = """
import hotset

@hotset.function(max_batch=4, max_batch_wait="5ms")
class Greet:
    def predict(self, names: list[str]) -> list[str]:
        return names
"""

    async def story(server: Server):
        async def held_s(**deployment: object) -> float:
            assert (await server.deploy(code, **deployment)).status == 202
            details = json.loads((await server.json("GET", "/system/function/greet")).body)["hotset"]
            scheduled = server.control.functions.current["greet"].spec.scheduled
            assert scheduled is not None
            assert scheduled.max_batch_wait_s == details["max_batch_wait_s"]
            return scheduled.max_batch_wait_s

        annotations = {"hotset.max-batch-wait": "2ms"}
        assert await held_s() == 0.005
        assert await held_s(annotations=annotations) == 0.002
        assert await held_s(annotations=annotations, hotset={"max_batch_wait": 0}) == 0.0

    serving(story, tmp_path)


def test_a_function_that_declares_no_memory_reserves_what_every_gpu_has(tmp_path):
    async def story(server: Server):
        assert (await server.deploy(GREET.replace('gpu_memory="64MiB", ', ""))).status == 202
        scheduled = server.control.functions.current["greet"].spec.scheduled
        assert scheduled is not None
        assert scheduled.memory_bytes == 320 * MIB

    serving(story, tmp_path)


def test_a_plain_function_needs_no_gpu(tmp_path):
    async def story(server: Server):
        assert (await server.deploy(SHOUT, "shout")).status == 202
        assert json.loads((await server.json("GET", "/system/function/shout")).body)["hotset"]["kind"] == "cpu"
        assert server.control.functions.current["shout"].spec.scheduled is None

    serving(story, tmp_path)


def test_a_deployment_that_makes_no_sense_is_refused_with_the_reason(tmp_path):
    async def story(server: Server):
        for body, status, says in (
            (b"{", 400, "not JSON"),
            (b"{}", 400, "service"),
            (b'{"service": 7}', 400, "$.service"),
            (b'{"service": "Greet!", "image": "x"}', 400, "service"),
            (b'{"service": "greet", "image": "x"}', 400, "there is no image 'x'"),
            (b'{"service": "greet", "image": "sha256:../../etc"}', 400, "there is no image"),
            (b'{"service": "greet", "namespace": "elsewhere"}', 400, "namespace"),
            (b'{"service": "greet", "hotset": {"memory": 1}}', 400, "memory"),
            (b'{"service": "greet", "labels": {"a": 1}}', 400, "$.labels"),
            (b" " * ((1 << 20) + 1), 413, "larger"),
        ):
            reply = await server.client.request("POST", "/system/functions", body)
            assert reply.status == status, body
            assert says in reply.error

    serving(story, tmp_path)


def test_code_that_does_not_work_is_refused_and_the_old_version_stays(tmp_path):
    async def story(server: Server):
        await server.deploy(GREET)
        before = server.control.functions.current["greet"].model
        refused: list[tuple[str, dict[str, object], str]] = [
            ("import nothing_of_the_kind", {}, "No module named 'nothing_of_the_kind'"),
            ("class Greet: pass", {}, "@hotset.function"),
            (GREET, {"entry": "other"}, "no module other"),
            (GREET, {"max_batch": 8}, "change it there"),
            (GREET, {"timeout": "soon"}, "timeout"),
            (GREET, {"timeout": 0}, "greater than 0"),
            (GREET, {"max_batch_wait": "5ms"}, "for functions that join requests"),
            (GREET, {"max_batch_wait": "soon"}, "max_batch_wait"),
        ]
        for code, overrides, says in refused:
            reply = await server.deploy(code, hotset=overrides)
            assert reply.status == 400
            assert says in reply.error
            assert server.control.functions.current["greet"].model == before
        assert (await server.call("greet", b'"you"')).status == 200

    serving(story, tmp_path)


def test_put_updates_and_never_creates(tmp_path):
    async def story(server: Server):
        assert (await server.deploy(GREET, method="PUT")).status == 404
        await server.deploy(GREET)
        first = server.control.functions.current["greet"].model
        assert (await server.deploy(GREET.replace("hello", "good day"), method="PUT")).status == 202
        assert server.control.functions.current["greet"].model != first

    serving(story, tmp_path)


def test_a_removed_function_is_gone(tmp_path):
    async def story(server: Server):
        await server.deploy(GREET)
        assert (await server.json("DELETE", "/system/functions", {"functionName": "greet"})).status == 202
        assert (await server.json("DELETE", "/system/functions", {"functionName": "greet"})).status == 404
        assert (await server.json("GET", "/system/function/greet")).status == 404
        assert (await server.client.request("POST", "/function/greet")).status == 404
        assert (await server.json("DELETE", "/system/functions", {})).status == 400

    serving(story, tmp_path)


def test_functions_and_what_was_learned_survive_a_restart(tmp_path):
    async def first(server: Server):
        await server.deploy(GREET)
        model = server.control.functions.current["greet"].model
        server.behave(model, memory_bytes=20 * MIB)
        await server.call("greet", b'"you"')
        await server.upload(SHOUT)

    async def second(server: Server):
        assert len(list((tmp_path / "bundles").iterdir())) == 1
        scheduled = server.control.functions.current["greet"].spec.scheduled
        assert scheduled is not None
        assert scheduled.memory_bytes == 20 * MIB
        assert scheduled.profile.load_s == pytest.approx(0.1)
        assert server.control.functions.current["greet"].spec.launch.memory_bytes == 64 * MIB
        assert (await server.call("greet", b'"you"')).status == 200
        again = await server.deploy(GREET)
        assert again.status == 202

    serving(first, tmp_path)
    serving(second, tmp_path)


def test_what_never_ran_taught_nothing(tmp_path):
    async def story(server: Server):
        await server.deploy(GREET)
        await server.deployments.save_profiles()

    serving(story, tmp_path)
    store = SqliteDatastore(tmp_path)
    assert store.profiles() == []
    store.close()


def test_a_function_whose_bundle_is_lost_says_so_and_can_be_deployed_again(tmp_path):
    async def first(server: Server):
        await server.deploy(GREET)

    async def second(server: Server):
        status = json.loads((await server.json("GET", "/system/function/greet")).body)
        assert status["availableReplicas"] == 0
        assert "there is no bundle" in status["hotset"]["problem"]
        assert (await server.deploy(GREET)).status == 202
        assert (await server.call("greet", b'"you"')).status == 200

    serving(first, tmp_path)
    for path in (tmp_path / "bundles").iterdir():
        path.rename(tmp_path / f"moved-{path.name}")
    serving(second, tmp_path)


def test_bundles_are_checked_on_the_way_in(tmp_path):
    async def story(server: Server):
        digest = await server.upload(GREET)
        assert (await server.json("GET", f"/system/bundles/{digest}")).status == 200
        assert (await server.json("GET", f"/system/bundles/{'0' * 64}")).status == 404
        assert (await server.upload(GREET)) == digest
        reply = await server.client.request("PUT", f"/system/bundles/{'0' * 64}", b"no zip file")
        assert reply.status == 400
        assert "zip" in reply.error
        archive = io.BytesIO()
        make_bundle(tmp_path / "source" / "main.py", archive)
        reply = await server.client.request("PUT", f"/system/bundles/{'0' * 64}", archive.getvalue())
        assert reply.status == 400
        assert digest in reply.error

    serving(story, tmp_path)


def test_logs_are_ndjson_and_can_be_cut_and_followed(tmp_path):
    async def story(server: Server):
        await server.deploy(GREET)
        model = server.control.functions.current["greet"].model
        for number in range(3):
            server.node.log(model, f"line {number}")
        reply = await server.json("GET", "/system/logs?name=greet&tail=2")
        lines = [json.loads(line) for line in reply.body.splitlines()]
        assert [line["text"] for line in lines] == ["line 1", "line 2"]
        assert (lines[0]["name"], lines[0]["instance"]) == ("greet", model)
        assert datetime.fromisoformat(lines[0]["timestamp"]).timestamp() == 1_000_000.0
        later = await server.json("GET", "/system/logs?name=greet&tail=-1&since=2040-01-01T00:00:00Z")
        assert later.body == b""
        assert (await server.json("GET", "/system/logs?name=nobody")).status == 404
        assert (await server.json("GET", "/system/logs?name=greet&tail=many")).status == 422
        assert (await server.json("GET", "/system/logs?name=greet&since=noon")).status == 422
        following = Reply()
        task = asyncio.create_task(server.client.request("GET", "/system/logs?name=greet&follow=true", reply=following))
        await server.advance(0.0)
        server.node.log(model, "line 3")
        await server.advance(0.0)
        server.control.logbook.close()
        await task
        assert [json.loads(line)["text"] for line in following.body.splitlines()] == [f"line {n}" for n in range(4)]

    serving(story, tmp_path)


def test_metrics_tell_what_parked_models_take_of_the_hosts_memory(tmp_path):
    async def story(server: Server):
        for name in ("greet", "other"):
            assert (await server.deploy(GREET, name)).status == 202
        for parked, name in ((0, "greet"), (1, "other")):
            await server.call(name, b'"you"')
            (host,) = json.loads((await server.json("GET", "/system/state")).body)["hosts"]
            assert (host["used_bytes"] > 0, host["capacity_bytes"]) == (parked, 512 * MIB)
            lines = (await server.json("GET", "/metrics")).body.decode().splitlines()
            for figure in ("used", "capacity"):
                (line,) = (line for line in lines if line.startswith(f"hotset_host_memory_{figure}_bytes{{"))
                labels, value = line.split()
                assert labels.endswith(f'{{node="{host["node"]}"}}')
                assert float(value) == host[f"{figure}_bytes"]

    serving(story, tmp_path, memory_bytes=100 * MIB, config=SchedulerConfig(host_memory_bytes=512 * MIB))


def test_the_rest_answers_too(tmp_path):
    async def story(server: Server):
        await server.deploy(GREET)
        called = await server.call("greet", b'"you"')
        explained = await server.json("GET", f"/system/explain/{called.headers['x-call-id']}")
        assert json.loads(explained.body)["request"]["function"] == "greet"
        assert (await server.json("GET", "/system/explain/7777")).status == 404
        state = json.loads((await server.json("GET", "/system/state?processes=true")).body)
        assert [each["gpu_id"] for each in state["gpus"]] == [GPU]
        assert len(state["processes"]) == 1
        trace = (await server.json("GET", "/system/trace")).body.splitlines()
        assert json.loads(trace[0])["hotset_trace"] == 1
        assert json.loads(trace[1])["function"] == "greet"
        metrics = await server.json("GET", "/metrics")
        assert b'hotset_requests_total{code="200",function="greet"} 1.0' in metrics.body
        assert b"hotset_host_memory_used_bytes{" not in metrics.body  # no model is ever parked here
        assert (await server.json("GET", "/healthz")).status == 200
        server.node.well = False
        sick = await server.json("GET", "/healthz")
        assert sick.status == 503
        assert "cannot start" in sick.error
        lost = await server.json("GET", "/nowhere")
        assert lost.status == 404
        assert lost.error

    serving(story, tmp_path)


def test_a_failing_datastore_is_a_500_with_its_reason(tmp_path, monkeypatch):
    async def story(server: Server):
        def broken(*_):
            raise StoreError("the disk is full: make room")

        monkeypatch.setattr(SqliteDatastore, "deploy", broken)
        reply = await server.deploy(GREET)
        assert (reply.status, reply.error) == (500, "the disk is full: make room")
        assert "greet" not in server.control.functions.current

    serving(story, tmp_path)


def test_a_bug_is_answered_too(tmp_path, monkeypatch, caplog):
    async def story(server: Server):
        def broken(*_, **__):
            raise ZeroDivisionError

        monkeypatch.setattr(system, "state_of", broken)
        reply = Reply()
        with pytest.raises(ZeroDivisionError):
            await server.client.request("GET", "/system/state", reply=reply)
        assert (reply.status, reply.error) == (500, web.BUG)
        digest = await server.upload(GREET)
        monkeypatch.setattr(SqliteDatastore, "deploy", broken)
        wanted = {"service": "greet", "image": f"sha256:{digest}"}
        watched = await server.json("POST", "/system/functions", wanted, accept="application/x-ndjson")
        assert json.loads(watched.body.splitlines()[-1])["error"] == web.BUG
        assert "nobody thought of" in caplog.text

    serving(story, tmp_path)


def test_the_usual_file_is_found(tmp_path):
    with pytest.raises(BundleError, match="holds none"):
        guess_module(tmp_path)
    (tmp_path / "anything.py").touch()
    assert guess_module(tmp_path) == "anything"
    (tmp_path / "app.py").touch()
    assert guess_module(tmp_path) == "app"
    (tmp_path / "app.py").rename(tmp_path / "unusual.py")
    with pytest.raises(BundleError, match=r"anything\.py, unusual\.py"):
        guess_module(tmp_path)


def test_an_import_that_hangs_or_floods_is_ended(tmp_path):
    source = Spawner()

    async def importing(code: str, timeout_s: float) -> str:
        (tmp_path / "main.py").write_text(code)
        seen: list[str] = []
        with pytest.raises(FunctionError) as caught:
            await describe(source, sys.executable, tmp_path, "main", {}, seen.append, timeout_s=timeout_s)
        return str(caught.value)

    async def story():
        assert "took longer than 1 s" in await importing("import time; time.sleep(60)", 1.0)
        flood = "import os; os.write(1, b'x' * 100_000 + b'\\n' + b'end'); os._exit(3)"
        message = await importing(flood, 20.0)
        assert message.endswith("end")
        assert len(message) < 2_000
        source.close()

    run(story)
