"""Calls that their connection hands in and answers itself, and those it leaves to the application."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
import uvicorn
from gateway_world import GPU, World, run, version
from uvicorn.server import ServerState
from wire import Wire, parsed

from hotset.gateway.app import Gateway
from hotset.gateway.auth import ApiKeys, Guard, key_digest
from hotset.gateway.bodies import Bodies
from hotset.gateway.direct import DirectProtocol
from hotset.gateway.intake import READ_BYTES, Intake
from hotset.node.interface import Answer, Call
from hotset.scheduling.scheduler import SchedulerConfig
from hotset.store.datastore import ApiKeyRecord


class Line(World):
    """A world with one connection to it; ``tasks`` counts the requests that uvicorn made a task for."""

    def __init__(self, keys: ApiKeys | None = None, limits: dict[str, int] | None = None, **how: Any) -> None:
        super().__init__(**how)
        self.limits = limits or {}
        self.keys = keys or ApiKeys()
        self.wire = Wire()
        self.tasks = 0
        self.underway = b""

    async def open(self) -> Line:
        await self.start(version("cat"), version("dog"))
        self.bodies = Bodies(self.control, **self.limits)
        gateway = Gateway(self.control, self.rest, self.bodies)
        guard = Guard(gateway, None, self.keys)
        self.state = ServerState()
        self.state.default_headers = [(b"date", b"today")]
        config = uvicorn.Config(guard, ws="none", log_config=None, lifespan="off")
        self.connection = DirectProtocol(
            self.control,
            self.bodies,
            {b"/function/": gateway},
            guard.admits,
            config=config,
            server_state=self.state,
            app_state={},
            _loop=asyncio.get_running_loop(),
        )
        start = self.connection.loop.create_task
        self.connection.loop.create_task = partial(self.counted, start)  # type: ignore[method-assign]
        self.intake = Intake(self.connection, memoryview(bytearray(READ_BYTES)))
        self.intake.connection_made(self.wire)  # type: ignore[arg-type]
        return self

    def counted(self, start: Any, coroutine: Any, **how: Any) -> Any:
        self.tasks += coroutine.__name__ == "run_asgi"
        return start(coroutine, **how)

    async def rest(self, scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError(f"{scope['path']} is not a call")

    def send(self, *requests: bytes) -> None:
        """Bytes arrive, in reads as large as the connection asks for, while it reads."""
        self.underway = self.wire.arrive(self.intake, self.underway + b"".join(requests))

    async def answers(self, count: int = 1) -> list[tuple[int, dict[str, str], bytes]]:
        """Status, headers and body of so many responses, all that there are."""
        for _ in range(200):
            if self.wire.sent.count(b"HTTP/1.1 ") >= count:
                break
            self.send()
            await self.advance(0.05)
        return parsed(self.wire.sent)


def post(path: str, body: bytes = b"x", *lines: str, method: str = "POST", http: str = "1.1") -> bytes:
    head = [f"{method} {path} HTTP/{http}", "host: here", f"content-length: {len(body)}", *lines, "", ""]
    return "\r\n".join(head).encode() + body


def test_a_short_post_needs_no_task_and_says_what_happened():
    async def story():
        line = await Line().open()
        line.send(post("/function/cat", b"meow", "content-type: text/plain"))
        ((status, headers, body),) = await line.answers()
        assert (status, body, headers["content-type"]) == (200, b"meow", "text/plain")
        assert (headers["date"], headers["x-hotset-gpu"], headers["x-hotset-cache"]) == ("today", GPU, "miss")
        assert line.control.ids.request_id(headers["x-call-id"]) == 1
        assert float(headers["x-hotset-load-seconds"]) == pytest.approx(0.1)
        assert line.tasks == 0
        assert not line.wire.closed

        line.send(post("/function/cat", b"m" * 70_000, method="PUT"))  # not for that way: no other difference
        _, (status, others, body) = await line.answers(2)
        assert (status, len(body), others["x-hotset-cache"]) == (200, 70_000, "hit")
        assert others.keys() == headers.keys()
        assert line.tasks == 1
        assert line.state.total_requests == 2

    run(story)


def test_a_body_may_come_in_pieces():
    async def story():
        line = await Line().open()
        request = post("/function/cat", b"meow")
        for at in range(len(request)):
            assert not line.wire.sent
            line.send(request[at : at + 1])
        ((status, _, body),) = await line.answers()
        assert (status, body, line.tasks) == (200, b"meow", 0)

    run(story)


@pytest.mark.parametrize(
    "request_",
    [
        b"POST /function/cat HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
        post("/function/cat", method="PUT"),
        post("/function/cat.openfaas-fn"),
        post("/function/cat/deeper"),
    ],
    ids=["in chunks", "no POST", "by its full name", "with a path"],
)
def test_other_calls_go_to_the_application(request_):
    async def story():
        line = await Line().open()
        line.send(request_)
        ((status, _, body),) = await line.answers()
        assert (status, body) == (200, b"x")
        assert line.tasks == 1

    run(story)


def test_who_waits_to_be_told_to_go_on_is_told():
    async def story():
        line = await Line().open()
        line.send(post("/function/cat", b"meow", "expect: 100-continue")[:-4])
        await line.advance()
        assert line.wire.sent == b"HTTP/1.1 100 Continue\r\n\r\n"
        line.wire.sent = b""
        line.send(b"meow")
        assert [(status, body) for status, _, body in await line.answers()] == [(200, b"meow")]

    run(story)


@pytest.mark.parametrize(
    ("request_", "expected", "words"),
    [
        (post("/function/cow"), 404, "deploy it"),
        (post("/function/cat", b"x", "x-hotset-timeout: soon"), 400, "X-Hotset-Timeout"),
        (post("/function/cat", b"x", "content-type: application/vnd.hotset.v2"), 415, "/v2/models"),
        (post("/function/cat"), 401, "called with a key"),
    ],
)
def test_refusals_are_the_applications(request_, expected, words):
    async def story():
        keys = ApiKeys([ApiKeyRecord(name="k", function="cat", digest=key_digest(b"k"), created_at_s=0.0)])
        line = await Line(keys if expected == 401 else None).open()
        line.send(request_)
        ((status, _, body),) = await line.answers()
        assert status == expected
        assert words in body.decode()
        line.wire.sent = b""
        line.send(post("/function/cat", b"meow", "authorization: Bearer k"))
        assert [(status, body) for status, _, body in await line.answers()] == [(200, b"meow")]
        assert line.tasks == 1

    run(story)


def test_requests_sent_ahead_wait_for_their_turn():
    async def story():
        line = await Line().open()
        line.send(post("/function/cat", b"1"), post("/function/dog", b"2"), post("/function/cow"))
        assert list(line.control.calls) == [1]
        answers = [(status, body[:1]) for status, _, body in await line.answers(3)]
        assert answers == [(200, b"1"), (200, b"2"), (404, b"{")]
        line.wire.sent = b""
        line.send(post("/function/cat", b"3"))
        assert [body for _, _, body in await line.answers()] == [b"3"]

    run(story)


@pytest.mark.parametrize(
    "request_", [post("/function/cat", b"x", "connection: close"), post("/function/cat", http="1.0")]
)
def test_a_connection_that_is_not_to_stay_is_closed_after_the_answer(request_):
    async def story():
        line = await Line().open()
        line.send(request_)
        ((status, headers, _),) = await line.answers()
        assert (status, headers["connection"]) == (200, "close")
        assert line.wire.closed

    run(story)


def test_a_server_that_stops_answers_first():
    async def story():
        line = await Line().open()
        line.send(post("/function/cat"))
        line.connection.shutdown()
        assert not line.wire.closed
        ((status, headers, _),) = await line.answers()
        assert (status, headers["connection"]) == (200, "close")
        assert line.wire.closed

    run(story)


def test_a_client_that_leaves_takes_its_call_with_it():
    async def story():
        line = await Line().open()
        line.send(post("/function/cat"))
        line.connection.connection_lost(None)
        assert not line.control.calls
        assert [record.status for record in line.control.records] == [499]
        await line.advance(1.0, steps=10)
        assert line.wire.sent == b""

    run(story)


def test_who_is_turned_away_at_once_hears_when_to_come_back():
    async def story():
        line = await Line(config=SchedulerConfig(max_queue=0)).open()
        for count in (1, 2):  # the second shows that the connection is in order
            line.send(post("/function/cat"))
            *_, (status, headers, body) = await line.answers(count)
            assert (status, headers["retry-after"], headers["x-openfaas-internal"]) == (429, "1", "hotset")
            assert b'"reason":"queue_full"' in body
        assert line.tasks == 0

    run(story)


def streaming(call: Call) -> list[Answer]:
    items = [b"1\n", b"2\n", b"3\n"]
    return [Answer(request_id=call.request_id, content_type="application/x-ndjson", body=item) for item in items]


def test_a_streamed_answer_is_passed_on_as_it_comes():
    async def story():
        line = await Line().open()
        line.behave("cat@1", load_s=0.1, inference_s=3.0, respond=streaming)
        line.send(post("/function/cat"))
        await line.advance(1.2, steps=12)
        head, _, body = line.wire.sent.partition(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head
        assert body == b"2\r\n1\n\r\n"
        await line.advance(5.0, steps=10)
        assert line.wire.sent.partition(b"\r\n\r\n")[2] == b"2\r\n1\n\r\n2\r\n2\n\r\n2\r\n3\n\r\n0\r\n\r\n"
        line.wire.sent = b""
        line.send(post("/function/dog", b"woof"))
        assert [body for _, _, body in await line.answers()] == [b"woof"]

    run(story)


def test_a_stream_whose_reader_left_is_given_up():
    async def story():
        line = await Line().open()
        line.behave("cat@1", load_s=0.1, inference_s=3.0, respond=streaming)
        line.send(post("/function/cat"))
        await line.advance(1.2, steps=12)
        assert line.control.calls
        line.connection.connection_lost(None)
        assert not line.control.calls
        await line.advance(5.0, steps=10)
        assert line.wire.sent.endswith(b"2\r\n1\n\r\n")

    run(story)


def test_a_stream_that_is_cut_short_takes_its_call_with_it():
    async def story():
        line = await Line().open()
        line.behave("cat@1", load_s=0.1, inference_s=3.0, respond=streaming)
        line.send(post("/function/cat"))
        await line.advance(1.2, steps=12)
        (task,) = line.state.tasks
        task.cancel()
        await asyncio.wait([task])
        assert not line.control.calls

    run(story)


def test_a_connection_is_closed_when_nothing_was_begun_for_long():
    async def story():
        line = await Line().open()
        line.connection.timeout_keep_alive = 0
        ahead = post("/function/dog", b"woof")
        line.send(post("/function/cat"), ahead[:9])
        await line.answers()
        await line.advance()
        assert not line.wire.closed  # the next one has begun
        line.send(ahead[9:])
        assert [body for _, _, body in await line.answers(2)] == [b"x", b"woof"]
        while not line.wire.closed:
            await asyncio.sleep(0)

    run(story)


def test_each_answer_puts_the_end_of_an_idle_connection_off():
    async def story():
        line = await Line().open()
        line.connection.timeout_keep_alive = 3600
        for count in (1, 2):
            line.send(post("/function/cat"))
            await line.answers(count)
        line.connection.timeout_keep_alive = 0  # sooner than what was set before
        line.send(post("/function/cat"))
        await line.answers(3)
        while not line.wire.closed:
            await asyncio.sleep(0)

    run(story)
