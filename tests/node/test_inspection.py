"""A function is looked at in a process like the one that will serve it, which is gone afterwards."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from hotset.functions.description import Description, Failure
from hotset.node.inspection import inspect
from hotset.node.spawner import ProcessSource, Spawner
from hotset.node.zygote import ZygoteSource

HEAD = "import hotset\n"
FUNCTION = """
@hotset.function(gpu_memory="1MiB")
class Model:
    def predict(self, value: int) -> int:
        return value
"""


def run(story: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 60))


@asynccontextmanager
async def zygote(*modules: str) -> AsyncIterator[ZygoteSource]:
    source = ZygoteSource(pool_size=1)
    try:
        source.prepare(sys.executable, modules)
        while not source.ready(sys.executable):
            await asyncio.sleep(0.01)
        yield source
    finally:
        source.close()


async def inspected(
    source: ProcessSource, folder: Path, code: str, *, timeout_s: float = 30.0, **env: str
) -> tuple[Description | Failure | None, str]:
    """What came of it, and what was printed."""
    (folder / "looked_at.py").write_text(HEAD + code)
    said = bytearray()
    answer = await inspect(source, sys.executable, folder, "looked_at", env, said.extend, timeout_s)
    return msgspec.json.decode(answer, type=Description | Failure) if answer else None, said.decode()


def test_a_fork_and_a_fresh_interpreter_say_the_same(tmp_path: Path) -> None:
    code = "import os, sys, helper\nprint('says', os.environ['TONE'], os.getcwd())\n" + FUNCTION
    (tmp_path / "helper.py").write_text("import safetensors\n")

    async def story() -> None:
        spawner = Spawner()
        fresh, said = await inspected(spawner, tmp_path, code, TONE="warm")
        spawner.close()
        assert isinstance(fresh, Description)
        assert said == f"says warm {tmp_path}\n"
        assert (fresh.entry, fresh.options.gpu_memory_bytes) == ("looked_at:Model", 1 << 20)
        assert "safetensors" in fresh.frameworks
        assert "PIL" not in fresh.frameworks
        async with zygote("safetensors", "PIL") as source:
            assert await inspected(source, tmp_path, code, TONE="warm") == (fresh, said)

    run(story)


def test_what_is_in_the_zygote_is_imported_no_second_time_and_told_where_it_is_needed(tmp_path: Path) -> None:
    """A stand-in for torch, which takes long to import, and for a package that needs it."""
    for name, needs in (("tokenizers", ""), ("transformers", "import tokenizers\n")):
        (tmp_path / f"{name}.py").write_text(f"{needs}print('imports {name}')\n")

    async def story() -> None:
        async with zygote("tokenizers", "transformers") as source:
            direct, said = await inspected(source, tmp_path, "import transformers\n" + FUNCTION)
            assert isinstance(direct, Description)
            assert set(direct.frameworks) >= {"tokenizers", "transformers"}
            assert said == ""
            other, _ = await inspected(source, tmp_path, FUNCTION)
            assert isinstance(other, Description)
            assert not set(other.frameworks) & {"tokenizers", "transformers"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        run(story)


def test_nothing_of_it_is_left_in_the_zygote_or_running(tmp_path: Path) -> None:
    code = "import subprocess, sys\nimport hotset as anything\nanything.left = 1\nsys.modules['left'] = anything\n"
    code += "child = subprocess.Popen(['sleep', '1000'])\nprint(child.pid)\n" + FUNCTION

    async def story() -> None:
        async with zygote() as source:
            _, said = await inspected(source, tmp_path, code)
            pid = int(said)
            assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
            check = "import sys\nprint('left' in sys.modules, hasattr(hotset, 'left'), 'looked_at' in sys.modules)\n"
            again, said = await inspected(source, tmp_path, check + FUNCTION)
            assert isinstance(again, Description)
            assert said == "False False True\n"
            zygote_process = psutil.Process(source.zygote_pid(sys.executable))
            deadline_s = time.monotonic() + 20.0
            while len(zygote_process.children()) != source.waiting(sys.executable):
                assert time.monotonic() < deadline_s
                await asyncio.sleep(0.01)

    run(story)


def test_what_breaks_the_contract_is_said(tmp_path: Path) -> None:
    async def story() -> None:
        async with zygote() as source:
            failed, _ = await inspected(source, tmp_path, "")
            assert isinstance(failed, Failure)
            assert "nothing in it is decorated" in failed.error

    run(story)


@pytest.mark.parametrize(
    ("code", "last"),
    [
        ("raise ValueError('no')\n", "ValueError: no\n"),
        ("import sys\nsys.exit('left')\n", "SystemExit: left\n"),
        ("import os\nos.write(1, b'end')\nos._exit(3)\n", "end"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", ""),
    ],
)
def test_an_import_that_ends_its_process_leaves_its_last_words(tmp_path: Path, code: str, last: str) -> None:
    async def story() -> None:
        async with zygote() as source:
            answer, said = await inspected(source, tmp_path, code + FUNCTION)
            assert answer is None
            assert said.endswith(last)
            assert isinstance((await inspected(source, tmp_path, FUNCTION))[0], Description), "the zygote lives"

    run(story)


def test_an_import_that_hangs_is_ended(tmp_path: Path) -> None:
    async def story() -> None:
        async with zygote() as source:
            with pytest.raises(TimeoutError):
                await inspected(source, tmp_path, "import time\ntime.sleep(1000)\n", timeout_s=0.2)

    run(story)


def test_what_is_no_answer_is_none(tmp_path: Path) -> None:
    """A function's code has the process's socket, and may write to it what it likes."""
    forge = (
        "import os\nfor fd in range(3, 30):\n    try:\n        os.write(fd, {!r})\n    except OSError:\n        pass\n"
    )

    async def story() -> None:
        source = Spawner()
        for forged in (b"x" * 40, b"\x05\x00\x00\x00\x0f" + bytes(11) + b"abcde", b"x" * (1 << 21)):
            answer, _ = await inspected(source, tmp_path, forge.format(forged) + "os._exit(0)\n")
            assert answer is None
        source.close()

    run(story)
