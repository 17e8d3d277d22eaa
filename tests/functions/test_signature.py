"""Request bodies become arguments, or an error that names the field."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from enum import Enum
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
import pytest

import hotset
from hotset.functions.inspection import signature_of


class Unit(Enum):
    METRE = "m"
    FOOT = "ft"


@dataclass
class Box:
    x: float
    y: float
    label: str = "thing"


class Point(msgspec.Struct, forbid_unknown_fields=True):
    x: int
    y: int


class Query(TypedDict):
    text: str
    top: NotRequired[int]


@hotset.function
def total(values: list[float]) -> float:
    return sum(values)


@hotset.function
def search(text: str, top: int = 3, *, unit: Unit = Unit.METRE, tags: list[str] = ["all"]) -> str:  # noqa: B006
    return f"{text} {top} {unit.value} {tags}"


@hotset.function
def boxes(boxes: list[Box]) -> int:
    return len(boxes)


@hotset.function
def box(box: Box) -> str:
    return box.label


@hotset.function
def point(point: Point) -> int:
    return point.x


@hotset.function
def query(query: Query) -> str:
    return query["text"]


@hotset.function
def options(options: dict[str, int]) -> int:
    return len(options)


@hotset.function
def maybe(text: str | None = None) -> str:
    return text or "nothing"


@hotset.function
def size(size: Literal["small", "large"]) -> str:
    return size


@hotset.function
def day(day: date) -> str:
    return day.isoformat()


@hotset.function
def anything(value: Any) -> str:
    return str(value)


@hotset.function
def positive(count: Annotated[int, msgspec.Meta(gt=0)]) -> int:
    return count


@hotset.function
def limited(limits: Annotated[dict[str, int], msgspec.Meta(max_length=1, title="Limits")] | None) -> int:
    return len(limits or ())


@hotset.function
def nothing() -> str:
    return "pong"


@hotset.function
def raw(data: bytes) -> int:
    return len(data)


@pytest.mark.parametrize(
    ("function", "body", "arguments"),
    [
        (total, b"[1, 2.5]", ([1.0, 2.5],)),
        (total, b'{"values": [1, 2.5]}', ([1.0, 2.5],)),
        (total, b' \n{"values": []}', ([],)),
        (total, b" [1]", ([1.0],)),
        (search, b'{"text": "cat"}', ("cat", 3, Unit.METRE, ["all"])),
        (search, b'{"text": "cat", "top": 5, "unit": "ft", "tags": []}', ("cat", 5, Unit.FOOT, [])),
        (boxes, b'[{"x": 1, "y": 2}]', ([Box(1, 2)],)),
        (box, b'{"x": 1, "y": 2, "label": "cat"}', (Box(1, 2, "cat"),)),
        (box, b'{"box": {"x": 1, "y": 2}}', (Box(1, 2),)),
        (point, b'{"x": 1, "y": 2}', (Point(1, 2),)),
        (query, b'{"text": "cat"}', ({"text": "cat"},)),
        (options, b'{"a": 1}', ({"a": 1},)),
        (options, b'{"options": {"a": 1}}', ({"a": 1},)),
        (options, b'{"options": 1}', ({"options": 1},)),
        (options, b"{}", ({},)),
        (maybe, b"null", (None,)),
        (maybe, b'"x"', ("x",)),
        (maybe, b"{}", (None,)),
        (maybe, b"", (None,)),
        (size, b'"small"', ("small",)),
        (day, b'"2026-11-24"', (date(2026, 11, 24),)),
        (anything, b'{"a": [1]}', ({"a": [1]},)),
        (anything, b'{"value": 1}', (1,)),
        (anything, b"3", (3,)),
        (nothing, b"", ()),
        (nothing, b"{}", ()),
        (raw, b'"aGk="', (b"hi",)),
        (raw, b'{"data": "aGk="}', (b"hi",)),
    ],
)
def test_json_bodies(function: Callable[..., Any], body: bytes, arguments: tuple[Any, ...]) -> None:
    assert signature_of(function).decode(body) == arguments
    assert signature_of(function).decode(memoryview(body), "application/json; charset=utf-8") == arguments


@pytest.mark.parametrize(
    ("function", "body", "field", "problem"),
    [
        (total, b'[1, "x"]', "values[1]", "expected `float`, got `str`"),
        (total, b'{"values": [1, "x"]}', "values[1]", "expected `float`, got `str`"),
        (total, b'{"value": [1]}', "value", "unknown field; this function takes the field values"),
        (total, b"{}", "values", "required, but missing"),
        (total, b"", "", "the body is empty; send application/json with the field values"),
        (total, b"[1", "", "not valid JSON: Input data was truncated"),
        (total, b"[1] [2]", "", "not valid JSON: trailing characters"),
        (total, b"[NaN]", "", "not valid JSON: invalid character (byte 1)"),
        (total, b"[1e999]", "values[0]", "number out of range"),
        (search, b'{"text": 3}', "text", "expected `str`, got `int`"),
        (search, b'{"text": "a", "top": "5"}', "top", "expected `int`, got `str`"),
        (search, b'{"text": "a", "top": 1.5}', "top", "expected `int`, got `float`"),
        (search, b'{"text": "a", "unit": "mile"}', "unit", "invalid enum value 'mile'"),
        (
            search,
            b'["a", 5]',
            "",
            "send a JSON object with the fields text, top (optional), unit (optional), tags (opt",
        ),
        (search, b'{"text": "a", "limit": 5}', "limit", "unknown field; this function takes the fields text, top"),
        (boxes, b'[{"x": 1, "y": 2}, {"x": 1}]', "boxes[1].y", "required, but missing"),
        (box, b'{"x": 1}', "box.y", "required, but missing"),
        (box, b'{"box": {"x": "1"}}', "box.x", "expected `float`, got `str`"),
        (box, b"3", "box", "expected `object`, got `int`"),
        (point, b'{"x": 1, "y": 2, "z": 3}', "point.z", "unknown field"),
        (point, b'{"point": {"x": 1, "y": 2, "z": 3}}', "point.z", "unknown field"),
        (query, b'{"top": 3}', "query.text", "required, but missing"),
        (options, b'{"options": {"a": "x"}}', "options[...]", "expected `int`, got `str`"),
        (size, b'"huge"', "size", "invalid enum value 'huge'"),
        (day, b'"tomorrow"', "day", "invalid RFC3339 encoded date"),
        (limited, b'{"a": 1, "b": 2}', "limits", "expected `object` of length <= 1"),
        (positive, b"0", "count", "expected `int` >= 1"),
        (positive, b"9" * 5000, "count", "integer value out of range"),
        (anything, b"[" * 100_000, "", "nested too deep"),
        (anything, b'{"a":' * 100_000, "", "nested too deep"),
        (maybe, b'"\xff"', "", "not valid JSON: a string is not UTF-8"),
        (nothing, b'{"x": 1}', "x", "unknown field; this function takes no fields"),
        (nothing, b"[1]", "", "send a JSON object with no fields"),
        (raw, b'"?"', "data", "invalid base64 encoded string"),
        (
            raw,
            b"hi",
            "",
            "not valid JSON: invalid character (byte 0) (or send application/octet-stream with its Conten",
        ),
    ],
)
def test_what_does_not_fit_names_the_field(function: Callable[..., Any], body: bytes, field: str, problem: str) -> None:
    with pytest.raises(hotset.InputError) as caught:
        signature_of(function).decode(body)
    assert caught.value.field == field
    assert caught.value.problem.startswith(problem)


def test_an_error_repeats_little_of_what_the_caller_sent() -> None:
    signature = signature_of(search)
    for body in (b'{"%s": 1}' % (b"k" * 10_000), b'{"text": "a", "unit": "%s"}' % (b"m" * 10_000)):
        with pytest.raises(hotset.InputError) as caught:
            signature.decode(body)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content_type", ["", "application/x-www-form-urlencoded", "application/vnd.api+json"])
def test_a_client_that_sets_no_content_type_means_json(content_type: str) -> None:
    assert signature_of(total).decode(b"[1]", content_type) == ([1.0],)


def test_plain_text_goes_to_the_only_required_parameter() -> None:
    signature = signature_of(search)
    assert signature.decode("Grüße".encode(), "text/plain; charset=UTF-8") == ("Grüße", 3, Unit.METRE, ["all"])
    assert signature_of(maybe).decode(b"hi", "text/plain") == ("hi",)
    with pytest.raises(hotset.InputError, match="text: not UTF-8 at byte 1"):
        signature.decode(b"a\xff", "text/plain")
    with pytest.raises(hotset.InputError, match="text: send the text in UTF-8"):
        signature.decode(b"a", "text/plain; charset=latin-1")


@pytest.mark.parametrize("content_type", ["application/octet-stream", "", "image/png", "text/plain"])
def test_bytes_take_any_body_that_is_not_json(content_type: str) -> None:
    (data,) = signature_of(raw).decode(memoryview(b"\x00\xff"), content_type)
    assert data == b"\x00\xff"
    assert type(data) is bytes


def test_a_content_type_nobody_can_read_is_told_with_those_that_can() -> None:
    with pytest.raises(hotset.InputError, match=r"image/png cannot be read here; send application/json$"):
        signature_of(total).decode(b"...", "image/png")
    with pytest.raises(hotset.InputError, match=r"send application/json or text/plain$"):
        signature_of(search).decode(b"...", "image/png")


def test_keyword_only_parameters_are_passed_by_name() -> None:
    signature = signature_of(search)
    arguments = signature.decode(b'{"text": "cat", "unit": "ft"}')
    assert signature.call(search, arguments) == "cat 3 ft ['all']"


@hotset.function(max_batch=8)
class Pairs:
    """Joins texts."""

    def predict(self, left: list[str], right: list[str]) -> list[str]:
        """Left and right of each request."""
        return [f"{a}-{b}" for a, b in zip(left, right, strict=True)]


def test_a_batched_function_takes_one_item_of_each_list_per_request() -> None:
    signature = signature_of(Pairs)
    items = [signature.decode(b'{"left": "a", "right": "b"}'), signature.decode(b'{"left": "c", "right": "d"}')]
    assert signature.call_batch(Pairs().predict, items) == ["a-b", "c-d"]


def test_the_schema_describes_one_request() -> None:
    assert signature_of(Pairs).schema() == {
        "name": "pairs",
        "description": "Joins texts.\n\nLeft and right of each request.",
        "input": {
            "title": "pairs",
            "type": "object",
            "properties": {"left": {"type": "string"}, "right": {"type": "string"}},
            "required": ["left", "right"],
            "additionalProperties": False,
        },
        "output": {"type": "string"},
        "accepts": ["application/json"],
        "produces": ["application/json", "text/plain"],
        "batched": True,
        "streaming": False,
    }


def test_the_schema_holds_the_definitions_it_refers_to() -> None:
    schema = signature_of(boxes).schema()
    assert schema["input"]["properties"]["boxes"] == {"type": "array", "items": {"$ref": "#/$defs/Box"}}
    assert schema["input"]["$defs"]["Box"]["required"] == ["x", "y"]
    assert signature_of(search).schema()["input"]["properties"]["top"] == {"type": "integer", "default": 3}


def test_a_result_of_any_type_has_at_least_an_empty_schema() -> None:
    @hotset.function
    def strange(text: str) -> Callable[[], int]:
        return lambda: len(text)

    assert signature_of(strange).schema()["output"] == {}
