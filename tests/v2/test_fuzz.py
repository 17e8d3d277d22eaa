"""Whatever arrives for an inference is answered 200 or 400 with a reason, and takes no more memory than it may."""

from __future__ import annotations

import asyncio
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_codec import messages
from test_direct_v2 import Line
from v2_world import BODY_LIMIT, Echo, Scale, World

LENGTHS = st.one_of(
    st.none(),
    st.integers(-5, 300).map(str),
    st.sampled_from(("", "1e3", "0x10", "9" * 18, "9" * 30, "٣", "+1", "1 2")),
)
NOISE = st.binary(max_size=64)


class Server:
    """A connection to a gateway, driven from outside its loop."""

    def __init__(self, data: Path) -> None:
        self.runner = asyncio.Runner()
        self.world = World(data, Echo, Scale)
        self.line = self.runner.run(self._open())

    async def _open(self) -> Line:
        await self.world.__aenter__()
        return Line(self.world)

    async def _ask(self, body: bytes, lines: list[str]) -> tuple[int, bytes]:
        answers = []
        for model in ("echo", "scale"):
            if self.line.wire.closed:
                self.line = Line(self.world)
            answers.append(await self.line.post(f"/v2/models/{model}/infer", body, *lines))
        for status, _, answer in answers:
            assert status in (200, 400, 413, 415), answer
            assert status == 200 or orjson.loads(answer)["error"]
        status, _, answer = answers[0]
        return status, answer

    def ask(self, body: bytes, *lines: str) -> int:
        """What both models answer to it, over one connection; the first one's status."""
        status, _ = self.runner.run(self._ask(body, list(lines)))
        return status

    def close(self) -> None:
        self.runner.run(self.world.__aexit__())
        self.runner.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.close()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(message=messages, binary=NOISE, length=LENGTHS, cut=st.integers(0, 40), noise=NOISE, at=st.integers(0, 200))
def test_no_request_whatever_is_a_500(
    server: Server, message: dict[str, object], binary: bytes, length: str | None, cut: int, noise: bytes, at: int
) -> None:
    try:
        header = orjson.dumps(message)
    except TypeError:  # integers that orjson does not write
        header = repr(message).encode()
    body = bytearray(header + binary)
    if cut % 3 == 0:
        body[at : at + len(noise)] = noise
    body = body[: len(body) - cut // 2]
    told = str(len(header)) if length is None and binary else length
    lines = [] if told is None else [f"inference-header-content-length: {told}"]
    server.ask(bytes(body), *(line for line in lines if line.isascii()))
    assert server.world.bodies.reading_bytes == server.world.control.open_body_bytes == 0
    assert not server.world.control.calls


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.sampled_from((65_536, 65_537, 300_000, BODY_LIMIT)), said=st.integers(-(2**70), 2**70), dims=st.data())
def test_large_bodies_and_what_they_claim(server: Server, size: int, said: int, dims: st.DataObject) -> None:
    shape = dims.draw(st.lists(st.integers(-3, 2**63), max_size=4))
    described = '{"inputs":[{"name":"x","shape":%s,"datatype":"FP32","parameters":{"binary_data_size":%d}}]}'
    header = (described % (shape, said)).encode()
    body = header.ljust(size, b" ")
    told = dims.draw(st.sampled_from((len(header), size, size + 1, 0, 10**17)))
    is_true = min(shape, default=0) >= 0 and 4 * math.prod(shape) == said == size - told
    assert server.ask(body, f"inference-header-content-length: {told}") in ((200, 400) if is_true else (400,))


def test_claims_cost_no_memory_beyond_the_body(server: Server) -> None:
    def claim(shape: str, said: int, datatype: str) -> bytes:
        described = '{"inputs":[{"name":"x","shape":%s,"datatype":"%s","parameters":{"binary_data_size":%d}}]}'
        return (described % (shape, datatype, said)).encode()

    header = claim("[1]", 4, "FP32")
    server.ask(header + bytes(BODY_LIMIT - len(header)), f"inference-header-content-length: {len(header)}")
    tracemalloc.start()
    for shape in ("[4611686018427387904]", "[2147483648,2147483648]", "[1099511627776,0]", "[-1]", "[]"):
        for said in (-1, 0, 8, 2**40, 2**62):
            for datatype in ("FP32", "BYTES", "BF16", "BOOL"):
                header = claim(shape, said, datatype)
                server.ask(header + bytes(8), f"inference-header-content-length: {len(header)}")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < BODY_LIMIT
    assert server.ask(b" " * (BODY_LIMIT + 1)) == 413
    assert server.world.bodies.reading_bytes == 0
