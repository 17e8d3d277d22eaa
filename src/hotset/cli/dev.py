"""``hotset dev``: one function in the foreground, reloaded when its files change, with real tracebacks."""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import click
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from hotset.errors import FunctionError
from hotset.functions.loading import load_entry
from hotset.functions.runtime import Outcome, Runtime

LOOK_EVERY_S = 0.5
MAX_WATCHED_FILES = 10_000


class DevelopedFunction:
    """The function as its files are now. A version that does not load is not served: its traceback is the answer."""

    def __init__(self, file: Path, device: str, say: Callable[[str], None], entry: str | None = None) -> None:
        self.file = file
        self._entry = entry or file.stem
        self._device = device
        self._say = say
        self._runtime: Runtime | None = None
        self._problem = ""
        self._seen: dict[Path, float] = {}
        self._turn = asyncio.Lock()

    @property
    def name(self) -> str:
        """Its name in URLs, as far as it is known."""
        return self._runtime.signature.name if self._runtime is not None else self.file.stem

    def changed(self) -> bool:
        """Whether a file beside the function's was written, added or removed since the last look."""
        now = dict(self._times())
        changed, self._seen = now != self._seen, now
        return changed

    def reload(self) -> None:
        """Import and load again."""
        try:
            if self._runtime is not None:
                self._runtime.unload()
            self._runtime = None
            runtime = Runtime(load_entry(self.file.parent, self._entry, reload=True), self._device)
            runtime.load()
        except Exception as error:  # noqa: BLE001 - the user's own code: its traceback is what this command is for
            told = isinstance(error, FunctionError)
            self._problem = str(error) if told else "".join(traceback.format_exception(error))
            self._say(self._problem)
            return
        self._runtime, self._problem = runtime, ""
        self._say(f"{runtime.signature.name} is loaded on {self._device}.")

    async def watch(self) -> None:
        """Reload whenever something changed, for ever."""
        while True:
            async with self._turn:
                if await asyncio.to_thread(self.changed):
                    await asyncio.to_thread(self.reload)
            await asyncio.sleep(LOOK_EVERY_S)

    async def call(self, body: bytes, content_type: str, accept: str) -> Outcome | str:
        """An answer, or what is wrong with the function's code."""
        async with self._turn:
            if await asyncio.to_thread(self.changed):
                await asyncio.to_thread(self.reload)
            if self._runtime is None:
                return self._problem
            outcome = await asyncio.to_thread(self._runtime.call, body, content_type, accept)
        if outcome.status == 500 and outcome.error is not None:
            return "".join(traceback.format_exception(outcome.error))
        return outcome

    def _times(self) -> Iterator[tuple[Path, float]]:
        for number, path in enumerate(sorted(self.file.parent.rglob("*.py"))):
            if number == MAX_WATCHED_FILES:
                return
            with contextlib.suppress(OSError):
                yield path, path.stat().st_mtime


def application(function: DevelopedFunction) -> Starlette:
    """The function at ``/`` and ``/function/NAME``, as the server would answer it."""

    async def answer(request: Request) -> Response:
        headers = request.headers
        outcome = await function.call(
            await request.body(), headers.get("content-type", "application/json"), headers.get("accept", "*/*")
        )
        if isinstance(outcome, str):
            return Response(outcome, status_code=500, media_type="text/plain")
        if outcome.stream is not None:
            return StreamingResponse(iterate_in_threadpool(outcome.stream), media_type=outcome.content_type)
        return Response(outcome.body, status_code=outcome.status, media_type=outcome.content_type)

    @contextlib.asynccontextmanager
    async def watching(_: Starlette) -> AsyncIterator[None]:
        watcher = asyncio.create_task(function.watch())
        yield
        watcher.cancel()

    return Starlette(
        routes=[Route("/", answer, methods=["POST"]), Route("/function/{name}", answer, methods=["POST"])],
        lifespan=watching,
    )


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--port", default=8081, show_default=True, type=click.IntRange(0, 65535))
@click.option("--device", default="cpu", show_default=True, help="What load gets, such as cpu or cuda:0.")
@click.option("--entry", metavar="MODULE[:NAME]", help="Which function, when FILE has several.")
def dev(file: Path, port: int, device: str, entry: str | None) -> None:
    """Run the function in FILE here, in the foreground: no deployment, no scheduler.

    It is loaded again whenever a Python file beside it changes. What it raises is shown here and sent as the answer,
    with its whole traceback. Ctrl-C ends it.
    """
    function = DevelopedFunction(file.resolve(), device, lambda text: click.echo(text, err=True), entry)
    click.echo(f"Call it: curl http://127.0.0.1:{port}/ -d JSON", err=True)
    uvicorn.run(application(function), host="127.0.0.1", port=port, log_level="warning")
