"""What a GPU process holds: one function, from load to unload, answering calls.

A function's own exception is an answer (status 500); so is a body that does not fit (400). Nothing but the exit of the
process (``SystemExit``, ``KeyboardInterrupt``) leaves ``call``; only ``load`` and ``unload`` raise.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import msgspec

from hotset.errors import FunctionError, InputError
from hotset.functions.encoding import PlainWriter, StreamFormat, Writer, to_json
from hotset.functions.inspection import signature_of
from hotset.functions.media import JSON, V2, Body

_SHOWN_CHARACTERS = 2000
"""How much of an exception's text an answer repeats."""


class Call(msgspec.Struct, frozen=True, gc=False):
    """One request, as ``call_batch`` takes it."""

    body: Body
    content_type: str = JSON
    accept: str = "*/*"


class Stream:
    """The chunks of a streamed answer, encoded, one for each item that ``predict`` yields.

    ``close`` ends the function's generator at once (the client left). ``error``: what ``predict`` raised midway, after
    the error event was given as the last chunk.
    """

    def __init__(self, first: bytes | None, rest: Iterator[Any], form: StreamFormat, name: str) -> None:
        self.error: Exception | None = None
        self._first: bytes | None = first
        self._rest = rest
        self._form = form
        self._name = name
        self._over = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._first is not None:
            chunk, self._first = self._first, None
            return chunk
        if self._over:
            raise StopIteration
        try:
            return self._form.item(next(self._rest))
        except StopIteration:
            self._over = True
            raise
        except Exception as error:  # noqa: BLE001 - the function's own; it becomes the stream's last event
            _log(error, self._name)
            self.close()
            self.error = error
            return self._form.error(_error_body(error))

    def close(self) -> None:
        self._over, self._first = True, None
        close = getattr(self._rest, "close", None)
        if close is not None:
            try:
                close()
            except Exception as error:  # noqa: BLE001 - nobody is left to tell but the log
                _log(error, self._name)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one call."""

    status: int = 200
    """200; 400: the body does not fit (JSON, names the field); 500: the function raised (JSON)."""
    content_type: str = JSON
    body: bytes | memoryview = b""
    rest: Sequence[bytes | memoryview] = ()
    """What follows ``body``, not joined to it yet."""
    stream: Stream | None = None
    """The chunks of a streamed answer, in place of ``body``; read it to its end or ``close`` it."""
    error: Exception | None = None
    """What was raised, so that a worker can tell a device failure from a plain mistake."""

    @property
    def whole(self) -> bytes:
        """``body`` and ``rest`` in one piece."""
        return b"".join((self.body, *self.rest))


class Runtime:
    """One function in one process. Calls come one at a time, after ``load``.

    ``target``: the decorated class or function (``loading.load_entry``). ``device``: ``"cpu"``, ``"cuda:0"``, ...
    Raises ``FunctionError`` when the target breaks the contract.
    """

    def __init__(self, target: Callable[..., Any], device: str = "cpu") -> None:
        self.signature = signature_of(target)
        self.device = device
        self.instance: Any = None
        """The object whose ``load`` was called; None before ``load`` and for a plain function."""
        self._target = target
        self._predict: Callable[..., Any] | None = None

    def load(self) -> None:
        """Make the object and call its ``load(device)``; what they raise passes through."""
        if not inspect.isclass(self._target):
            self._predict = self._target
            return
        try:
            self.instance = self._target()
        except TypeError:
            # Not asked before: in a fresh fork inspect's answer takes longer than building a model of 100 MB.
            if _takes_no_arguments(self._target):
                raise
            raise FunctionError(
                f"{self._target.__name__} needs arguments to be made; take none in __init__ and load weights in load"
            ) from None
        load = getattr(self.instance, "load", None)
        if load is not None:
            load(self.device)
        self._predict = self.instance.predict

    def unload(self) -> None:
        """Call ``unload`` where there is one and let go of the object."""
        instance, self.instance, self._predict = self.instance, None, None
        unload = getattr(instance, "unload", None)
        if unload is not None:
            unload()

    @property
    def predict(self) -> Callable[..., Any]:
        """The function's own ``predict``, bound; raises ``FunctionError`` before ``load``."""
        if self._predict is None:
            raise FunctionError(f"{self.signature.name} is not loaded; call load() first")
        return self._predict

    def call(self, body: Body, content_type: str = JSON, accept: str = "*/*") -> Outcome:
        """Answer one request. ``body``: bytes or a memoryview of bytes, free to be used again when this returns."""
        signature = self.signature
        try:
            arguments, writer = self._decode(body, content_type, accept)
            if arguments is None:
                result = None
            elif signature.streaming:
                return self._stream(arguments, writer.stream)
            elif signature.batched:
                result = signature.call_batch(self.predict, [arguments])[0]
            else:
                result = signature.call(self.predict, arguments)
            return _success(writer.encode(result))
        except Exception as error:  # noqa: BLE001 - a function may raise anything; it is that request's answer
            return self._failure(error)

    def call_batch(self, calls: Sequence[Call]) -> list[Outcome]:
        """Answer several requests, in order: in one ``predict`` where the function batches, else one by one.

        A body that does not fit fails alone. When the joined ``predict`` raises, each request runs again by itself, so
        that only those to blame fail.
        """
        if not self.signature.batched or len(calls) == 1:
            return [self.call(call.body, call.content_type, call.accept) for call in calls]
        outcomes: list[Outcome | None] = [None] * len(calls)
        items: list[tuple[Any, ...]] = []
        writers: list[Writer] = []
        places: list[int] = []
        for place, call in enumerate(calls):
            try:
                arguments, writer = self._decode(call.body, call.content_type, call.accept)
                if arguments is None:
                    outcomes[place] = _success(writer.encode(None))
                    continue
                items.append(arguments)
                writers.append(writer)
                places.append(place)
            except Exception as error:  # noqa: BLE001 - InputError, or a bug that must not cost the others their answer
                outcomes[place] = self._failure(error)
        for place, outcome in zip(places, self._joined(items, writers), strict=True):
            outcomes[place] = outcome
        return [outcome for outcome in outcomes if outcome is not None]

    def _decode(self, body: Body, content_type: str, accept: str) -> tuple[tuple[Any, ...] | None, Writer]:
        """The arguments of one call (None: it wants the model loaded, no more) and what writes its answer."""
        if not content_type.startswith(V2):
            return self.signature.decode(body, content_type), PlainWriter(accept)
        # Imported on the first such call: most functions never see one.
        from hotset.functions import v2

        if content_type == v2.WARM:
            return None, v2.WarmWriter()
        return v2.decode(self.signature, body, content_type, accept)

    def _joined(self, items: list[tuple[Any, ...]], writers: list[Writer]) -> list[Outcome]:
        if not items:
            return []
        try:
            results = self.signature.call_batch(self.predict, items)
        except Exception as error:  # noqa: BLE001 - as in call
            if len(items) == 1:
                return [self._failure(error)]
            return [self._joined([item], [writer])[0] for item, writer in zip(items, writers, strict=True)]
        return [self._encoded(result, writer) for result, writer in zip(results, writers, strict=True)]

    def _encoded(self, result: Any, writer: Writer) -> Outcome:
        try:
            return _success(writer.encode(result))
        except Exception as error:  # noqa: BLE001 - as in call
            return self._failure(error)

    def _stream(self, arguments: tuple[Any, ...], form: StreamFormat) -> Outcome:
        """The first item is computed before the status is decided: a function that fails at once answers 500."""
        items = iter(self.signature.call(self.predict, arguments))
        first = next(map(form.item, items), None)
        return Outcome(content_type=form.content_type, stream=Stream(first, items, form, self.signature.name))

    def _failure(self, error: Exception) -> Outcome:
        if isinstance(error, InputError):
            body = to_json({"error": str(error), "field": error.field})
            return Outcome(status=400, body=body, error=error)
        _log(error, self.signature.name)
        return Outcome(status=500, body=to_json(_error_body(error)), error=error)


def _success(encoded: Any) -> Outcome:
    return Outcome(content_type=encoded.content_type, body=encoded.body, rest=encoded.rest)


def _error_body(error: Exception) -> dict[str, Any]:
    """What a client learns of an exception: never the traceback, which names the server's files."""
    kind = type(error).__name__
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - an exception that cannot even say what it is
        text = ""
    return {"error": text.encode("utf-8", "replace").decode()[:_SHOWN_CHARACTERS] or kind, "type": kind}


def _takes_no_arguments(target: Callable[..., Any]) -> bool:
    try:
        inspect.signature(target).bind()
    except TypeError:
        return False
    return True


def _log(error: Exception, name: str) -> None:
    """The traceback to the function's log (stderr), from the first frame of the function's own code."""
    own = error.__traceback__
    while own is not None and own.tb_next is not None and _is_ours(own):
        own = own.tb_next
    lines = traceback.format_exception(type(error), error, own)
    # A log that is gone must not cost the caller the answer.
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{name}: predict failed\n{''.join(lines)}")
        sys.stderr.flush()


def _is_ours(frame: TracebackType) -> bool:
    return str(frame.tb_frame.f_globals.get("__name__", "")).startswith("hotset.functions.")
