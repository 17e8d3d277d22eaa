"""hotset.testing: a user's unit test of a function."""

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

import hotset
from hotset import testing


@hotset.function(max_batch=8)
class Embed:
    """Letter counts."""

    def load(self, device: str) -> None:
        self.device = device

    def predict(self, texts: list[str]) -> list[list[float]]:
        return [[float(text.count(letter)) for letter in "ab"] for text in texts]

    def unload(self) -> None:
        self.device = "gone"


@hotset.function(max_batch=8)
class Add:
    def predict(self, left: list[int], right: list[int]) -> list[int]:
        return [a + b for a, b in zip(left, right, strict=True)]


@hotset.function
def scale(image: Image.Image, by: float = 2.0) -> Image.Image:
    if by <= 0:
        raise ValueError("by must be positive")
    return image.resize((int(image.width * by), int(image.height * by)))


@hotset.function
def double(x: np.ndarray, *, data: bytes = b"") -> np.ndarray:
    return 2 * x


@hotset.function
def reverse(data: bytes) -> bytes:
    return data[::-1]


@hotset.function
def letters(text: str) -> Iterator[str]:
    for letter in text:
        if letter == "?":
            raise ValueError("no question marks")
        yield letter


def test_a_batched_function() -> None:
    with testing.function(Embed, device="cpu") as embed:
        assert embed("abba") == [2.0, 2.0]
        assert embed(texts="a") == [1.0, 0.0]
        assert embed.batch(["a", "b"]) == [[1.0, 0.0], [0.0, 1.0]]
        assert embed.predict(["aa"]) == [[2.0, 0.0]]
        assert embed.schema["description"] == "Letter counts."
        instance = embed.instance
        assert instance.device == "cpu"
    assert instance.device == "gone"


def test_a_batched_function_of_two_parameters() -> None:
    with testing.function(Add) as add:
        assert add(1, 2) == 3
        assert add.batch([{"left": 1, "right": 2}, {"left": 3, "right": 4}]) == [3, 7]


def test_pictures_arrays_and_bytes_go_through_the_codecs() -> None:
    with testing.function(scale) as f:
        assert f(Image.new("RGB", (2, 3)), by=3).size == (6, 9)
    with testing.function(double) as g:
        assert g(np.ones((1, 2)), data=b"x") == [[2.0, 2.0]]
    with testing.function(reverse) as h:
        assert h(b"abc") == b"cba"
        outcome = h.post(b"abc", "application/octet-stream", "application/json")
        assert (outcome.status, outcome.body) == (200, b'"Y2Jh"')


def test_what_predict_raises_is_raised_here() -> None:
    with testing.function(scale) as f:
        with pytest.raises(ValueError, match="by must be positive"):
            f(Image.new("RGB", (2, 3)), by=0)
        with pytest.raises(hotset.InputError, match="by: expected `float`"):
            f(Image.new("RGB", (2, 3)), by="wide")
        with pytest.raises(hotset.InputError, match="3 arguments given, scale takes 2"):
            f(1, 2, 3)
        assert f.post(b"{}").status == 400


def test_a_stream_is_the_list_of_its_items() -> None:
    with testing.function(letters) as f:
        assert f("abc") == ["a", "b", "c"]
        with pytest.raises(ValueError, match="no question marks"):
            f("ab?")
