"""msgspec's errors as InputErrors: a field (its path from the parameter: ``boxes[3].label``) and a problem."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from hotset.errors import InputError
from hotset.functions.media import Body

SHOWN_CHARACTERS = 200
"""How much of what a caller sent an error repeats."""

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for a body that is not JSON, does not fit, is not UTF-8, or is nested too deep."""

_BRACE = ord("{")
_BLANK = ord(" ")

_PATH = re.compile(r" - at (?:`key` in )?`\$([^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)


def input_error(error: Exception, bare: str | None, fields: str, accepts: Sequence[str], body: Body) -> InputError:
    """What to tell the caller about ``error``, one of ``UNREADABLE``.

    ``bare``: the parameter whose value the body is; None: the body is the object that holds the parameters.
    ``fields``: the parameters, in words. ``accepts``: the content types the function reads.
    """
    if isinstance(error, RecursionError):
        return InputError("", "nested too deep")
    if isinstance(error, UnicodeDecodeError):
        return InputError("", "not valid JSON: a string is not UTF-8")
    if not isinstance(error, msgspec.ValidationError):
        return InputError("", _not_json(str(error), fields, accepts, body))
    problem, path = str(error), ""
    # A tensor's own error has a path inside the tensor, then msgspec adds the path to it: outermost last.
    while match := _PATH.search(problem):
        problem, path = problem[: match.start()], path + match[1]
    if bare is not None:
        path = f".{bare}{path}"
    elif not path and problem.startswith("Expected `object`"):
        return InputError("", f"send a JSON object with {fields}")
    if match := _UNKNOWN.fullmatch(problem):
        problem = "unknown field" if path else f"unknown field; this function takes {fields}"
        path = f"{path}.{match[1]}"
    elif match := _MISSING.fullmatch(problem):
        path, problem = f"{path}.{match[1]}", "required, but missing"
    return InputError(path.removeprefix(".")[:SHOWN_CHARACTERS], _sentence(problem)[:SHOWN_CHARACTERS])


def opens_object(body: Body) -> bool:
    """Whether a body's first character, blanks aside, is ``{``."""
    if body and body[0] > _BLANK:
        return bool(body[0] == _BRACE)
    return bytes(body).lstrip()[:1] == b"{"


def is_blank(body: Body) -> bool:
    return not bytes(body).strip()


def top_level_keys(body: Body) -> frozenset[str]:
    """The top-level keys of a body that is valid JSON; empty when it is no object."""
    try:
        return frozenset(msgspec.json.decode(body, type=dict[str, msgspec.Raw]))
    except UNREADABLE:
        return frozenset()


def _not_json(reason: str, fields: str, accepts: Sequence[str], body: Body) -> str:
    if is_blank(body):
        return f"the body is empty; send {' or '.join(accepts)} with {fields}"
    hint = f" (or send {' or '.join(accepts[1:])} with its Content-Type)" if accepts[1:] else ""
    return f"not valid JSON: {reason.removeprefix('JSON is malformed: ')[:SHOWN_CHARACTERS]}{hint}"


def _sentence(problem: str) -> str:
    return problem[:1].lower() + problem[1:]
