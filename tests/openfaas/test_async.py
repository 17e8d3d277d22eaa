"""Asynchronous calls: on the disk before the client hears of it, made when there is room, tried until they end."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from faas_world import ON_GPU, Faas, echo, serving, until

from hotset.functions.http_envelope import RESPONSE, ResponseHead, pack
from hotset.gateway.auth import ApiKeys, key_digest
from hotset.gateway.callers import NOBODY, Caller, Callers
from hotset.gateway.control import Control
from hotset.gateway.openfaas import queue as queue_module
from hotset.gateway.openfaas.callbacks import CallbackPolicy
from hotset.gateway.openfaas.labels import Retrying, go_duration_s, read_retrying
from hotset.node.fake import FakeFunction
from hotset.node.interface import Answer, Call
from hotset.store import async_calls
from hotset.store.datastore import ApiKeyRecord

CALLBACK = "http://app.example.com/done?id=1"


class Receiver:
    """Where callbacks arrive."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.failures = 0
        """So many of the next ones are answered 503."""

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.failures:
            self.failures -= 1
            return httpx.Response(503)
        self.requests.append(request)
        return httpx.Response(200)


def with_callbacks(story, data, **how) -> None:
    receiver = Receiver()

    async def told(faas: Faas):
        await story(faas, receiver)

    serving(told, data, callbacks=receiver, allow_callbacks=("*",), **how)


async def all_ended(faas: Faas) -> None:
    """What has ended well is gone, with the next write."""
    async with asyncio.timeout(20):
        while (await faas.get("/system/async")).json():
            await asyncio.sleep(0.002)


@pytest.fixture(autouse=True)
def _resolves(monkeypatch):
    """Names are numbers without a network."""

    async def address(self, parts):
        return "203.0.113.7"

    monkeypatch.setattr(CallbackPolicy, "address", address)
    monkeypatch.setattr(queue_module, "CALLBACK_WAIT_S", 0.001)


def test_a_call_is_accepted_made_and_called_back(tmp_path):
    async def story(faas: Faas, receiver: Receiver):
        await faas.deploy("cat", "cat")
        headers = {"x-callback-url": CALLBACK, "content-type": "text/plain", "x-own": "1"}
        reply = await faas.http.post("/async-function/cat.openfaas-fn/some/path?a=b", content=b"hello", headers=headers)
        assert (reply.status_code, reply.content) == (202, b"")
        assert int(reply.headers["x-start-time"]) > 0
        await until(lambda: bool(receiver.requests))
        (callback,) = receiver.requests
        assert (callback.method, callback.content) == ("POST", b"hello")
        assert str(callback.url) == "http://203.0.113.7/done?id=1"
        assert callback.headers["host"] == "app.example.com"
        assert callback.headers["content-type"] == "text/plain"
        assert callback.headers["x-function-status"] == "200"
        assert callback.headers["x-function-name"] == "cat.openfaas-fn"
        assert callback.headers["x-call-id"] == reply.headers["x-call-id"]
        assert float(callback.headers["x-duration-seconds"]) > 0
        assert callback.headers["x-start-time"]
        await all_ended(faas)

    with_callbacks(story, tmp_path)


def test_a_clients_own_call_id_is_kept_and_other_methods_are_not_routed(tmp_path):
    async def story(faas: Faas, receiver: Receiver):
        await faas.deploy("env", "env")
        headers = {"x-callback-url": CALLBACK, "x-call-id": "mine"}
        reply = await faas.http.post("/async-function/env/deep?a=b", headers=headers)
        assert reply.headers["x-call-id"] == "mine"
        await until(lambda: bool(receiver.requests))
        lines = receiver.requests[0].content.decode().splitlines()
        for line in ("Http_X_Call_Id=mine", "Http_Path=/deep", "Http_Query=a=b", "Http_Method=POST"):
            assert line in lines
        assert not any("Callback" in line for line in lines)
        for method in ("GET", "PUT", "DELETE"):
            assert (await faas.http.request(method, "/async-function/env")).status_code == 405
        for url in ("no-url", "ftp://app.example.com/", "http://", "http://a:99999/", "http://" + "a" * 3000):
            refused = await faas.http.post("/async-function/env", headers={"x-callback-url": url})
            assert (refused.status_code, "X-Callback-Url" in refused.json()["error"]) == (400, True), url
        assert (await faas.http.post("/async-function/no%20name")).status_code == 404

    with_callbacks(story, tmp_path)


