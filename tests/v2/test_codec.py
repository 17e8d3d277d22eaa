"""The codec alone: every datatype both ways, every kind of signature, and garbage of every kind."""

from __future__ import annotations

import dataclasses
import enum
import tracemalloc
from datetime import date
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import numpy as np
import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from v2_world import Echo, Scale, tensor

import hotset
from hotset.functions.images import to_file
from hotset.functions.media import V2
from hotset.functions.runtime import Call, Outcome, Runtime
from hotset.functions.v2 import WARM, unframe
from hotset.functions.v2_tensors import (
    DTYPES,
    WireTensor,
    bytes_tensor,
    datatype_of,
    from_binary,
    from_json,
    narrowed,
    to_binary,
    to_json_data,
    widened,
)
from hotset.functions.v2_types import tensors_of

NAMED = f"{V2}; model=m; version=3"


def loaded(target: Any) -> Runtime:
    runtime = Runtime(target)
    runtime.load()
    return runtime


def ask(runtime: Runtime, message: dict[str, Any], binary: bytes | memoryview = b"") -> Outcome:
    header = orjson.dumps(message)
    if not len(binary):
        return runtime.call(header, NAMED)
    return runtime.call(binary, f"{NAMED}; header=accept", header.decode("latin-1"))


def outputs(outcome: Outcome) -> dict[str, Any]:
    assert outcome.status == 200, outcome.body
    return {each["name"]: each for each in orjson.loads(outcome.body)["outputs"]}


