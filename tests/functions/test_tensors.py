"""Arrays and tensors: in as lists, base64, raw bytes and .npy; bounded by what was sent."""

import base64
import io
import json
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import numpy as np
import numpy.typing as npt
import pytest
import torch

import hotset
from hotset.functions.inspection import signature_of
from hotset.functions.tensors import to_npy

NPY = "application/x-npy"
OCTETS = "application/octet-stream"


@hotset.function
def any_array(x: np.ndarray) -> np.ndarray:
    return x


@hotset.function
def doubles(x: npt.NDArray[np.float64]) -> float:
    return float(x.sum())


@hotset.function
def points(x: Annotated[np.ndarray, hotset.Tensor("float32", (None, 3))]) -> float:
    return float(x.sum())


@hotset.function
def scaled(x: Annotated[np.ndarray, hotset.Tensor("float32", (None, 3))], scale: float = 1.0) -> float:
    return float(x.sum()) * scale


@hotset.function
def pixels(x: Annotated[np.ndarray, hotset.Tensor(np.uint8, (2, -1))]) -> int:
    return int(x.sum())


@hotset.function
def mask(x: Annotated[np.ndarray, hotset.Tensor(bool)]) -> int:
    return int(x.sum())


@hotset.function
def grid(x: Annotated[np.ndarray, hotset.Tensor("float64", (None, None))]) -> float:
    return float(x.sum())


@hotset.function
def holes(x: Annotated[np.ndarray, hotset.Tensor("float32", (None,), finite=False)]) -> int:
    return int(np.isnan(x).sum())


@hotset.function
def tensor(x: Annotated[torch.Tensor, hotset.Tensor(torch.float32, (None,))] | None = None) -> float:
    return 0.0 if x is None else float(x.sum())


@hotset.function
def many(xs: list[Annotated[np.ndarray, hotset.Tensor("int64", (2,))]]) -> int:
    return len(xs)


def array_of(function: Any, body: bytes, content_type: str = "application/json") -> Any:
    return signature_of(function).decode(body, content_type)[0]


def encoded(array: np.ndarray, **changes: Any) -> bytes:
    data = base64.b64encode(array.tobytes()).decode()
    return json.dumps({"dtype": array.dtype.name, "shape": array.shape, "data": data} | changes).encode()


@pytest.mark.parametrize(
    ("function", "body", "expected"),
    [
        (any_array, b"[[1, 2], [3, 4]]", np.array([[1, 2], [3, 4]])),
        (any_array, b"[[1, 2.5]]", np.array([[1, 2.5]])),
        (any_array, b"[true, false]", np.array([True, False])),
        (any_array, b'{"x": [1]}', np.array([1])),
        (any_array, b"3.5", np.array(3.5)),
        (any_array, b"[]", np.array([], np.float64)),
        (doubles, b"[1, 2]", np.array([1.0, 2.0])),
        (points, b"[[1, 2, 3]]", np.array([[1, 2, 3]], np.float32)),
        (pixels, b"[[1], [255]]", np.array([[1], [255]], np.uint8)),
        (mask, b"[[true]]", np.array([[True]])),
    ],
)
def test_json_lists(function: Any, body: bytes, expected: np.ndarray) -> None:
    array = array_of(function, body)
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)


def test_base64_objects_are_read_bare_and_named() -> None:
    wanted = np.array([[1, 2, 3]], np.float32)
    np.testing.assert_array_equal(array_of(points, encoded(wanted)), wanted)
    np.testing.assert_array_equal(array_of(points, b'{"x": %s}' % encoded(wanted)), wanted)


def test_raw_bytes_take_the_shape_that_the_signature_leaves_no_choice_about() -> None:
    wanted = np.arange(6, dtype=np.float32).reshape(2, 3)
    arguments = signature_of(scaled).decode(memoryview(wanted.tobytes()), OCTETS)
    np.testing.assert_array_equal(arguments[0], wanted)
    assert arguments[1] == 1.0
    np.testing.assert_array_equal(
        array_of(any_array, b"\x01\x02", f"{OCTETS}; dtype=uint8"), np.array([1, 2], np.uint8)
    )


def test_raw_bytes_may_say_their_dtype_and_shape() -> None:
    wanted = np.arange(6).reshape(2, 3)
    array = array_of(any_array, wanted.tobytes(), f'{OCTETS}; dtype=int64; shape="2,3"')
    np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize(
    "array",
    [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.array(3, ">i4"), np.zeros((0, 4))],
)
def test_npy_files(array: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, array)
    got = array_of(any_array, file.getvalue(), NPY)
    np.testing.assert_array_equal(got, array)
    assert got.dtype.isnative