def answering(*statuses: int):
    """A function that answers with these statuses, one after the other, and then with the last for ever."""
    left = list(statuses)

    def respond(call: Call) -> list[Answer]:
        status = left.pop(0) if len(left) > 1 else left[0]
        body = pack(ResponseHead([("content-type", "text/plain")]), b"status %d" % status)
        return [Answer(request_id=call.request_id, status=status, content_type=RESPONSE, body=body)]

    return respond


FAST = {**ON_GPU["annotations"], "com.openfaas.retry.min_wait": "1ms", "com.openfaas.retry.max_wait": "2ms"}


def test_a_call_that_is_answered_too_busy_is_tried_again(tmp_path):
    async def story(faas: Faas, receiver: Receiver):
        faas.node.default = FakeFunction(load_s=0, inference_s=0, respond=answering(429, 502, 503, 504, 200))
        await faas.deploy("cat", "cat", annotations=FAST)
        await faas.http.post("/async-function/cat", headers={"x-callback-url": CALLBACK})
        await until(lambda: bool(receiver.requests))
        assert receiver.requests[0].headers["x-function-status"] == "200"
        assert len([each for each in faas.node.operations if each.verb == "run"]) == 5

    with_callbacks(story, tmp_path)


def test_a_call_cannot_pretend_to_come_through_the_v2_front_door(tmp_path):
    async def story(faas: Faas, receiver: Receiver):
        await faas.deploy("cat", "cat", annotations=FAST)
        headers = {"x-callback-url": CALLBACK, "content-type": "application/vnd.hotset.v2; warm"}
        await faas.http.post("/async-function/cat", headers=headers)
        await until(lambda: bool(receiver.requests))
        assert receiver.requests[0].headers["x-function-status"] == "415"

    with_callbacks(story, tmp_path)


def test_a_functions_own_failure_is_an_answer(tmp_path):
    async def story(faas: Faas, receiver: Receiver):
        faas.node.default = FakeFunction(load_s=0, inference_s=0, respond=answering(500))
        await faas.deploy("cat", "cat", annotations=FAST)
        await faas.http.post("/async-function/cat", headers={"x-callback-url": CALLBACK})
        await until(lambda: bool(receiver.requests))
        assert (receiver.requests[0].headers["x-function-status"], receiver.requests[0].content) == (
            "500",
            b"status 500",
        )
        await all_ended(faas)

    with_callbacks(story, tmp_path)


def test_what_cannot_be_made_is_a_dead_letter_that_can_be_tried_again(tmp_path):
    async def story(faas: Faas, receiver: Receiver):
        faas.node.default = FakeFunction(load_s=0, inference_s=0, respond=answering(503))
        await faas.deploy("cat", "cat", annotations=FAST, labels={"com.openfaas.retry.attempts": "3"})
        busy = await faas.http.post("/async-function/cat", headers={"x-callback-url": CALLBACK})
        await faas.http.post("/async-function/absent", headers={"x-callback-url": CALLBACK})
        await until(lambda: len(receiver.requests) == 2 and not faas.queued())
        assert {each.headers["x-function-status"] for each in receiver.requests} == {"503", "404"}
        dead = (await faas.get("/system/async", state="dead")).json()
        assert [(each["function"], each["status"], each["attempts"]) for each in dead] == [
            ("absent", 404, 1),
            ("cat", 503, 3),
        ]
        assert "status 503" in dead[1]["reason"]
        faas.node.default = FakeFunction(load_s=0, inference_s=0, respond=echo)
        faas.node.functions.clear()
        call_id = busy.headers["x-call-id"]
        assert (await faas.send("POST", f"/system/async/{call_id}/retry")).status_code == 202
        await until(lambda: len(receiver.requests) == 3 and not faas.queued())
        assert receiver.requests[-1].headers["x-function-status"] == "200"
        assert (await faas.send("DELETE", f"/system/async/{dead[0]['call_id']}")).status_code == 202
        assert (await faas.get("/system/async")).json() == []
        for method, path in (("POST", f"/system/async/{call_id}/retry"), ("DELETE", "/system/async/none")):
            assert (await faas.send(method, path)).status_code == 404
        for query in ({"state": "lost"}, {"limit": "0"}):
            assert (await faas.get("/system/async", **query)).status_code == 400

    with_callbacks(story, tmp_path)