def given_input(name: str, datatype: str, data: Any, shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": name, "shape": [len(data)] if shape is None else shape, "datatype": datatype, "data": data}


SAMPLES: dict[str, list[Any]] = {
    "BOOL": [True, False],
    "INT8": [-128, 127],
    "INT16": [-(2**15), 2**15 - 1],
    "INT32": [-(2**31), 2**31 - 1],
    "INT64": [-(2**63), 2**63 - 1],
    "UINT8": [0, 255],
    "UINT16": [0, 65535],
    "UINT32": [0, 2**32 - 1],
    "UINT64": [0, 2**64 - 1],
    "FP16": [0.5, -2.0],
    "BF16": [0.5, -2.0],
    "FP32": [0.1, -3.5],
    "FP64": [0.1, 1e300],
    "BYTES": ["a", "ü"],
}


@pytest.mark.parametrize("datatype", list(DTYPES))
def test_every_datatype_survives_json_and_binary(datatype: str) -> None:
    array = from_json(datatype, [2, 1], orjson.dumps([[value] for value in SAMPLES[datatype]]))
    flat = from_json(datatype, [2, 1], orjson.dumps(SAMPLES[datatype]))
    assert array.shape == flat.shape == (2, 1)

    data = memoryview(bytes(to_binary(WireTensor("x", datatype, array))))
    again = from_binary(datatype, [2, 1], data)
    np.testing.assert_array_equal(again, array)
    told = orjson.loads(orjson.dumps(to_json_data(WireTensor("x", datatype, again)), option=orjson.OPT_SERIALIZE_NUMPY))
    if datatype == "FP32":
        assert told == [np.float32(value) for value in SAMPLES[datatype]] or told == pytest.approx(SAMPLES[datatype])
    else:
        assert told == SAMPLES[datatype]


@pytest.mark.parametrize("datatype", [name for name in DTYPES if name not in ("BYTES", "FP64", "BF16", "FP32", "FP16")])
def test_numbers_beyond_a_datatype_are_refused(datatype: str) -> None:
    beyond = [2] if datatype == "BOOL" else [SAMPLES[datatype][1] + 1]
    with pytest.raises(ValueError, match=r"range|cannot be read"):
        from_json(datatype, [1], orjson.dumps(beyond) if beyond[0] < 2**64 else str(beyond).encode())


def test_a_large_aligned_tensor_is_a_view_and_nothing_is_copied() -> None:
    runtime = loaded(Echo)
    data = np.arange(300_000, dtype=np.float32)
    seen: list[np.ndarray] = []
    runtime._predict = seen.append  # type: ignore[assignment]
    shared = memoryview(data.tobytes()).toreadonly()
    assert ask(runtime, {"inputs": [tensor("x", data)]}, shared).status == 200
    assert np.shares_memory(seen[0], np.frombuffer(shared, np.uint8))
    assert not seen[0].flags.writeable


def test_small_tensors_may_be_written_to() -> None:
    @hotset.function
    def overwrite(x: np.ndarray) -> np.ndarray:
        x += 1
        return x

    array = np.zeros(3, np.float32)
    answer = ask(loaded(overwrite), {"inputs": [tensor("x", array)]}, array.tobytes())
    assert outputs(answer)["output"]["data"] == [1, 1, 1]


def test_an_unaligned_tensor_is_copied_and_right() -> None:
    number, flag = np.array([7.5], np.float64), np.array([True])

    @hotset.function
    def both(flag: np.ndarray, number: np.ndarray) -> float:
        assert number.flags.aligned
        return float(number[0]) if flag[0] else 0.0

    message = {"inputs": [tensor("flag", flag), tensor("number", number)]}
    assert outputs(ask(loaded(both), message, b"\x05" + number.tobytes()))["output"]["data"] == [7.5]


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Box:
    left: int
    label: str


class Scores(TypedDict):
    best: str
    scores: list[float]


class Point(msgspec.Struct):
    x: float
    y: float


@hotset.function
def everything(
    count: int,
    ratio: float,
    flag: bool,
    text: str,
    blob: bytes,
    words: list[str],
    grid: list[list[float]],
    colour: Colour,
    kind: Literal["a", "b"],
    level: Literal[1, 2],
    day: date,
    box: Box,
    boxes: list[Box],
    bounded: Annotated[int, msgspec.Meta(ge=0)],
    either: int | float,
    mixed: int | str,
    maybe: str | None = None,
) -> Scores:
    return {"best": f"{text}{maybe}{colour.value}{kind}{level}{day}{box.label}{len(boxes)}", "scores": [count, ratio]}


FULL = [
    given_input("count", "INT32", [3]),
    given_input("ratio", "FP32", [0.5]),
    given_input("flag", "BOOL", [True]),
    given_input("text", "BYTES", ["hé"]),
    given_input("blob", "BYTES", ["raw"]),
    given_input("words", "BYTES", ["a", "b"]),
    given_input("grid", "FP64", [1, 2, 3, 4], [2, 2]),
    given_input("colour", "BYTES", ["red"]),
    given_input("kind", "BYTES", ["b"]),
    given_input("level", "INT64", [2]),
    given_input("day", "BYTES", ["2030-01-31"]),
    given_input("box", "BYTES", ['{"left": 1, "label": "L"}']),
    given_input("boxes", "BYTES", ["[]"]),
    given_input("bounded", "UINT8", [0]),
    given_input("either", "BF16", [1.5]),
    given_input("mixed", "BYTES", ['"x"']),
]


def test_ordinary_parameters_are_tensors_and_a_returned_record_has_an_output_per_field() -> None:
    runtime = loaded(everything)
    kinds = {each.name: (each.datatype, list(each.shape)) for each in tensors_of(runtime.signature).inputs}
    assert kinds["grid"] == ("FP64", [-1, -1])
    assert kinds["level"] == ("INT64", [1])
    assert kinds["colour"] == kinds["day"] == kinds["box"] == kinds["boxes"] == kinds["mixed"] == ("BYTES", [1])
    assert kinds["either"] == ("FP64", [1])
    assert tensors_of(runtime.signature).optional == ["maybe"]
    answer = outputs(ask(runtime, {"inputs": FULL}))
    assert answer["best"]["data"] == ["héNoneredb22030-01-31L0"]
    assert answer["scores"] == {"name": "scores", "datatype": "FP64", "shape": [2], "data": [3.0, 0.5]}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (given_input("count", "FP32", [3.5]), "count: expected `int`"),
        (given_input("count", "INT32", [3, 4]), "takes one value, but the tensor holds 2"),
        (given_input("grid", "FP64", [1.0]), "takes a tensor of 2 dimensions, but got 1"),
        (given_input("colour", "BYTES", ["green"]), "colour: invalid enum value"),
        (given_input("box", "BYTES", ["{"]), "box"),
        (given_input("box", "BYTES", ['{"left": "one", "label": ""}']), "box"),
        (given_input("box", "BYTES", ["1", "2"]), "takes one BYTES element"),
        (given_input("box", "INT64", [1]), "box: expected `object`"),
        (given_input("bounded", "INT8", [-1]), "bounded: expected `int` >= 0"),
    ],
)
def test_a_tensor_that_does_not_fit_its_parameter_is_told_by_name(wrong: dict[str, Any], told: str) -> None:
    changed = [wrong if each["name"] == wrong["name"] else each for each in FULL]
    outcome = ask(loaded(everything), {"inputs": changed})
    assert outcome.status == 400
    assert told in orjson.loads(outcome.body)["error"]


