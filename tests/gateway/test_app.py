"""The front door: what HTTP clients see of calls, good and bad."""

from __future__ import annotations

import asyncio
import random

import pytest
from gateway_world import GPU, Client, Reply, World, run, version

from hotset.gateway.app import Gateway
from hotset.gateway.bodies import Bodies
from hotset.gateway.readings import waiting
from hotset.node.interface import Answer, Call
from hotset.scheduling.config import SchedulerConfig
from hotset.vocabulary import FailureKind

LIMIT = 1000


async def no_rest(scope, receive, send):
    raise AssertionError(f"{scope['path']} is not a call")


class Door(World):
    """A world with a front door; answers come at once unless a test says otherwise."""

    def __init__(self, **how) -> None:
        super().__init__(**how)
        self.client = Client(Gateway(self.control, no_rest, Bodies(self.control, max_body_bytes=LIMIT)))

    async def post(self, path: str, body: bytes | list[bytes] = b"", method: str = "POST", **headers: str) -> Reply:
        task = asyncio.create_task(
            self.client.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        )
        for _ in range(1000):
            await self.advance(0.05)
            if task.done():
                return task.result()
        raise AssertionError("no answer")


def test_an_answer_says_what_happened():
    async def story():
        door = Door()
        await door.start(version("cat"))
        reply = await door.post("/function/cat", b"meow", content_type="text/plain")
        assert (reply.status, reply.body, reply.headers["content-type"]) == (200, b"meow", "text/plain")
        assert reply.headers["x-hotset-gpu"] == GPU
        assert reply.headers["x-hotset-cache"] == "miss"
        assert float(reply.headers["x-hotset-load-seconds"]) == pytest.approx(0.1)
        assert float(reply.headers["x-hotset-inference-seconds"]) == pytest.approx(0.01)
        assert float(reply.headers["x-duration-seconds"]) == pytest.approx(0.11)
        assert reply.headers["x-hotset-queue-seconds"] == "0.000000"
        assert door.control.ids.request_id(reply.headers["x-call-id"]) == 1
        assert (await door.post("/function/cat", b"meow")).headers["x-hotset-cache"] == "hit"

    run(story)


@pytest.mark.parametrize(
    "path", ["/function/cat", "/function/cat/", "/function/cat/deeper", "/function/cat.openfaas-fn"]
)
def test_a_function_has_several_addresses(path):
    async def story():
        door = Door()
        await door.start(version("cat"))
        assert (await door.post(path, b"x")).status == 200

    run(story)


@pytest.mark.parametrize("path", ["/function/dog", "/function/", "/function/.openfaas-fn", "/function/cat.elsewhere"])
def test_an_unknown_function_is_a_404_that_says_what_to_do(path):
    async def story():
        door = Door()
        await door.start(version("cat"))
        reply = await door.post(path, b"x")
        assert reply.status == 404
        assert "deploy it" in reply.error

    run(story)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_every_method_reaches_the_function(method):
    async def story():
        door = Door()
        await door.start(version("cat"))
        assert (await door.post("/function/cat", b"x", method=method)).status == 200

    run(story)


def test_a_method_nobody_knows_is_refused():
    async def story():
        door = Door()
        await door.start(version("cat"))
        assert (await door.post("/function/cat", method="BREW")).status == 405

    run(story)


def test_a_body_may_come_in_parts():
    async def story():
        door = Door()
        await door.start(version("cat"))
        assert (await door.post("/function/cat", [b"me", b"", b"ow"])).body == b"meow"

    run(story)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"", {"content-length": str(LIMIT + 1)}),
        (b"x" * (LIMIT + 1), {}),
        ([b"x" * LIMIT, b"x"], {}),
        ([b"x" * 400, b"x" * 400, b"x" * 400, b""], {}),
    ],
)
def test_a_body_over_the_limit_is_refused_as_soon_as_that_is_known(body, headers):
    async def story():
        door = Door()
        await door.start(version("cat"))
        reply = await door.client.request("POST", "/function/cat", body, headers)
        assert (reply.status, reply.headers["connection"]) == (413, "close")
        assert str(LIMIT) in reply.error
        assert waiting(door.control) == {"cat": 0}

    run(story)


def test_a_server_that_holds_enough_bodies_takes_no_more():
    async def story():
        door = Door()
        await door.start(version("cat"))
        bodies = Bodies(door.control, max_body_bytes=LIMIT, max_open_bytes=LIMIT)
        door.client.application = Gateway(door.control, no_rest, bodies)
        door.control.submit("cat", b"x" * 600)
        for body in (b"x" * 401, [b"x" * 200, b"x" * 200, b"x"]):
            reply = await door.client.request("POST", "/function/cat", body)
            assert (reply.status, reply.headers["retry-after"]) == (429, "1")
        assert (await door.post("/function/cat", b"x" * 400)).status == 200
        assert (await door.post("/function/cat", [b"x" * 500, b"x" * 500])).status == 200
        assert door.control.open_body_bytes == 0

    run(story)


def test_a_body_at_the_limit_is_taken():
    async def story():
        door = Door()
        await door.start(version("cat"))
        assert (await door.post("/function/cat", [b"x" * (LIMIT - 1), b"x"])).status == 200

    run(story)


@pytest.mark.parametrize("timeout", ["soon", "0", "-1", "nan", "inf", ""])
def test_a_timeout_must_be_a_time(timeout):
    async def story():
        door = Door()
        await door.start(version("cat"))
        reply = await door.post("/function/cat", x_hotset_timeout=timeout)
        assert reply.status == 400
        assert "X-Hotset-Timeout" in reply.error

    run(story)


