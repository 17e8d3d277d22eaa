"""``hotset dev``: the function as its file is now."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hotset.cli import dev
from hotset.cli.dev import DevelopedFunction, application

CODE = """
import hotset

@hotset.function
class Twice:
    def predict(self, number: int) -> int:
        return {}
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "twice_dev.py"
    path.write_text(CODE.format("2 * number"))
    yield path
    sys.modules.pop("twice_dev", None)


class Client:
    """Calls of an application without a network."""

    def __init__(self, function: DevelopedFunction) -> None:
        self._transport = httpx.ASGITransport(application(function))

    def post(self, path: str, json: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            async with httpx.AsyncClient(transport=self._transport, base_url="http://dev") as client:
                return await client.post(path, json=json)

        return asyncio.run(call())


def edit(file: Path, text: str) -> None:
    """Write, and make sure that the time of the file says so, however coarse the clock is."""
    before = file.stat().st_mtime
    file.write_text(text)
    os.utime(file, (before + 10, before + 10))


def test_it_answers_as_the_server_would_and_follows_the_file(file: Path) -> None:
    said: list[str] = []
    function = DevelopedFunction(file, "cpu", said.append)
    client = Client(function)
    assert client.post("/", json=4).json() == 8
    assert client.post("/function/twice", json={"number": 4}).json() == 8
    bad = client.post("/", json={"numbr": 4})
    assert bad.status_code == 400
    assert bad.json()["field"] == "numbr"
    assert function.name == "twice"

    edit(file, CODE.format("number // 0"))
    broken = client.post("/", json=4)
    assert broken.status_code == 500
    assert "Traceback (most recent call last)" in broken.text
    assert "ZeroDivisionError" in broken.text

    edit(file, CODE.format("3 * number"))
    assert client.post("/", json=4).json() == 12
    assert said[0] == "twice is loaded on cpu."


def test_code_that_does_not_load_is_answered_with_its_traceback_until_it_is_mended(file: Path) -> None:
    said: list[str] = []
    file.write_text("import no_such_module_anywhere\n")
    function = DevelopedFunction(file, "cpu", said.append)
    client = Client(function)
    answer = client.post("/", json=1)
    assert answer.status_code == 500
    assert "ModuleNotFoundError: No module named 'no_such_module_anywhere'" in answer.text
    assert function.name == "twice_dev"
    edit(file, "x = 1\n")
    assert "put @hotset.function above" in client.post("/", json=1).text
    edit(file, CODE.format("number"))
    assert client.post("/", json=1).json() == 1
    assert "Traceback" in said[0]


def test_a_stream_comes_item_by_item(tmp_path: Path) -> None:
    file = tmp_path / "counting_dev.py"
    file.write_text(
        "from collections.abc import Iterator\nimport hotset\n\n@hotset.function\nclass Counting:\n"
        "    def predict(self, to: int) -> Iterator[int]:\n        yield from range(to)\n"
    )
    client = Client(DevelopedFunction(file, "cpu", lambda _: None))
    assert client.post("/", json=3).text == "0\n1\n2\n"


def test_it_is_loaded_again_while_nobody_calls(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dev, "LOOK_EVERY_S", 0.0)
    said: list[str] = []
    function = DevelopedFunction(file, "cpu", said.append)

    async def story() -> None:
        async with application(function).router.lifespan_context(None):  # type: ignore[arg-type]
            while len(said) < 1:
                await asyncio.sleep(0)
            edit(file, CODE.format("1 +"))
            while len(said) < 2:
                await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(story(), 30))
    assert "SyntaxError" in said[1]


def test_one_of_several_functions_is_chosen_by_its_entry(file: Path) -> None:
    file.write_text(
        CODE.format("2 * number") + "\n@hotset.function\ndef thrice(number: int) -> int:\n    return 3 * number\n"
    )
    said: list[str] = []
    DevelopedFunction(file, "cpu", said.append).reload()
    assert "--entry: twice_dev:Twice, twice_dev:thrice" in said[-1]
    chosen = DevelopedFunction(file, "cpu", said.append, "twice_dev:thrice")
    assert Client(chosen).post("/", {"number": 2}).json() == 6