def test_text_that_is_no_utf8_is_a_400_for_text_and_fine_for_bytes() -> None:
    @hotset.function
    def length(text: str) -> int:
        return len(text)

    @hotset.function
    def size(blob: bytes) -> int:
        return len(blob)

    element = bytes(to_binary(bytes_tensor("x", [b"\xff\xfe"])))
    for target, name, status in ((length, "text", 400), (size, "blob", 200)):
        described = {"name": name, "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(element)}}
        assert ask(loaded(target), {"inputs": [described]}, element).status == status


def test_pictures_are_files_in_one_element() -> None:
    @hotset.function
    def turn(picture: Image.Image) -> Image.Image:
        return picture.rotate(180)

    file = to_file(Image.new("RGB", (2, 1), (255, 0, 0)), "PNG")
    element = bytes(to_binary(bytes_tensor("picture", [file])))
    described = {"name": "picture", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(element)}}
    message = {"inputs": [described], "parameters": {"binary_data_output": True}}
    outcome = ask(loaded(turn), message, element)
    size = int(outcome.content_type.partition("header=")[2])
    assert outcome.whole[size + 4 :].startswith(b"\x89PNG")
    broken = bytes(to_binary(bytes_tensor("picture", [b"no picture"])))
    described["parameters"] = {"binary_data_size": len(broken)}
    assert ask(loaded(turn), message, broken).status == 400


def test_torch_tensors_bfloat16_included() -> None:
    @hotset.function
    def half(x: torch.Tensor) -> torch.Tensor:
        return x / 2

    runtime = loaded(half)
    for datatype in ("BF16", "FP32"):
        answer = outputs(ask(runtime, {"inputs": [given_input("x", datatype, [1, 3])]}))["output"]
        assert (answer["datatype"], answer["data"]) == (datatype, [0.5, 1.5])
    assert ask(runtime, {"inputs": [given_input("x", "BYTES", ["a"])]}).status == 400

    @hotset.function
    def strict(x: Annotated[torch.Tensor, hotset.Tensor("float32", (2,))]) -> int:
        return 1

    refused = ask(loaded(strict), {"inputs": [given_input("x", "FP32", [1])]})
    assert orjson.loads(refused.body)["error"] == "x: has shape [1], expected [2]"


def test_bfloat16_rounds_to_nearest_and_keeps_what_is_no_number() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -0.0, np.inf, np.nan, 3e38], np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(widened(narrowed(values)), expected)


@pytest.mark.parametrize(
    ("result", "name", "datatype", "shape", "data"),
    [
        (np.float32(1.5), "output", "FP32", [1], [1.5]),
        (np.array(["a", b"b"], object), "output", "BYTES", [2], ["a", "b"]),
        (3, "output", "INT64", [1], [3]),
        ("text", "output", "BYTES", [1], ["text"]),
        (b"raw", "output", "BYTES", [1], ["raw"]),
        ([[1, 2], [3, 4]], "output", "INT64", [2, 2], [1, 2, 3, 4]),
        ([1, 2.5], "output", "FP64", [2], [1.0, 2.5]),
        (["a", "b"], "output", "BYTES", [2], ["a", "b"]),
        ([[1], [2, 3]], "output", "BYTES", [1], ["[[1],[2,3]]"]),
        ([], "output", "FP64", [0], []),
        (None, "output", "BYTES", [1], ["null"]),
        ({"a": 1}, "output", "BYTES", [1], ['{"a":1}']),
        ([{"a": 1}], "output", "BYTES", [1], ['[{"a":1}]']),
        ({"only": np.arange(2)}, "only", "INT64", [2], [0, 1]),
    ],
)
def test_results_of_no_declared_type_are_sent_as_what_they_are(
    result: Any, name: str, datatype: str, shape: list[int], data: list[Any]
) -> None:
    @hotset.function
    def give():  # type: ignore[no-untyped-def]
        return result

    expected = {"name": name, "datatype": datatype, "shape": shape, "data": data}
    assert list(outputs(ask(loaded(give), {"inputs": []})).values()) == [expected]


def test_declared_results_have_their_declared_type() -> None:
    @hotset.function
    def pair() -> tuple[int, list[float]]:
        return 1, [2, 3]

    @hotset.function
    def point() -> Point:
        return Point(1, 2)

    @hotset.function
    def box() -> Box:
        return Box(1, "x")

    @hotset.function
    def arrays() -> dict[str, np.ndarray]:
        return {}

    answer = outputs(ask(loaded(pair), {"inputs": []}))
    assert answer["output_0"]["datatype"] == "INT64"
    assert answer["output_1"] == {"name": "output_1", "datatype": "FP64", "shape": [2], "data": [2.0, 3.0]}
    assert outputs(ask(loaded(point), {"inputs": []}))["y"]["data"] == [2.0]
    assert outputs(ask(loaded(box), {"inputs": []}))["label"]["data"] == ["x"]
    assert tensors_of(loaded(arrays).signature).outputs == []


def test_a_result_that_v2_cannot_hold_is_the_functions_error() -> None:
    @hotset.function
    def imaginary() -> np.ndarray:
        return np.array([1j])

    @hotset.function
    def binary() -> bytes:
        return b"\xff"

    outcome = ask(loaded(imaginary), {"inputs": []})
    assert outcome.status == 500
    assert "complex128 is no datatype" in orjson.loads(outcome.body)["error"]
    assert "ask for it as binary data" in orjson.loads(ask(loaded(binary), {"inputs": []}).body)["error"]
    with pytest.raises(ValueError, match="no datatype"):
        datatype_of(np.dtype("M8[s]"))