def test_an_array_is_its_own_and_writable() -> None:
    body = bytearray(np.ones(3, np.float32).tobytes())
    array = array_of(holes, memoryview(body), OCTETS)  # type: ignore[arg-type]
    body[:] = bytes(len(body))
    array[0] = 5
    assert array.tolist() == [5, 1, 1]


def test_bytes_that_are_no_booleans_become_booleans() -> None:
    assert array_of(mask, b"\x00\x02", OCTETS).tolist() == [False, True]


def test_torch_tensors_come_on_the_cpu() -> None:
    got = array_of(tensor, b"[1, 2.5]")
    assert torch.equal(got, torch.tensor([1, 2.5]))
    assert array_of(tensor, b"null") is None
    assert torch.equal(array_of(tensor, np.ones(2, np.float32).tobytes(), OCTETS), torch.ones(2))


def test_not_a_number_is_let_in_where_the_function_wants_it() -> None:
    assert np.isnan(array_of(holes, np.array([np.nan], np.float32).tobytes(), OCTETS)).all()


@pytest.mark.parametrize(
    ("function", "body", "field", "problem"),
    [
        (points, b"[[1, 2]]", "x", "has shape [1, 2], expected [any, 3]"),
        (points, b'{"x": [[1, "2", 3]]}', "x[0][1]", "expected `float`, got `str`"),
        (points, b"[[1, 2, 3], [1, 2]]", "x", "the nested lists differ in length"),
        (points, b"[[1, 2, 3], 4]", "x[1]", "expected `array`, got `int`"),
        (points, b"[[1, 2, 1e300]]", "x", "holds NaN, an infinity or numbers beyond float32"),
        (points, b'"text"', "x", "expected `float`, got `str`"),
        (any_array, b"[1, 99999999999999999999]", "x", "holds numbers beyond 64 bits"),
        (any_array, b"[" * 40 + b"]" * 40, "x", "more than 32 dimensions"),
        (any_array, b"[" * 9999 + b"]" * 9999, "", "nested too deep"),
        (pixels, b"[[1], [256]]", "x", "holds numbers outside uint8's range, 0 to 255"),
        (pixels, b"[[1], [-1]]", "x", "holds numbers outside uint8's range"),
        (pixels, b"[[1], [1.5]]", "x[1][0]", "expected `int`, got `float`"),
        (mask, b"[1]", "x[0]", "expected `bool`, got `int`"),
        (many, b"[[1, 2], [1]]", "xs[1]", "has shape [1], expected [2]"),
        (many, b'[[1, 2], [1, "x"]]', "xs[1][1]", "expected `int`, got `str`"),
        (points, encoded(np.ones((1, 3))), "x", "is float64, expected float32"),
        (points, encoded(np.ones((1, 3)), dtype="object"), "x", "dtype 'object' is not one of bool"),
        (points, encoded(np.ones((1, 3)), shape=[1, 4]), "x", "24 bytes, but float64 [1, 4] takes 32"),
        (points, encoded(np.ones((1, 3)), shape=[-1, 3]), "x.shape[0]", "expected `int` >= 0"),
        (points, encoded(np.ones((1, 3)), shape=[2**40] * 32), "x", "24 bytes, but float64 [109951"),
        (points, encoded(np.ones((1, 3)), shape=[1] * 33), "x.shape", "expected `array` of length <= 32"),
        (points, encoded(np.ones((1, 3)), data="?"), "x.data", "invalid base64 encoded string"),
        (points, encoded(np.ones((1, 3)), more=1), "x.more", "unknown field"),
        (points, b'{"x": {"dtype": "float32"}}', "x.shape", "required, but missing"),
    ],
)
def test_what_is_no_such_array_names_the_place(function: Any, body: bytes, field: str, problem: str) -> None:
    with pytest.raises(hotset.InputError) as caught:
        array_of(function, body)
    assert caught.value.field == field
    assert caught.value.problem.startswith(problem)