def test_a_callback_is_sent_until_it_is_taken_and_a_dead_letter_when_it_is_not(tmp_path):
    async def story(faas: Faas, receiver: Receiver):
        await faas.deploy("cat", "cat")
        receiver.failures = 2
        await faas.http.post("/async-function/cat", content=b"x", headers={"x-callback-url": CALLBACK})
        await until(lambda: len(receiver.requests) == 1)
        receiver.failures = 1000
        await faas.http.post("/async-function/cat", content=b"x", headers={"x-callback-url": CALLBACK})
        await until(lambda: not faas.queued())
        (dead,) = (await faas.get("/system/async")).json()
        assert (dead["state"], dead["status"], dead["reason"]) == ("dead", 200, "the callback was answered 503")

    with_callbacks(story, tmp_path)


def test_asynchronous_calls_wait_while_interactive_ones_have_the_gpu(tmp_path):
    async def story(faas: Faas, receiver: Receiver):
        faas.node.default = FakeFunction(load_s=0, inference_s=0.05, respond=echo)
        await faas.deploy("cat", "cat", **ON_GPU)
        interactive = [asyncio.create_task(faas.http.post("/function/cat", content=b"now")) for _ in range(5)]
        await until(lambda: faas.control.open_gpu_calls == 5)
        for _ in range(3):
            await faas.http.post("/async-function/cat", content=b"later", headers={"x-callback-url": CALLBACK})
        while not all(each.done() for each in interactive):
            assert faas.control.open_gpu_calls <= 5, "no asynchronous call was handed in"
            assert not receiver.requests
            await asyncio.sleep(0.001)
        await until(lambda: len(receiver.requests) == 3)

    with_callbacks(story, tmp_path)


def test_no_more_asynchronous_calls_are_handed_in_than_run_at_once_and_functions_take_turns(tmp_path):
    async def story(faas: Faas, receiver: Receiver):
        faas.node.default = FakeFunction(load_s=0, inference_s=0.1, respond=echo)
        await faas.deploy("many", "cat", **ON_GPU)
        await faas.deploy("few", "cat", labels={"com.openfaas.scale.max": "1"}, **ON_GPU)
        await faas.deploy("cpu", "cat")
        most: dict[str, int] = {"many": 0, "few": 0}
        submit = faas.control.submit

        def watched(function, *args, **kwargs):
            pending = submit(function, *args, **kwargs)
            if function in most:
                most[function] = max(most[function], faas.control.functions.current[function].calls)
                assert faas.control.open_gpu_calls <= 2, "one for each GPU"
            return pending

        faas.control.submit = watched
        for name in ("many", "few", "cpu"):
            for number in range(6):
                reply = await faas.http.post(f"/async-function/{name}", content=str(number).encode())
                assert reply.status_code == 202
        await until(lambda: not faas.queued())
        assert most == {"many": 2, "few": 1}

    with_callbacks(story, tmp_path, gpus=2)


def test_calls_survive_a_restart(tmp_path):
    async def first(faas: Faas, receiver: Receiver):
        await faas.deploy("cat", "cat", **ON_GPU)
        faas.node.default = FakeFunction(load_s=3600, respond=echo)
        for number in range(5):
            headers = {"x-callback-url": CALLBACK, "x-call-id": f"call-{number}"}
            assert (await faas.http.post("/async-function/cat", content=b"x", headers=headers)).status_code == 202
        assert len((await faas.get("/system/async", state="queued")).json()) == 5

    async def second(faas: Faas, receiver: Receiver):
        await until(lambda: len(receiver.requests) == 5)
        assert {each.headers["x-call-id"] for each in receiver.requests} == {f"call-{number}" for number in range(5)}

    with_callbacks(first, tmp_path)
    with_callbacks(second, tmp_path)


def test_a_call_is_on_the_account_of_who_sent_it_even_if_his_key_is_gone_when_it_is_made(tmp_path):
    key = ApiKeyRecord(
        name="team-a", function="cat", digest=key_digest(b"hs_a"), created_at_s=0.0, weight=2.0, priority=1
    )

    async def first(faas: Faas, receiver: Receiver):
        await faas.deploy("cat", "cat", **ON_GPU)
        faas.node.default = FakeFunction(load_s=3600, respond=echo)
        faas.control.callers = Callers(ApiKeys([key]), "X-Tenant")
        for headers in ({"x-api-key": "hs_a", "x-hotset-priority": "2"}, {"x-tenant": "ann"}, {}):
            reply = await faas.http.post("/async-function/cat", headers={"x-callback-url": CALLBACK, **headers})
            assert reply.status_code == 202
        refused = await faas.http.post("/async-function/cat", headers={"x-hotset-priority": "high"})
        assert (refused.status_code, "priority" in refused.json()["error"]) == (400, True)
        assert faas.queued() == 3

    async def second(faas: Faas, receiver: Receiver):
        await until(lambda: len(receiver.requests) == 3)
        assert {each.headers["x-function-status"] for each in receiver.requests} == {"200"}
        usage = faas.control.scheduler.cluster.queues.usage
        assert {name: spent.requests for name, spent in usage.items()} == {"team-a": 1, "ann": 1, "": 1}
        assert sorted(seen, key=lambda each: each.name) == [NOBODY, Caller("ann"), Caller("team-a", 2.0, 1)]

    seen: list[Caller] = []
    submit = Control.submit

    def watched(self, *args, caller, **kwargs):
        seen.append(caller)
        return submit(self, *args, caller=caller, **kwargs)

    with_callbacks(first, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Control, "submit", watched)
        with_callbacks(second, tmp_path)


