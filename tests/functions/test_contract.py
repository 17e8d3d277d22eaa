"""The decorator: what it records, and what it says to those who break the contract."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pytest

import hotset
from hotset.functions.contract import FunctionKind, function_name, options_of
from hotset.functions.inspection import signature_of


def test_a_bare_decorator_takes_the_defaults() -> None:
    @hotset.function
    class ImageClasses:
        def predict(self, text: str) -> str:
            return text

    options = options_of(ImageClasses)
    assert options is not None
    assert (options.name, options.kind, options.gpu_memory_bytes) == ("image-classes", FunctionKind.GPU, None)
    assert (options.max_batch, options.timeout_s, options.load_timeout_s, options.retry) == (1, 60.0, 300.0, True)
    assert ImageClasses().predict("still an ordinary class") == "still an ordinary class"


def test_options_are_read_in_their_units() -> None:
    @hotset.function(
        name="embed",
        gpu_memory="600MiB",
        max_batch=16,
        max_batch_wait="5ms",
        timeout="30s",
        load_timeout=90,
        retry=False,
        env={"OMP_NUM_THREADS": "1"},
    )
    class Embed:
        def predict(self, texts: list[str]) -> list[list[float]]:
            return [[float(len(text))] for text in texts]

    options = options_of(Embed)
    assert options is not None
    assert (options.name, options.gpu_memory_bytes, options.max_batch) == ("embed", 600 * 2**20, 16)
    assert options.max_batch_wait_s == 0.005
    assert (options.timeout_s, options.load_timeout_s, options.retry) == (30.0, 90.0, False)
    assert options.env == {"OMP_NUM_THREADS": "1"}


def test_a_plain_function_runs_on_the_cpu() -> None:
    @hotset.function
    def word_count(text: str) -> int:
        return len(text.split())

    options = options_of(word_count)
    assert options is not None
    assert (options.name, options.kind) == ("word-count", FunctionKind.CPU)
    assert word_count("one two") == 2


def test_a_subclass_is_not_a_function_by_inheritance() -> None:
    @hotset.function
    class Base:
        def predict(self, text: str) -> str:
            return text

    class Derived(Base):
        pass

    assert options_of(Derived) is None
    with pytest.raises(hotset.FunctionError, match=r"Derived is no function yet; put @hotset\.function above it"):
        signature_of(Derived)


@pytest.mark.parametrize(
    ("python_name", "name"),
    [
        ("ImageClasses", "image-classes"),
        ("OCR", "ocr"),
        ("HTTPServer2", "http-server2"),
        ("_word__count", "word-count"),
    ],
)
def test_function_names_come_from_python_names(python_name: str, name: str) -> None:
    assert function_name(python_name) == name


class NoPredict:
    def load(self, device: str) -> None: ...


class Untyped:
    def predict(self, text):  # type: ignore[no-untyped-def]
        return text


class Typed:
    def predict(self, text: str) -> str:
        return text


class Loose:
    def predict(self, *texts: str) -> str:
        return "".join(texts)


class Asynchronous:
    async def predict(self, text: str) -> str:
        return text


class ReturnsNoList:
    def predict(self, texts: list[str]) -> str:
        return "".join(texts)


class TakesNoList:
    def predict(self, texts: str) -> list[str]:
        return [texts]


class TakesAnyList:
    def predict(self, texts: list) -> list[str]:  # type: ignore[type-arg]
        return texts


class BatchDefault:
    def predict(self, texts: list[str], top: list[int] = [1]) -> list[str]:  # noqa: B006
        return texts


class BatchStream:
    def predict(self, texts: list[str]) -> Iterator[str]:
        yield from texts


class LoadTakesNothing:
    def load(self) -> None: ...

    def predict(self, text: str) -> str:
        return text


class AsyncLoad:
    async def load(self, device: str) -> None: ...

    def predict(self, text: str) -> str:
        return text


class UnloadTakesMore:
    def unload(self, how: str) -> None: ...

    def predict(self, text: str) -> str:
        return text


class Strange:
    pass


class TakesStrange:
    def predict(self, thing: Strange) -> str:
        return str(thing)


class TakesArrayOrText:
    def predict(self, thing: np.ndarray | str) -> str:
        return str(thing)


class TwoLists:
    def predict(self, thing: list[int] | list[str]) -> str:
        return str(thing)


@dataclass
class Box:
    corners: Annotated[np.ndarray, hotset.Tensor("float32", (4,))]


class HidesATensor:
    def predict(self, boxes: dict[str, list[Box]]) -> str:
        return str(boxes)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (NoPredict, {}, r"NoPredict has no predict; add a method"),
        (Untyped, {}, r"Untyped\.predict: parameter 'text' has no type; write text: str"),
        (Loose, {}, r"takes \*texts: str; name every parameter"),
        (Asynchronous, {}, r"is async; write it as a plain def"),
        (ReturnsNoList, {"max_batch": 4}, r"must take lists and return a list because max_batch is 4"),
        (TakesNoList, {"max_batch": 4}, r"parameter 'texts' must be a list"),
        (TakesAnyList, {"max_batch": 4}, r"write texts: list\[\.\.\.\] with the type that one request sends"),
        (BatchDefault, {"max_batch": 4}, r"'top' has a default, which a joined call cannot use"),
        (BatchStream, {"max_batch": 4}, r"yields its results and cannot join requests"),
        (LoadTakesNothing, {}, r"load must be callable as load\(self, device: str\)"),
        (AsyncLoad, {}, r"AsyncLoad\.load must be a plain method"),
        (UnloadTakesMore, {}, r"unload must be callable as unload\(self\)"),
        (TakesStrange, {}, r"'thing' has the type [a-z_.]*Strange, which cannot be read from a request"),
        (TakesArrayOrText, {}, r"'thing' has the type .*\(Type unions"),
        (TwoLists, {}, r"\(Type unions may not contain more than one array-like"),
        (HidesATensor, {}, r"Tensor\(\.\.\.\) inside Box\.corners would not be checked"),
        (Typed, {"max_batch": 0}, r"max_batch is 0; give a whole number from 1"),
        (Typed, {"max_batch": True}, r"max_batch is True"),
        (Typed, {"max_batch_wait": "5ms"}, r"max_batch_wait is for filling batches: give max_batch too"),
        (Typed, {"gpu_memory": "lots"}, r"Typed: gpu_memory: 'lots' is no size; write one such as 600MiB"),
        (Typed, {"gpu_memory": 0}, r"gpu_memory must be more than 0"),
        (Typed, {"timeout": "soon"}, r"timeout: 'soon' is no duration"),
        (Typed, {"timeout": 0}, r"timeout and load_timeout must be more than 0"),
        (Typed, {"name": "No Spaces"}, r"the name 'No Spaces' cannot be part of a URL"),
        (Typed, {"env": {"A=B": "x"}}, r"env has 'A=B'='x'"),
        (Typed, {"env": {"A": 1}}, r"env has 'A'=1"),
        (len, {}, r"belongs above a class or a plain function"),
    ],
)
def test_contract_breaks_are_told_at_the_decorator(
    target: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(hotset.FunctionError, match=message):
        hotset.function(**options)(target)


def test_gpu_memory_has_no_meaning_for_a_plain_function() -> None:
    with pytest.raises(hotset.FunctionError, match="leave it out of a plain function"):

        @hotset.function(gpu_memory="1GiB")
        def add(values: list[float]) -> float:
            return sum(values)


def test_a_type_defined_further_down_is_looked_up_at_load() -> None:
    @hotset.function
    def early(value: "Later") -> str:  # type: ignore[name-defined]  # noqa: F821
        return str(value)

    with pytest.raises(hotset.FunctionError, match="'Later' is not defined; define or import it"):
        signature_of(early)
    early.__globals__["Later"] = int
    try:
        assert signature_of(early).decode(b"3") == (3,)
    finally:
        del early.__globals__["Later"]


def test_annotations_that_are_no_types_are_told() -> None:
    with pytest.raises(hotset.FunctionError, match="an annotation cannot be resolved"):

        @hotset.function
        def odd(value: "3 +") -> str:  # type: ignore[valid-type]  # noqa: F722
            return str(value)


def test_importing_hotset_stays_cheap() -> None:
    program = (
        "import sys, hotset; from hotset.functions import runtime, loading\n"
        "@hotset.function\n"
        "def f(x: list[float]) -> float: return sum(x)\n"
        "print(sorted({'numpy', 'torch', 'PIL', 'starlette', 'uvicorn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_package_offers_its_public_names() -> None:
    assert {"function", "Tensor", "InputError", "testing"} <= set(dir(hotset))
    assert hotset.testing.function is not hotset.function
    with pytest.raises(AttributeError, match="no attribute 'functoin'"):
        hotset.functoin  # noqa: B018
