"""Whatever bytes come, the answer is a result or a 400: never a 500, never a crash."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import hotset
from hotset.functions.runtime import Call, Runtime


@dataclass
class Box:
    x: float
    label: str = ""


@hotset.function
def plain(values: list[float]) -> int:
    return len(values)


@hotset.function
def several(text: str, box: Box, top: int = 3) -> int:
    return top


@hotset.function
def anything(value: Any) -> int:
    return 0


@hotset.function
def mapping(value: dict[str, list[Box]]) -> int:
    return len(value)


@hotset.function
def array(x: np.ndarray) -> int:
    return x.size


@hotset.function
def pixels(x: Annotated[np.ndarray, hotset.Tensor("uint8", (None, 2))]) -> int:
    return x.size


@hotset.function
def picture(image: Image.Image, note: str = "") -> int:
    return image.width


@hotset.function
def octets(data: bytes) -> int:
    return len(data)


@hotset.function(max_batch=4)
class Batched:
    def predict(self, texts: list[str]) -> list[int]:
        return [len(text) for text in texts]


def loaded(target: Any) -> Runtime:
    runtime = Runtime(target)
    runtime.load()
    return runtime


RUNTIMES = [loaded(f) for f in (plain, several, anything, mapping, array, pixels, picture, octets, Batched)]

NAMES = st.sampled_from(["values", "text", "box", "x", "image", "data", "value", "dtype", "shape", "label", "float32"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | NAMES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
NPY_HEADER = st.builds(
    lambda descr, shape, data: (
        b"\x93NUMPY\x01\x00"
        + len(header := f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()).to_bytes(
            2, "little"
        )
        + header
        + data
    ),
    st.sampled_from(["<f8", "|O", "<U9", ">i2", "|b1", "zzz", "V8"]),
    st.lists(st.integers(-2, 2**62), max_size=3).map(tuple),
    st.binary(max_size=32),
)
MAGIC = st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBPVP8 "])
BODIES = (
    st.binary(max_size=64)
    | JSON.map(lambda value: json.dumps(value).encode())
    | JSON.map(lambda value: json.dumps(value)[:-1].encode())
    | NPY_HEADER
    | st.builds(lambda magic, rest: magic + rest, MAGIC, st.binary(max_size=64))
)
CONTENT_TYPES = st.sampled_from(
    [
        "application/json",
        "",
        "text/plain",
        "text/plain; charset=\x00",
        "image/png",
        "application/x-npy",
        "application/octet-stream",
        "application/octet-stream; dtype=float32",
        'application/octet-stream; dtype=int8; shape="2,2"',
        "application/octet-stream; dtype=bool; shape=4294967296,4294967296,0",
        "application/octet-stream; shape=,;dtype=;;=",
        "application/octet-stream; dtype=uint8; shape=²",
    ]
) | st.text(max_size=20)


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.signature.name)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=BODIES, content_type=CONTENT_TYPES, accept=st.sampled_from(["*/*", "text/plain"]) | st.text(max_size=10))
def test_garbage_is_answered_with_400(runtime: Runtime, body: bytes, content_type: str, accept: str) -> None:
    outcome = runtime.call(memoryview(body), content_type, accept)
    assert outcome.status in (200, 400), outcome.body
    if outcome.status == 400:
        problem = json.loads(outcome.body)
        assert set(problem) == {"error", "field"}
        assert 0 < len(problem["error"]) < 600


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(BODIES, CONTENT_TYPES), min_size=1, max_size=4))
def test_each_of_a_batch_has_its_own_answer(requests: list[tuple[bytes, str]]) -> None:
    runtime = RUNTIMES[-1]
    joined = runtime.call_batch([Call(*request) for request in requests])
    alone = [runtime.call(*request) for request in requests]
    assert [(outcome.status, outcome.body) for outcome in joined] == [(o.status, o.body) for o in alone]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=20))
def test_numbers_come_through_unchanged(values: list[float]) -> None:
    (decoded,) = loaded(plain).signature.decode(json.dumps(values).encode())
    assert decoded == values
