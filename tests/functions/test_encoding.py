"""Results become bodies by their own type and the client's Accept header."""

import json
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from hotset.errors import FunctionError
from hotset.functions.encoding import EVENT_STREAM, NDJSON, encode, negotiate, stream_format


class Colour(Enum):
    RED = "red"


@dataclass
class Box:
    x: float


class Point(msgspec.Struct):
    x: int
    inner: Any = None


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (3, 3),
        (None, None),
        (True, True),
        ("text", "text"),
        ([1.5, "a", None], [1.5, "a", None]),
        ({"a": (1, 2)}, {"a": [1, 2]}),
        ({1: "a"}, {"1": "a"}),
        ({"set": {1}}, {"set": [1]}),
        (Colour.RED, "red"),
        (Box(1.0), {"x": 1.0}),
        ([Point(1, Point(2))], [{"x": 1, "inner": {"x": 2, "inner": None}}]),
        (np.arange(4).reshape(2, 2), [[0, 1], [2, 3]]),
        (np.arange(4).reshape(2, 2).T, [[0, 2], [1, 3]]),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.float32(1.5), 1.5),
        (np.bool_(True), True),
        ({"x": np.float64(2)}, {"x": 2.0}),
        ({"x": np.str_("s")}, {"x": "s"}),
        ([np.arange(2)], [[0, 1]]),
        (torch.tensor([[1.5]], requires_grad=True), [[1.5]]),
        (torch.ones(2, dtype=torch.bfloat16), [1.0, 1.0]),
        ({"scores": torch.arange(2)}, {"scores": [0, 1]}),
        ([b"hi"], ["aGk="]),
        (np.array([np.nan]), [None]),
    ],
)
def test_json(result: Any, expected: Any) -> None:
    encoded = encode(result)
    assert encoded.content_type == "application/json"
    assert json.loads(encoded.body) == expected


@pytest.mark.parametrize(
    "result", [object(), [object()], {"x": Decimal(1)}, 2**70, {(1, 2): 3}, "\ud800", np.array([1j])]
)
def test_what_json_cannot_hold_is_the_functions_error(result: Any) -> None:
    with pytest.raises(FunctionError, match=r"predict returned a .* that JSON cannot hold"):
        encode(result)


def test_a_value_nested_without_end_is_the_functions_error() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(FunctionError, match="JSON cannot hold"):
        encode(endless)


@pytest.mark.parametrize(
    ("result", "accept", "content_type", "body"),
    [
        ("Grüße", "text/plain", "text/plain; charset=utf-8", "Grüße".encode()),
        ("a", "text/html, */*;q=0.1", "application/json", b'"a"'),
        (b"\x00", "*/*", "application/octet-stream", b"\x00"),
        (bytearray(b"hi"), "application/json", "application/json", b'"aGk="'),
        (memoryview(b"hi"), "image/png", "application/octet-stream", b"hi"),
        (
            np.array([[1, 2]], ">i2"),
            "application/octet-stream",
            'application/octet-stream; dtype=int16; shape="1,2"',
            b"\x01\x00\x02\x00",
        ),
        (torch.tensor(1, dtype=torch.uint8), "application/octet-stream", None, b"\x01"),
        (np.array(["a"]), "application/x-npy", "application/json", b'["a"]'),
    ],
)
def test_other_bodies(result: Any, accept: str, content_type: str | None, body: bytes) -> None:
    encoded = encode(result, accept)
    assert encoded.body == body
    assert content_type is None or encoded.content_type == content_type


def test_npy_starts_with_its_magic() -> None:
    encoded = encode(torch.ones(2), "application/x-npy")
    assert encoded.content_type == "application/x-npy"
    assert encoded.body.startswith(b"\x93NUMPY")


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("*/*", "a/x"),
        ("", "a/x"),
        ("b/y", "b/y"),
        ("a/x;q=0.1, b/y", "b/y"),
        ("a/x;q=0, */*;q=0.5", "a/x"),
        ("b/*", "b/y"),
        ("c/z", "a/x"),
        ("b/y;q=high", "b/y"),
        ("*/*;q=0.2, B/Y;level=1", "b/y"),
    ],
)
def test_the_client_chooses(accept: str, chosen: str) -> None:
    assert negotiate(accept, ("a/x", "b/y")) == chosen


def test_streams_are_lines_or_events() -> None:
    lines, events = stream_format(), stream_format("text/event-stream")
    assert (lines.content_type, events.content_type) == (NDJSON, EVENT_STREAM)
    assert lines.item({"a": "b\n"}) == b'{"a":"b\\n"}\n'
    assert events.item([1]) == b"data: [1]\n\n"
    assert events.error({"error": "no"}) == b'event: error\ndata: {"error":"no"}\n\n'
