"""The examples are code that a user copies: readable, typed, and right when they run on real inputs."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

import hotset.testing
from hotset.functions.loading import find_entry, load_entry
from hotset.functions.media import JSON

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LONGEST_LINES = 75


def script(name: str) -> ModuleType:
    """A module of scripts/, which is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# demo.py imports demo_load.py from its own folder.
script("demo_load")
demo = script("demo")
demo_calls = script("demo_calls")

absent = [name for file in demo.REQUIREMENTS for name in demo.missing(file)]
needs_packages = pytest.mark.skipif(bool(absent), reason=f"`make demo` installs {', '.join(absent)}")

in_examples = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def functions(tree: ast.Module) -> list[ast.ClassDef]:
    return [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any("hotset.function" in ast.unparse(d) for d in node.decorator_list)
    ]


@in_examples
def test_an_example_is_one_readable_file(path: Path) -> None:
    source = path.read_text()
    tree = ast.parse(source)
    (function,) = functions(tree)

    assert len(source.splitlines()) <= LONGEST_LINES
    assert ast.get_docstring(tree)
    assert ast.get_docstring(function)
    options = {keyword.arg for keyword in function.decorator_list[0].keywords}  # type: ignore[attr-defined]
    assert {"gpu_memory", "timeout"} <= options


@in_examples
def test_an_example_is_named_after_its_file_and_typed_throughout(path: Path) -> None:
    (function,) = functions(ast.parse(path.read_text()))
    assert function.name == path.stem.title().replace("_", "")

    methods = {node.name: node for node in function.body if isinstance(node, ast.FunctionDef)}
    assert {"load", "predict"} <= set(methods)
    for method in methods.values():
        assert method.returns is not None
        assert all(argument.annotation is not None for argument in method.args.args[1:])
    assert [ast.unparse(a) for a in methods["load"].args.args] == ["self", "device: str"]


def test_the_examples_pin_what_the_project_pins() -> None:
    project = demo.pins(ROOT / "constraints.txt")
    for file in demo.REQUIREMENTS:
        shared = {name: pinned for name, pinned in demo.pins(file).items() if name in project}
        assert shared == {name: project[name] for name in shared}


def test_every_example_is_in_the_demo() -> None:
    names = [
        node.value
        for node in ast.walk(ast.parse((ROOT / "scripts" / "demo_calls.py").read_text()))
        if isinstance(node, ast.Constant)
    ]
    assert all(path.stem.replace("_", "-") in names for path in EXAMPLES)


def test_a_wrong_answer_is_not_called_right() -> None:
    guess = [{"label": "teapot", "probability": 0.9}]
    assert not demo_calls._judge_labels([guess], [{"espresso"}]).right
    assert not demo_calls._judge_lines([{"text": "lnvoice"}, {"text": "Region"}]).right
    assert not demo_calls._judge_notes([{"note": note, "hz": 440.0} for note in ("A4", "C4", "A3")]).right
    assert not demo_calls._judge_sentences([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).right
    assert not demo_calls._judge_voices([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]).right
    assert not demo_calls._judge_speech([[{"start_s": 0.0, "end_s": 12.0}]]).right
    assert not demo_calls._judge_forecast([{"median": demo_calls.PASSENGERS[0]}]).right
    assert not demo_calls._judge_nsfw([0.9]).right
    assert not demo_calls._judge_files([{"label": "python"}]).right
    assert not demo_calls._judge_languages([{"code": "en"}]).right


@needs_packages
@pytest.mark.filterwarnings("default")  # what the models' own packages warn about is theirs to mend
@in_examples
def test_an_example_is_right_on_real_inputs(path: Path) -> None:
    entry = find_entry(path)
    target = load_entry(path.parent, entry)
    (showcase,) = [showcase for showcase in demo_calls.showcases() if showcase.file == path]

    with hotset.testing.function(target) as function:
        outcomes = [function.post(call.body, call.content_type) for call in showcase.calls]
        assert [outcome.status for outcome in outcomes] == [200] * len(outcomes)
        assert {outcome.content_type for outcome in outcomes} == {JSON}
        answers = [json.loads(outcome.body) for outcome in outcomes]
        verdict = showcase.judge(answers)
        assert verdict.right, verdict.answers
        if function.schema["batched"]:
            joined = function.batch([json.loads(call.body)["text"] for call in showcase.calls])
            assert showcase.judge(joined) == verdict
