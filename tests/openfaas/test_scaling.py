"""Replicas as OpenFaaS's rules have them, and functions that leave memory because nobody calls them."""

from __future__ import annotations

import asyncio

import pytest
from faas_world import ON_GPU, Faas, echo, serving, until

from hotset.gateway.metrics import StatusMetrics
from hotset.gateway.openfaas import scaling as module
from hotset.gateway.openfaas.labels import SCALE, ScaleType, Scaling, read_scaling
from hotset.node.fake import FakeFunction


def labels(**values: str) -> dict[str, str]:
    return {f"{SCALE}{name.replace('_', '-')}": value for name, value in values.items()}


class Time:
    """The hour hand of the replicas' clock; the rest of the server keeps its own."""

    def __init__(self, faas: Faas) -> None:
        self.faas = faas
        self.now_s = faas.control.now_s()
        faas.control.now_s = lambda: self.now_s

    def pass_(self, seconds: float) -> None:
        for _ in range(int(seconds / module.TICK_S)):
            self.now_s += module.TICK_S
            self.faas.front.replicas.tick()

    def calls(self, name: str, each_tick: int, ticks: int) -> None:
        """So many good calls between two looks."""
        metrics = self.faas.control.functions.current[name].metrics
        for _ in range(ticks):
            metrics.by_status.setdefault(200, StatusMetrics()).count += each_tick
            metrics.total += each_tick
            self.pass_(module.TICK_S)


async def replicas(faas: Faas, name: str = "env") -> int:
    status = await faas.status(name)
    assert status["availableReplicas"] == status["replicas"]
    return status["replicas"]


def test_the_floor_is_there_at_once(tmp_path):
    async def story(faas: Faas):
        await faas.deploy(labels=labels(min="2"))
        assert await replicas(faas) == 2
        await faas.deploy(labels=labels(min="3"))
        assert await replicas(faas) == 3

    serving(story, tmp_path)


def test_many_good_calls_ask_for_more_and_silence_for_the_floor(tmp_path):
    async def story(faas: Faas):
        await faas.deploy(labels=labels(min="1", max="2"))
        await faas.deploy("fixed", labels=labels(min="2", max="2"))
        time = Time(faas)
        time.calls("env", 20, 5)
        assert await replicas(faas) == 2
        time.calls("env", 20, 5)
        assert await replicas(faas) == 2, "never above the ceiling"
        time.calls("fixed", 20, 5)
        assert await replicas(faas, "fixed") == 2
        time.pass_(12)
        assert await replicas(faas) == 1

    serving(story, tmp_path)


def test_load_above_a_target_asks_for_as_many_as_carry_it(tmp_path):
    async def story(faas: Faas):
        await faas.deploy("busy", labels=labels(type="capacity", target="2", target_proportion="1", max="4"))
        window = {**labels(type="rps", target="2", target_proportion="1", max="4"), f"{SCALE}down.window": "1m"}
        await faas.deploy("quick", labels=window)
        time = Time(faas)
        version = faas.control.functions.current["busy"]
        for open_calls, wanted in ((0, 1), (3, 2), (8, 4), (80, 4), (1, 1)):
            version.calls = open_calls
            time.pass_(module.TICK_S)
            assert await replicas(faas, "busy") == wanted
        version.calls = 0
        time.calls("quick", 12, 5)
        assert await replicas(faas, "quick") == 3
        time.pass_(30)
        assert await replicas(faas, "quick") == 3, "not below what was needed a minute ago"
        time.pass_(60)
        assert await replicas(faas, "quick") == 1

    serving(story, tmp_path)


def test_a_function_that_nobody_calls_leaves_gpu_memory_and_comes_back_for_the_next_call(tmp_path):
    async def story(faas: Faas):
        await faas.deploy("idle", "cat", labels=labels(zero="true", zero_duration="1m"), **ON_GPU)
        await faas.deploy("kept", "cat", **ON_GPU)
        for name in ("idle", "kept"):
            await faas.http.post(f"/function/{name}", content=b"x")
        time = Time(faas)
        time.pass_(50)
        assert (await faas.status("idle"))["hotset"]["gpus"] == ["local/virtual:0"]
        time.pass_(20)
        assert await replicas(faas, "idle") == 0
        assert (await faas.status("idle"))["hotset"]["gpus"] == []
        assert (await faas.status("kept"))["hotset"]["gpus"] == ["local/virtual:0"]
        assert (await faas.http.post("/function/idle", content=b"again")).text == "again"
        assert await replicas(faas, "idle") == 1

    serving(story, tmp_path)


def test_alerts(tmp_path):
    def alert(status: str, name: str = "env.openfaas-fn") -> dict[str, object]:
        labels = {"alertname": "APIHighInvocationRate", "function_name": name}
        return {"status": status, "receiver": "scale-up", "alerts": [{"status": status, "labels": labels}]}

    async def story(faas: Faas):
        await faas.deploy(labels=labels(max="4", factor="50"))
        for status, wanted in (("firing", 3), ("firing", 4), ("firing", 4), ("resolved", 1)):
            assert (await faas.send("POST", "/system/alert", alert(status))).status_code == 200
            assert await replicas(faas) == wanted
        assert (await faas.send("POST", "/system/alert", alert("firing", "env"))).status_code == 200
        for body, status in ((alert("firing", "absent"), 404), (alert("burning"), 400), ({}, 400)):
            assert (await faas.send("POST", "/system/alert", body)).status_code == status

    serving(story, tmp_path)


