"""The code in docs/functions.md runs, and does what the guide says."""

import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hotset
from hotset import testing
from hotset.functions.loading import functions_in

GUIDE = Path(__file__).parents[2] / "docs" / "functions.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def guide() -> Iterator[dict[str, Callable[..., Any]]]:
    """Every function of the guide by name; a block's own test is ``test_double``."""
    found: dict[str, Callable[..., Any]] = {}
    names = []
    for number, block in enumerate(BLOCKS):
        module = types.ModuleType(f"guide_block_{number}")
        sys.modules[module.__name__] = module
        names.append(module.__name__)
        exec(compile(block, f"{GUIDE.name} block {number}", "exec"), vars(module))
        found |= functions_in(module)
        found |= {key: value for key, value in vars(module).items() if key.startswith("test_")}
    yield found
    for name in names:
        del sys.modules[name]


def test_every_block_is_a_function(guide: dict[str, Callable[..., Any]]) -> None:
    assert set(guide) == {
        "Shout",
        "word_count",
        "square_root",
        "norms",
        "Lengths",
        "Tell",
        "Double",
        "test_double",
    }


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("Shout", {"text": "hello", "times": 2}, "HELLO!!"),
        ("word_count", {"text": "one two"}, 2),
        ("square_root", {"number": 9}, 3.0),
        ("norms", {"points": np.array([[3, 4, 0]])}, [5.0]),
        ("Lengths", {"texts": "four"}, 4),
        ("Tell", {"prompt": "a", "words": 2}, ["a 0", "a 1"]),
    ],
)
def test_each_function_works(
    guide: dict[str, Callable[..., Any]], name: str, arguments: dict[str, Any], result: Any
) -> None:
    with testing.function(guide[name]) as function:
        assert function(**arguments) == result


def test_the_guides_own_test_passes(guide: dict[str, Callable[..., Any]]) -> None:
    guide["test_double"]()


def test_a_value_that_makes_no_sense_is_refused(guide: dict[str, Callable[..., Any]]) -> None:
    with testing.function(guide["square_root"]) as function:
        outcome = function.post(b"-1")
        assert (outcome.status, outcome.body) == (400, b'{"error":"number: must not be negative","field":"number"}')
        with pytest.raises(hotset.InputError):
            function(-1)
