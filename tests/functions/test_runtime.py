"""One function in one process: load, calls, batches, streams, unload."""

import io
import json
from collections.abc import Generator, Iterator

import pytest

import hotset
from hotset.functions.inspection import signature_of
from hotset.functions.runtime import Call, Outcome, Runtime


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("cannot even say it")


@hotset.function
class Echo:
    """Remembers what happened to it."""

    def __init__(self) -> None:
        self.history: list[str] = []

    def load(self, device: str) -> None:
        self.history.append(f"load {device}")

    def predict(self, text: str) -> str:
        if text == "refuse":
            raise hotset.InputError("text", "not this one")
        if text == "fail":
            raise ValueError("the model says no")
        if text == "quiet":
            raise KeyError
        if text == "mute":
            raise Mute
        if text == "exit":
            raise SystemExit(3)
        return text * 2

    def unload(self) -> None:
        self.history.append("unload")


@hotset.function(max_batch=4)
class Lengths:
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def predict(self, texts: list[str]) -> list[int]:
        self.sizes.append(len(texts))
        if "short" in texts:
            return [0]
        if "none" in texts:
            return None  # type: ignore[return-value]
        if "bad" in texts:
            raise ValueError("one of them is bad")
        return [object() if text == "odd" else len(text) for text in texts]  # type: ignore[misc]


CLOSED: list[str] = []


@hotset.function
def count(to: int, fail_at: int = -1) -> Iterator[int]:
    try:
        for number in range(to):
            if number == fail_at:
                raise ValueError("lost count")
            yield number
    finally:
        CLOSED.append("count")


class Stubborn:
    """Items of its own making, whose end fails."""

    def __init__(self) -> None:
        self.left = 3

    def __iter__(self) -> "Stubborn":
        return self

    def __next__(self) -> int:
        self.left -= 1
        if self.left < 0:
            raise StopIteration
        return self.left

    def close(self) -> None:
        raise RuntimeError("will not close")


@hotset.function
def stubborn(text: str) -> Iterator[int]:
    return Stubborn()


@hotset.function
def listed(to: int) -> Generator[list[int], None, None]:
    return iter([[1], [2]])  # type: ignore[return-value]


@hotset.function
class NeedsMore:
    def __init__(self, path: str) -> None:
        self.path = path

    def predict(self, text: str) -> str:
        return self.path


def loaded(target: type | object) -> Runtime:
    runtime = Runtime(target, "cpu")  # type: ignore[arg-type]
    runtime.load()
    return runtime


def answer(outcome: Outcome) -> object:
    return json.loads(outcome.body)


def test_load_call_unload() -> None:
    runtime = Runtime(Echo, "cuda:1")
    with pytest.raises(hotset.FunctionError, match="echo is not loaded; call load"):
        runtime.predict("x")
    runtime.load()
    instance = runtime.instance
    assert runtime.call(b'"ab"') == Outcome(body=b'"abab"')
    runtime.unload()
    assert instance.history == ["load cuda:1", "unload"]
    assert runtime.instance is None
    assert runtime.call(b'"ab"').status == 500


def test_a_class_that_needs_arguments_cannot_be_loaded() -> None:
    with pytest.raises(hotset.FunctionError, match="NeedsMore needs arguments to be made; take none in __init__"):
        Runtime(NeedsMore).load()


def test_a_body_that_does_not_fit_is_400_and_names_the_field() -> None:
    outcome = loaded(Echo).call(b'{"text": 3}')
    assert outcome.status == 400
    assert answer(outcome) == {"error": "text: expected `str`, got `int`", "field": "text"}


def test_a_function_may_refuse_input_itself() -> None:
    outcome = loaded(Echo).call(b'"refuse"')
    assert (outcome.status, answer(outcome)) == (400, {"error": "text: not this one", "field": "text"})


def test_a_functions_exception_is_500_and_its_traceback_stays_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    outcome = loaded(Echo).call(b'"fail"')
    assert (outcome.status, answer(outcome)) == (500, {"error": "the model says no", "type": "ValueError"})
    assert isinstance(outcome.error, ValueError)
    log = capfd.readouterr().err
    assert log.startswith("echo: predict failed\nTraceback")
    assert 'raise ValueError("the model says no")' in log
    assert "hotset/functions/" not in log


def test_an_exception_without_words_still_says_what_it_is() -> None:
    assert answer(loaded(Echo).call(b'"quiet"')) == {"error": "KeyError", "type": "KeyError"}


def test_an_exception_that_cannot_be_told_or_logged_is_still_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    assert answer(loaded(Echo).call(b'"mute"')) == {"error": "Mute", "type": "Mute"}


def test_a_function_that_exits_ends_its_process() -> None:
    with pytest.raises(SystemExit):
        loaded(Echo).call(b'"exit"')


def test_waiting_requests_are_joined_into_one_run() -> None:
    runtime = loaded(Lengths)
    outcomes = runtime.call_batch([Call(b'"a"'), Call(b'{"texts": "bcd"}'), Call(b"ef", "text/plain")])
    assert [answer(outcome) for outcome in outcomes] == [1, 3, 2]
    assert runtime.instance.sizes == [3]