def npy(header: bytes, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    size = len(header).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + size + header + data


PICKLED = io.BytesIO()
np.save(PICKLED, np.array([{"a": 1}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("body", "content_type", "problem"),
    [
        (b"123", f"{OCTETS}; dtype=float32", "3 bytes, but float32 [0] takes 0"),
        (b"1234", OCTETS, "say what the bytes are: Content-Type: application/octet-stream; dtype=float32"),
        (b"1234", f"{OCTETS}; dtype=complex64", "dtype 'complex64' is not one of"),
        (b"1234", f"{OCTETS}; dtype=uint8; shape=2x2", "shape '2x2' is not a list of lengths such as 2,3"),
        (b"1234", f"{OCTETS}; dtype=uint8; shape=2,-2", "shape '2,-2' is not a list"),
        (b"1234", f"{OCTETS}; dtype=uint8; shape={'1,' * 40}", "shape '1,1,"),
        (np.array([np.inf]).tobytes(), f"{OCTETS}; dtype=float64", "holds NaN, an infinity"),
        (b"", NPY, "not a .npy file; make one with numpy.save"),
        (b"\x93NUMPY\x09\x00", NPY, "not a .npy file"),
        (npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"), NPY, "0 bytes, but float64"),
        (npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -1), }", bytes(8)), NPY, "a .npy file of"),
        (npy(b"{'descr': '<c8', 'fortran_order': False, 'shape': (1,), }", bytes(8)), NPY, "a .npy file of complex64"),
        (npy(b"{'descr': '<f8'}"), NPY, "not a .npy file"),
        (npy(b"__import__('os')"), NPY, "not a .npy file"),
        pytest.param(npy(b"(" * 9000, version=b"\x02\x00"), NPY, "not a .npy file", id="deep"),
        (PICKLED.getvalue(), NPY, "a .npy file of object cannot be read"),
    ],
)
def test_raw_bodies_that_are_no_array(body: bytes, content_type: str, problem: str) -> None:
    with pytest.raises(hotset.InputError) as caught:
        array_of(any_array, body, content_type)
    assert caught.value.field == "x"
    assert caught.value.problem.startswith(problem)


def test_raw_bytes_of_two_open_dimensions_must_say_their_shape() -> None:
    with pytest.raises(hotset.InputError, match="say its shape, any, any"):
        array_of(grid, bytes(16), OCTETS)
    assert array_of(grid, bytes(16), f"{OCTETS}; shape=1,2").shape == (1, 2)


@pytest.mark.parametrize(
    ("dtype", "shape"), [("float99", None), ("complex64", None), ("float32", (1.5,)), (None, (-2,))]
)
def test_a_tensor_that_cannot_be_is_told_where_it_is_written(dtype: Any, shape: Any) -> None:
    with pytest.raises(hotset.FunctionError, match="Tensor: "):
        hotset.Tensor(dtype, shape)


def test_the_schema_offers_lists_and_base64() -> None:
    schema = signature_of(points).schema()
    assert schema["accepts"] == ["application/json", OCTETS, NPY]
    offer = schema["input"]["properties"]["x"]
    assert offer["title"] == "float32[any, 3]"
    lists, base64_object = offer["anyOf"]
    assert lists == {
        "type": "array",
        "items": {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3},
    }
    assert base64_object["properties"]["dtype"] == {"type": "string", "enum": ["float32"]}
    assert signature_of(any_array).schema()["output"]["title"] == "tensor[...]"
    assert signature_of(any_array).schema()["produces"] == ["application/json", NPY, OCTETS]


def test_npy_answers_read_back() -> None:
    array = np.arange(6).reshape(2, 3).T
    np.testing.assert_array_equal(np.load(io.BytesIO(to_npy(array))), array)
    assert np.load(io.BytesIO(to_npy(np.array(3.0)))).shape == ()


class Found(TypedDict):
    corners: Annotated[np.ndarray, hotset.Tensor("float32", (4,))]


def test_a_tensor_inside_a_result_is_written_but_not_described() -> None:
    @hotset.function
    def find(text: str) -> Found:
        return {"corners": np.zeros(4, np.float32)}

    signature = signature_of(find)
    assert signature.schema()["output"] == {}
    assert json.loads(signature.encode(find("x")).body) == {"corners": [0, 0, 0, 0]}


@dataclass
class Crop:
    picture: np.ndarray
    name: str = ""


def test_a_bare_array_may_be_a_field_of_a_record() -> None:
    @hotset.function
    def crop(crop: Crop) -> int:
        return int(crop.picture.size)

    assert array_of(crop, b'{"picture": [[1, 2]]}').picture.shape == (1, 2)
    with pytest.raises(hotset.InputError, match=r"crop\.picture\[1\]: expected"):
        array_of(crop, b'{"crop": {"picture": [1, "x"]}}')
