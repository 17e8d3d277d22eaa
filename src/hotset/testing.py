"""Unit-test a function without a server: the real codecs and the real runtime, in this process.

def test_embed():
    with hotset.testing.function(Embed) as embed:
        assert len(embed("hello")) == 384
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import orjson

from hotset.errors import InputError
from hotset.functions.encoding import to_json
from hotset.functions.media import JSON, Body, parse_media_type
from hotset.functions.runtime import Call, Outcome, Runtime


class FunctionUnderTest:
    """A loaded function. Call it as a client would: arguments become JSON, and the answer is read back.

    What ``predict`` raises is raised here; a value that does not fit the signature is an ``InputError``.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    @property
    def predict(self) -> Callable[..., Any]:
        """The function's own ``predict``, with no codec in between."""
        return self._runtime.predict

    @property
    def instance(self) -> Any:
        """The object whose ``load`` was called; None for a plain function."""
        return self._runtime.instance

    @property
    def schema(self) -> dict[str, Any]:
        """What a client can learn of the function (``Signature.schema``)."""
        return self._runtime.signature.schema()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One request. A streaming function gives the list of its items; a batched one takes one item of its lists."""
        return _read(self._runtime.call(self._body(args, kwargs)))

    def batch(self, items: list[Any]) -> list[Any]:
        """Several requests joined into one run: a value each, or a dict of parameters for a function of several."""
        several = len(self._runtime.signature.parameters) > 1
        bodies = [to_json(item) if several else self._body((item,), {}) for item in items]
        return [_read(outcome) for outcome in self._runtime.call_batch([Call(body) for body in bodies])]

    def post(self, body: Body, content_type: str = JSON, accept: str = "*/*") -> Outcome:
        """One raw request; nothing is raised, the status tells."""
        return self._runtime.call(body, content_type, accept)

    def _body(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        names = [parameter.name for parameter in self._runtime.signature.parameters if not parameter.keyword_only]
        if len(args) > len(names):
            raise InputError("", f"{len(args)} arguments given, {self._runtime.signature.name} takes {len(names)}")
        return to_json(dict(zip(names, args, strict=False)) | kwargs)


@contextmanager
def function(target: Callable[..., Any], device: str = "cpu") -> Iterator[FunctionUnderTest]:
    """Load a decorated class or function on ``device`` for the length of the ``with`` block, then unload it."""
    runtime = Runtime(target, device)
    runtime.load()
    try:
        yield FunctionUnderTest(runtime)
    finally:
        runtime.unload()


def _read(outcome: Outcome) -> Any:
    """What a client makes of an answer: JSON and text as Python values, pictures as PIL images, the rest as bytes."""
    if outcome.error is not None:
        raise outcome.error
    if outcome.stream is not None:
        items = [orjson.loads(chunk) for chunk in outcome.stream]
        if outcome.stream.error is not None:
            raise outcome.stream.error
        return items
    media = parse_media_type(outcome.content_type)
    if media.is_json:
        return orjson.loads(outcome.body)
    if media.name.startswith("image/"):
        from PIL import Image

        return Image.open(io.BytesIO(outcome.body))
    return outcome.whole