def test_a_flood_of_one_caller_or_for_one_function_keeps_nobody_waiting_until_it_is_over(tmp_path):
    async def story(faas: Faas, receiver: Receiver):
        faas.control.callers = Callers(header="X-Tenant")
        faas.node.default = FakeFunction(load_s=0, inference_s=0.02, respond=echo)
        for name in ("cat", "dog"):
            await faas.deploy(name, "cat", **ON_GPU)
        for _ in range(30):
            await faas.http.post("/async-function/cat", headers={"x-tenant": "flood"})
        for function, tenant in (("cat", "ann"), ("dog", "bob")):
            headers = {"x-tenant": tenant, "x-callback-url": CALLBACK}
            assert (await faas.http.post(f"/async-function/{function}", headers=headers)).status_code == 202
        await until(lambda: len(receiver.requests) == 2)
        assert faas.queued() > 10, "the flood goes on"

    with_callbacks(story, tmp_path)


def test_a_streamed_answer_is_gathered(tmp_path):
    async def story(faas: Faas, receiver: Receiver):
        def stream(call: Call) -> list[Answer]:
            head = pack(ResponseHead([("content-type", "text/event-stream")]), b"")
            return [
                Answer(request_id=call.request_id, content_type=RESPONSE, body=body, final=body == b"two")
                for body in (head, b"one", b"two")
            ]

        faas.node.default = FakeFunction(load_s=0, inference_s=0.001, respond=stream)
        await faas.deploy("cat", "cat", annotations=FAST)
        await faas.http.post("/async-function/cat", headers={"x-callback-url": CALLBACK})
        await until(lambda: bool(receiver.requests))
        assert receiver.requests[0].content == b"onetwo"
        assert receiver.requests[0].headers["content-type"] == "text/event-stream"

    with_callbacks(story, tmp_path)


def test_a_full_queue_says_when_to_come_back(tmp_path):
    async def story(faas: Faas, receiver: Receiver):
        await faas.deploy("cat", "cat")
        faas.front.queue._most_queued = 0
        reply = await faas.http.post("/async-function/cat")
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "5")

    with_callbacks(story, tmp_path)


def test_how_calls_are_tried_again_is_said_in_labels_or_annotations():
    assert read_retrying({}, {}) == Retrying()
    said = read_retrying({"com.openfaas.retry.attempts": "3"}, {"com.openfaas.retry.codes": "429, 500"})
    assert (said.attempts, said.codes) == (3, (429, 500))
    assert [Retrying(min_wait_s=1, max_wait_s=5).wait_s(n) for n in (1, 2, 3, 4, 100)] == [1, 2, 4, 5, 5]
    assert go_duration_s("1h30m") == 5400
    assert go_duration_s("soon") is None


def test_bodies_are_bounded_too_and_so_are_dead_letters(tmp_path, monkeypatch):
    async def story(faas: Faas, receiver: Receiver):
        monkeypatch.setattr(queue_module, "MOST_BYTES", 10)
        monkeypatch.setattr(async_calls, "MOST_DEAD", 2)
        faas.node.default = FakeFunction(load_s=3600, respond=echo)
        await faas.deploy("cat", "cat", **ON_GPU)
        assert (await faas.http.post("/async-function/cat", content=b"0123456789")).status_code == 202
        await until(lambda: faas.queued() == 1)
        assert (await faas.http.post("/async-function/cat", content=b"")).status_code == 429
        monkeypatch.setattr(queue_module, "MOST_BYTES", 100)
        for number in range(4):
            headers = {"x-call-id": f"call-{number}"}
            await faas.http.post("/async-function/absent", content=b"x", headers=headers)
        await until(lambda: faas.queued() == 1)
        dead = (await faas.get("/system/async", state="dead")).json()
        assert [each["call_id"] for each in dead] == ["call-3", "call-2"]

    with_callbacks(story, tmp_path)