def test_plain_and_v2_requests_share_a_batch_and_a_bad_one_fails_alone() -> None:
    @hotset.function(max_batch=8)
    class Square:
        def predict(self, numbers: list[int]) -> list[int]:
            return [number**2 for number in numbers]

    good = orjson.dumps({"inputs": [given_input("numbers", "INT64", [3])]})
    calls = [Call(b"5"), Call(good, NAMED), Call(b"{}", NAMED), Call(b"", WARM)]
    bodies = [(each.status, each.whole) for each in loaded(Square).call_batch(calls)]
    assert [status for status, _ in bodies] == [200, 200, 400, 200]
    assert bodies[0][1] == b"25"
    assert orjson.loads(bodies[1][1])["outputs"][0]["data"] == [9]


def test_a_stream_is_framed_item_by_item_and_ends_with_its_error() -> None:
    @hotset.function
    def count(upto: int):  # type: ignore[no-untyped-def]
        for number in range(upto):
            yield np.array([number])
        raise ValueError("enough")

    body = {"inputs": [given_input("upto", "INT64", [2])], "parameters": {"binary_data_output": True}}
    outcome = ask(loaded(count), body)
    assert outcome.stream is not None
    *items, last = [unframe(chunk) for chunk in outcome.stream]
    assert [np.frombuffer(item[header:], "<i8").tolist() for item, header in items] == [[0], [1]]
    assert orjson.loads(last[0])["error"] == "enough"


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
shapes = st.lists(st.integers(-3, 5) | st.sampled_from([2**31, 2**62, 2**63, 10**30]), max_size=40)
inputs = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["x", "y", ""]),
        "shape": shapes,
        "datatype": st.sampled_from([*DTYPES, "FP99", ""]),
    },
    optional={
        "data": st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=20),
        "parameters": st.dictionaries(
            st.sampled_from(["binary_data_size", "classification", "other"]), scalars, max_size=3
        ),
    },
)
messages = st.fixed_dictionaries(
    {"inputs": st.lists(inputs, max_size=3)},
    optional={
        "id": scalars,
        "parameters": st.dictionaries(st.sampled_from(["binary_data_output", "x", "sequence_id"]), scalars, max_size=3),
        "outputs": st.lists(
            st.fixed_dictionaries(
                {"name": st.sampled_from(["output", "z"])},
                optional={"parameters": st.dictionaries(st.sampled_from(["binary_data", "classification"]), scalars)},
            ),
            max_size=2,
        ),
    },
)

ECHO, SCALE = loaded(Echo), loaded(Scale)


def as_json(message: Any) -> bytes:
    """Python's json, because it writes integers of any size."""
    import json

    return json.dumps(message).encode()


@settings(max_examples=400, deadline=None)
@given(messages, st.binary(max_size=64))
def test_no_message_whatever_is_a_500(message: dict[str, Any], binary: bytes) -> None:
    header = as_json(message)
    for runtime in (ECHO, SCALE):
        outcome = runtime.call(binary, f"{NAMED}; header=accept", header.decode("latin-1"))
        assert outcome.status in (200, 400), outcome.body
        if outcome.status == 400:
            assert orjson.loads(outcome.body)["error"]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 200), st.integers(0, 200), st.binary(max_size=12), st.sampled_from(list(DTYPES)))
def test_no_truncation_or_corruption_is_a_500(cut: int, at: int, noise: bytes, datatype: str) -> None:
    described = {"name": "x", "shape": [2, 2], "datatype": datatype, "parameters": {"binary_data_size": 16}}
    header = as_json({"inputs": [described]})
    body = bytearray(header + bytes(16))
    body[at : at + len(noise)] = noise
    for size in (len(header), min(cut, len(body))):
        outcome = ECHO.call(bytes(body[: len(body) - cut % 20]), f"{NAMED}; header={size}")
        assert outcome.status in (200, 400), outcome.body


def test_a_claim_of_exabytes_takes_no_memory() -> None:
    claims = []
    for datatype in DTYPES:
        for shape in ([2**62], [2**31, 2**31], [10**30], [2**40, 0]):
            described = {"name": "x", "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": 8}}
            claims.append(as_json({"inputs": [described]}).decode())
            claims.append(
                as_json({"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "data": []}]}).decode()
            )
    ECHO.call(bytes(8), f"{NAMED}; header=accept", claims[0])
    tracemalloc.start()
    for claim in claims:
        assert ECHO.call(bytes(8), f"{NAMED}; header=accept", claim).status == 400
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20