def test_replicas_are_set_within_bounds(tmp_path):
    async def story(faas: Faas):
        await faas.deploy(labels=labels(max="3"))
        for wanted, status in ((3, 202), (4, 400), (-1, 400), (1.5, 400)):
            body = {"serviceName": "env", "replicas": wanted}
            assert (await faas.send("POST", "/system/scale-function/env", body)).status_code == status
        assert await replicas(faas) == 3
        assert (await faas.send("POST", "/system/scale-function/absent", {"replicas": 1})).status_code == 404
        for text, status in (
            ('{"replicas": 2.0}', 202),
            ('{"replicas": 2.5}', 400),
            ("[" * 50_000 + "]" * 50_000, 400),
        ):
            assert (await faas.http.post("/system/scale-function/env", content=text)).status_code == status

    serving(story, tmp_path)


def test_a_removed_function_is_forgotten(tmp_path):
    async def story(faas: Faas):
        await faas.deploy(labels=labels(min="2"))
        assert await replicas(faas) == 2
        await faas.send("DELETE", "/system/functions", {"functionName": "env"})
        faas.front.replicas.tick()
        await faas.deploy()
        assert await replicas(faas) == 1

    serving(story, tmp_path)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, Scaling()),
        ({"min": "7"}, Scaling(minimum=7, maximum=7)),
        ({"min": "0", "zero": "false"}, Scaling(minimum=0, zero=False)),
        ({"type": "rps", "target": "1.5"}, Scaling(kind=ScaleType.RPS, target=1.5)),
        ({"zero_duration": "1h30m"}, Scaling(zero_after_s=5400)),
    ],
)
def test_what_labels_mean(given, meant):
    assert read_scaling(labels(**given), {}) == meant
    assert read_scaling({}, labels(**given)) == meant


async def hot(faas: Faas, name: str) -> list[str]:
    """The GPUs that hold it, once all loads are done."""
    await until(lambda: all(gpu.work is None for gpu in faas.control.scheduler.cluster.gpus.values()))
    return (await faas.status(name))["hotset"]["gpus"]


def test_the_floor_is_hot_before_the_first_call_and_nobodys_victim(tmp_path):
    async def story(faas: Faas):
        await faas.deploy("kept", "cat", labels=labels(min="1"), **ON_GPU)
        assert len(await hot(faas, "kept")) == 1
        for name in ("b", "c", "d"):
            await faas.deploy(name, "cat", **ON_GPU)
        for name in ("kept", "b", "c", "d"):
            await faas.http.post(f"/function/{name}", content=b"x")
        assert [name for name in ("kept", "b", "c", "d") if await hot(faas, name)] == ["kept", "c", "d"]

    serving(story, tmp_path)


def test_the_ceiling_bounds_the_gpus_that_hold_a_copy(tmp_path):
    async def story(faas: Faas):
        faas.node.default = FakeFunction(load_s=0.0, inference_s=0.001, respond=echo)
        await faas.deploy("few", "cat", labels=labels(max="2"), **ON_GPU)
        await faas.deploy("many", "cat", **ON_GPU)
        for name, most in (("few", 2), ("many", 4)):
            calls = [faas.http.post(f"/function/{name}", content=b"x") for _ in range(40)]
            assert {reply.status_code for reply in await asyncio.gather(*calls)} == {200}
            assert len(await hot(faas, name)) == most
        await faas.deploy("few", "cat", labels=labels(max="1"), **ON_GPU)
        assert len(await hot(faas, "few")) == 1, "the same version: one of its copies leaves"

    serving(story, tmp_path, gpus=4)


def test_zero_takes_the_floor_out_of_gpu_memory_until_the_next_call(tmp_path):
    async def story(faas: Faas):
        await faas.deploy("kept", "cat", labels=labels(min="2"), **ON_GPU)
        assert len(await hot(faas, "kept")) == 2
        none = {"serviceName": "kept", "replicas": 0}
        await faas.send("POST", "/system/scale-function/kept", none)
        assert (await replicas(faas, "kept"), await hot(faas, "kept")) == (0, [])
        await faas.http.post("/function/kept", content=b"x")
        assert (await replicas(faas, "kept"), len(await hot(faas, "kept"))) == (2, 2)
        await faas.send("POST", "/system/scale-function/kept", none)
        await faas.send("POST", "/system/scale-function/kept", none | {"replicas": 1})
        assert (await replicas(faas, "kept"), len(await hot(faas, "kept"))) == (1, 2)
        await faas.send("POST", "/system/scale-function/kept", none)
        await faas.deploy("kept", "cat", labels=labels(min="1"), **ON_GPU)
        assert (await replicas(faas, "kept"), len(await hot(faas, "kept"))) == (1, 1)

    serving(story, tmp_path, gpus=3)


def test_a_number_that_was_asked_for_stays(tmp_path):
    async def story(faas: Faas):
        await faas.deploy()
        await faas.send("POST", "/system/scale-function/env", {"serviceName": "env", "replicas": 3})
        Time(faas).pass_(60)
        assert await replicas(faas) == 3

    serving(story, tmp_path)