def test_a_bad_body_fails_alone_and_never_reaches_predict() -> None:
    runtime = loaded(Lengths)
    outcomes = runtime.call_batch([Call(b'"a"'), Call(b"3"), Call(b"{")])
    assert [outcome.status for outcome in outcomes] == [200, 400, 400]
    assert runtime.instance.sizes == [1]
    assert [outcome.status for outcome in runtime.call_batch([Call(b"3"), Call(b"{")])] == [400, 400]


def test_one_item_that_makes_predict_raise_fails_alone() -> None:
    runtime = loaded(Lengths)
    outcomes = runtime.call_batch([Call(b'"a"'), Call(b'"bad"'), Call(b'"odd"'), Call(b'"c"')])
    assert [outcome.status for outcome in outcomes] == [200, 500, 500, 200]
    assert answer(outcomes[1]) == {"error": "one of them is bad", "type": "ValueError"}
    assert runtime.instance.sizes == [4, 1, 1, 1, 1]


def test_a_result_of_the_wrong_length_is_told() -> None:
    runtime = loaded(Lengths)
    outcome = runtime.call_batch([Call(b'"a"'), Call(b'"short"')])[0]
    assert outcome == Outcome(body=b"1")
    with pytest.raises(hotset.FunctionError, match="got 2 items and returned 1 results; return one result per item"):
        runtime.signature.call_batch(runtime.predict, [("a",), ("short",)])
    with pytest.raises(hotset.FunctionError, match="got 1 items and returned a NoneType"):
        runtime.signature.call_batch(runtime.predict, [("none",)])


def test_requests_of_a_function_that_does_not_batch_run_one_by_one() -> None:
    outcomes = loaded(Echo).call_batch([Call(b'"a"'), Call(b'"fail"'), Call(b'"b"')])
    assert [outcome.status for outcome in outcomes] == [200, 500, 200]


def test_a_single_request_of_a_batched_function_is_a_batch_of_one() -> None:
    runtime = loaded(Lengths)
    assert runtime.call(b'"abc"').body == b"3"
    assert runtime.call_batch([Call(b'"abc"')])[0].body == b"3"
    assert runtime.instance.sizes == [1, 1]


def test_a_stream_gives_its_items_as_they_come() -> None:
    CLOSED.clear()
    outcome = loaded(count).call(b'{"to": 3}')
    assert (outcome.status, outcome.content_type) == (200, "application/x-ndjson")
    assert outcome.stream is not None
    assert next(outcome.stream) == b"0\n"
    assert CLOSED == []
    assert list(outcome.stream) == [b"1\n", b"2\n"]
    assert list(outcome.stream) == []
    assert CLOSED == ["count"]


def test_a_stream_of_events() -> None:
    outcome = loaded(count).call(b'{"to": 1}', accept="text/event-stream")
    assert outcome.content_type == "text/event-stream"
    assert outcome.stream is not None
    assert list(outcome.stream) == [b"data: 0\n\n"]


def test_an_exception_midway_is_the_last_event() -> None:
    outcome = loaded(count).call(b'{"to": 3, "fail_at": 1}', accept="text/event-stream")
    assert outcome.stream is not None
    assert list(outcome.stream) == [
        b"data: 0\n\n",
        b'event: error\ndata: {"error":"lost count","type":"ValueError"}\n\n',
    ]
    assert isinstance(outcome.stream.error, ValueError)


def test_an_exception_before_the_first_item_is_a_plain_500() -> None:
    outcome = loaded(count).call(b'{"to": 3, "fail_at": 0}')
    assert (outcome.status, outcome.stream) == (500, None)
    assert loaded(count).call(b'{"to": "3"}').status == 400


def test_a_stream_without_items_is_empty() -> None:
    outcome = loaded(count).call(b'{"to": 0}')
    assert outcome.status == 200
    assert outcome.stream is not None
    assert list(outcome.stream) == []


def test_closing_a_stream_ends_the_function_at_its_yield() -> None:
    CLOSED.clear()
    outcome = loaded(count).call(b'{"to": 3}')
    assert outcome.stream is not None
    assert next(outcome.stream) == b"0\n"
    outcome.stream.close()
    assert CLOSED == ["count"]
    assert list(outcome.stream) == []


def test_a_function_that_fails_to_close_is_logged_and_let_go(capfd: pytest.CaptureFixture[str]) -> None:
    outcome = loaded(stubborn).call(b'"x"')
    assert outcome.stream is not None
    assert next(outcome.stream) == b"2\n"
    outcome.stream.close()
    assert "will not close" in capfd.readouterr().err


def test_any_iterator_streams_and_its_items_are_in_the_schema() -> None:
    outcome = loaded(listed).call(b"3")
    assert outcome.stream is not None
    assert list(outcome.stream) == [b"[1]\n", b"[2]\n"]
    outcome.stream.close()
    schema = signature_of(listed).schema()
    assert schema["streaming"] is True
    assert schema["output"] == {"type": "array", "items": {"type": "integer"}}
    assert schema["produces"] == ["application/x-ndjson", "text/event-stream"]
