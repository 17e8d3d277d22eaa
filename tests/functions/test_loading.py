"""From a file and a name to the decorated object."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotset.errors import FunctionError
from hotset.functions.contract import options_of
from hotset.functions.loading import find_entry, load_entry

ONE = """
import hotset
from helping_hand import suffix
@hotset.function
def shout(text: str) -> str: return text.upper() + suffix
"""
TWO = """
import hotset
@hotset.function
def one(text: str) -> str: return text
@hotset.function
class Two:
    def predict(self, text: str) -> str: return text
class Undecorated: pass
"""


@pytest.fixture(autouse=True)
def _leave_no_modules_behind() -> Iterator[None]:
    modules, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    sys.path[:] = path


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "single_fn.py").write_text(ONE)
    (tmp_path / "helping_hand.py").write_text("suffix = '!'\n")
    (tmp_path / "double_fn.py").write_text(TWO)
    (tmp_path / "empty_fn.py").write_text("from single_fn import shout\n")
    return tmp_path


def test_the_single_function_of_a_file_needs_no_name(code: Path) -> None:
    assert find_entry(code / "single_fn.py") == "single_fn:shout"
    assert load_entry(code, "single_fn")("hi") == "HI!"
    assert load_entry(str(code), "single_fn:shout")("hi") == "HI!"


def test_a_package_module_is_an_entry_too(code: Path) -> None:
    (code / "some_pkg").mkdir()
    (code / "some_pkg" / "inner.py").write_text(TWO)
    options = options_of(load_entry(code, "some_pkg.inner:Two"))
    assert options is not None
    assert options.name == "two"


def test_reload_forgets_the_old_code_and_its_helpers(code: Path) -> None:
    assert load_entry(code, "single_fn")("hi") == "HI!"
    (code / "helping_hand.py").write_text("suffix = ' again'\n")
    assert load_entry(code, "single_fn")("hi") == "HI!"
    assert load_entry(code, "single_fn", reload=True)("hi") == "HI again"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("double_fn", r"choose one of its functions with --entry: double_fn:one, double_fn:Two"),
        ("double_fn:Three", r"double_fn has no Three; choose one of its functions"),
        ("double_fn:Undecorated", r"Undecorated in double_fn is no function yet; put @hotset\.function above it"),
        ("empty_fn", r"nothing in it is decorated; put @hotset\.function above"),
        ("missing_fn:X", r"no module missing_fn in"),
        ("missing_pkg.inner:X", r"no module missing_pkg\.inner in"),
        ("../evil:X", r"is not module:Name"),
        ("", r"is not module:Name"),
        ("json:loads", r"the name json already belongs to .*; rename the function's file"),
        ("sys:exit", r"the name sys already belongs to the interpreter itself"),
    ],
)
def test_an_entry_that_leads_nowhere_is_told(code: Path, entry: str, message: str) -> None:
    with pytest.raises(FunctionError, match=message):
        load_entry(code, entry)


def test_what_the_code_itself_raises_keeps_its_traceback(code: Path) -> None:
    (code / "needs_more.py").write_text("import a_package_nobody_has\n")
    (code / "breaks_now.py").write_text("1 / 0\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_nobody_has"):
        load_entry(code, "needs_more:F")
    with pytest.raises(ZeroDivisionError):
        load_entry(code, "breaks_now:F")


def test_paths_that_hold_no_code_are_told(code: Path) -> None:
    with pytest.raises(FunctionError, match="is no directory; deploy the function again"):
        load_entry(code / "gone", "single_fn")
    with pytest.raises(FunctionError, match="is no Python file"):
        find_entry(code / "gone.py")
    with pytest.raises(FunctionError, match="is no Python file"):
        find_entry(code)