def test_a_callers_timeout_is_kept():
    async def story():
        door = Door()
        await door.start(version("cat"))
        door.behave("cat@1", inference_s=30.0)
        reply = await door.post("/function/cat", x_hotset_timeout="0.5")
        assert reply.status == 504
        assert 0.5 <= float(reply.headers["x-duration-seconds"]) < 0.7

    run(story)


def test_a_full_queue_says_when_to_come_back():
    async def story():
        door = Door(config=SchedulerConfig(max_queue=1))
        await door.start(version("cat"))
        for _ in range(2):
            door.control.submit("cat", b"")
        reply = await door.client.request("POST", "/function/cat")
        assert reply.status == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert "x-hotset-gpu" not in reply.headers

    run(story)


def test_a_functions_own_errors_pass_through():
    def refuse(call: Call) -> list[Answer]:
        return [Answer(request_id=call.request_id, status=400, body=b'{"error": "text: expected a string"}')]

    async def story():
        door = Door()
        await door.start(version("cat"))
        door.behave("cat@1", respond=refuse)
        reply = await door.post("/function/cat", b"{}")
        assert (reply.status, reply.error) == (400, "text: expected a string")

    run(story)


def count(content_type: str):
    def respond(call: Call) -> list[Answer]:
        return [
            Answer(request_id=call.request_id, content_type=content_type, body=b"%d\n" % number) for number in (1, 2, 3)
        ]

    return respond


def test_a_stream_is_sent_as_it_comes():
    async def story():
        door = Door()
        await door.start(version("count"))
        door.behave("count@1", respond=count("application/x-ndjson"))
        reply = await door.post("/function/count", accept="application/x-ndjson")
        assert reply.chunks == [b"1\n", b"2\n", b"3\n", b""]
        assert reply.complete
        assert "content-length" not in reply.headers
        assert reply.headers["x-hotset-cache"] == "miss"

    run(story)


@pytest.mark.parametrize(
    ("content_type", "start"),
    [("application/x-ndjson", b'{"error":"'), ("text/event-stream; charset=utf-8", b'event: error\ndata: {"error":"')],
)
def test_a_stream_that_breaks_off_says_so_and_does_not_end_well(content_type, start):
    async def story():
        door = Door()
        await door.start(version("count"))
        door.behave("count@1", inference_s=3.0, load_s=0.0, respond=count(content_type))
        reply = Reply()
        task = asyncio.create_task(door.client.request("POST", "/function/count", reply=reply))
        await door.advance(1.5, steps=10)
        door.control.run_failed(GPU, "count@1", FailureKind.CRASH, "killed by SIGKILL", ())
        await task
        assert (reply.status, reply.complete) == (200, False)
        assert reply.chunks[0] == b"1\n"
        assert reply.chunks[-1].startswith(start)
        assert b"killed by SIGKILL" in reply.chunks[-1]

    run(story)


def test_a_client_that_leaves_takes_its_call_along():
    async def story():
        door = Door()
        await door.start(version("cat"))
        door.behave("cat@1", inference_s=10.0)
        running = asyncio.create_task(door.client.request("POST", "/function/cat"))
        queued = asyncio.create_task(door.client.request("POST", "/function/cat"))
        await door.advance(1.0, steps=10)
        assert waiting(door.control) == {"cat": 1}
        door.client.left.set()
        await door.advance(0.1)
        assert waiting(door.control) == {"cat": 0}
        assert [(await running).status, (await queued).status] == [499, 499]

    run(story)


def test_a_client_that_leaves_while_it_sends_was_never_there():
    async def story():
        door = Door()
        await door.start(version("cat"))
        door.client.left.set()
        messages = [{"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}]

        async def receive():
            return messages.pop(0)

        async def send(message):
            raise AssertionError("nobody is there")

        scope = {"type": "http", "method": "POST", "path": "/function/cat", "headers": []}
        await door.client.application(scope, receive, send)
        messages.append({"type": "http.disconnect"})
        await door.client.application(scope, receive, send)
        assert not door.control.records

    run(story)


def test_a_cancelled_server_task_is_a_client_that_left():
    async def story():
        door = Door()
        await door.start(version("cat"))
        door.behave("cat@1", inference_s=10.0)
        task = asyncio.create_task(door.client.request("POST", "/function/cat"))
        await door.advance(1.0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert [each.status for each in door.control.records] == [499]

    run(story)


def test_a_thousand_malformed_requests_get_a_4xx_each_and_harm_nobody():
    """The transport's part: addresses, headers and sizes. Bodies that do not fit a signature are the worker's part."""
    draw = random.Random(7)

    def malformed() -> tuple[str, str, bytes, dict[str, str]]:
        junk = "".join(draw.choice("abz09-._~%\\{}\u00e9 /") for _ in range(draw.randrange(1, 40)))
        match draw.randrange(5):
            case 0:
                return "POST", f"/function/{junk}", draw.randbytes(20), {}
            case 1:
                return "POST", "/function/cat", draw.randbytes(20), {"x-hotset-timeout": f"x{junk}"}
            case 2:
                return "POST", "/function/cat", draw.randbytes(LIMIT + draw.randrange(1, 100)), {}
            case 3:
                return "POST", "/function/cat", b"", {"content-length": f"{draw.choice('-x+')}{draw.randrange(10**9)}"}
            case _:
                return f"M{draw.randrange(100)}", "/function/cat", b"", {}

    async def story():
        door = Door()
        await door.start(version("cat"))
        for _ in range(1000):
            method, path, body, headers = malformed()
            reply = await door.client.request(method, path, body, headers)
            assert 400 <= reply.status < 500, (method, path, headers, reply)
            assert reply.error
        assert (await door.post("/function/cat", b"well")).body == b"well"
        assert [each.status for each in door.control.records] == [200]

    run(story)
