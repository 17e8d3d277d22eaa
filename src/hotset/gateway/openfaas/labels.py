"""The labels OpenFaaS users steer a function with, read once at deployment: what cannot be honoured is refused there.

``com.openfaas.scale.*`` say how many copies a function may have, ``com.openfaas.retry.*`` what becomes of asynchronous
calls that could not be answered; both may stand in labels or annotations, labels first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from enum import Enum

import msgspec

from hotset.errors import ConfigurationError

SCALE = "com.openfaas.scale."
RETRY = "com.openfaas.retry."
DEFAULT_MAX = 5
MOST_COPIES = 1_000
RETRIED = (429, 502, 503, 504)
"""Statuses after which an asynchronous call is tried again."""

_GO_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?(?:ns|us|µs|ms|s|m|h))+")
_GO_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class ScaleType(Enum):
    """What is measured to tell how many copies are wanted."""

    RPS = "rps"
    """Calls that ended well, per second."""
    CAPACITY = "capacity"
    """Calls in flight: the measure that fits inference."""


class Scaling(msgspec.Struct, frozen=True, kw_only=True):
    """The scaling labels of one function."""

    minimum: int = 1
    maximum: int = DEFAULT_MAX
    factor_percent: int = 10
    """Step of one alert, of ``maximum``."""
    zero: bool = False
    """Whether it leaves GPU memory when it has been idle for ``zero_after_s``."""
    zero_after_s: float = 900.0
    kind: ScaleType | None = None
    """None: OpenFaaS's own rule: more than five good calls a second ask for one step more."""
    target: float = 50.0
    """Load per replica."""
    target_proportion: float = 0.90
    down_window_s: float = 0.0
    """Never below the highest recommendation of this time."""

    @property
    def step(self) -> int:
        return max(1, math.ceil(self.maximum * self.factor_percent / 100))

    @property
    def fixed(self) -> bool:
        return self.minimum == self.maximum


class Retrying(msgspec.Struct, frozen=True, kw_only=True):
    """How asynchronous calls of one function are tried again."""

    attempts: int = 10
    codes: tuple[int, ...] = RETRIED
    min_wait_s: float = 1.0
    max_wait_s: float = 120.0

    def wait_s(self, attempts: int) -> float:
        """Pause after so many attempts: doubled each time."""
        return min(self.max_wait_s, self.min_wait_s * 2.0 ** min(attempts - 1, 30))


def read_scaling(labels: Mapping[str, str], annotations: Mapping[str, str]) -> Scaling:
    """Raises ``ConfigurationError`` that names the label and what it takes."""
    given = _Given(SCALE, labels, annotations)
    minimum = given.whole("min", 0, MOST_COPIES)
    maximum = given.whole("max", 1, MOST_COPIES)
    if minimum is not None and maximum is None and minimum > DEFAULT_MAX:
        maximum = minimum
    values = {
        "minimum": minimum,
        "maximum": maximum,
        "factor_percent": given.whole("factor", 1, 100),
        "zero": given.flag("zero"),
        "zero_after_s": given.duration("zero-duration"),
        "kind": given.choice("type"),
        "target": given.number("target", 0.0, math.inf),
        "target_proportion": given.number("target-proportion", 0.0, 1.0),
        "down_window_s": given.duration("down.window", 300.0),
    }
    given.refuse_unknown("min, max, factor, zero, zero-duration, type, target, target-proportion and down.window")
    scaling = msgspec.convert({key: value for key, value in values.items() if value is not None}, Scaling)
    if scaling.minimum > scaling.maximum:
        raise ConfigurationError(
            f"{SCALE}min is {scaling.minimum} and {SCALE}max is {scaling.maximum}: min must not be above max"
        )
    return scaling


class Copies(msgspec.Struct, frozen=True, kw_only=True):
    """What the scaling labels say of copies in GPU memory; the defaults of replicas say nothing of these."""

    minimum: int = 0
    """Kept hot."""
    maximum: int | None = None
    """Most GPUs that hold one."""


def read_copies(labels: Mapping[str, str], annotations: Mapping[str, str]) -> Copies:
    """``scale.min`` and ``scale.max`` where they are said, and sound: deployment has refused what is not."""
    said = {name: labels.get(f"{SCALE}{name}", annotations.get(f"{SCALE}{name}", "")) for name in ("min", "max")}
    minimum, maximum = (int(each) if each.isdecimal() else None for each in said.values())
    return Copies(minimum=minimum or 0, maximum=maximum or None)


def read_retrying(labels: Mapping[str, str], annotations: Mapping[str, str]) -> Retrying:
    """Raises ``ConfigurationError`` that names the label and what it takes."""
    given = _Given(RETRY, labels, annotations)
    codes = given.text("codes")
    values: dict[str, object] = {
        "attempts": given.whole("attempts", 1, 1_000),
        "codes": None if codes is None else _codes(codes),
        "min_wait_s": given.duration("min_wait"),
        "max_wait_s": given.duration("max_wait"),
    }
    given.refuse_unknown("attempts, codes, min_wait and max_wait")
    return msgspec.structs.replace(Retrying(), **{key: value for key, value in values.items() if value is not None})


def _codes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[45][0-9][0-9]", part, re.ASCII) for part in parts):
        raise ConfigurationError(f"{RETRY}codes is {text[:40]!r}: write HTTP statuses such as 429,503")
    return tuple(int(part) for part in parts)


class _Given:
    """The labels under one prefix; each reader returns None for what is not there."""

    def __init__(self, prefix: str, labels: Mapping[str, str], annotations: Mapping[str, str]) -> None:
        self._prefix = prefix
        both = {**annotations, **labels}
        self._left = {key.removeprefix(prefix): value for key, value in both.items() if key.startswith(prefix)}

    def text(self, name: str) -> str | None:
        return self._left.pop(name, None)

    def whole(self, name: str, least: int, most: int) -> int | None:
        text = self.text(name)
        if text is None:
            return None
        if not re.fullmatch(r"[0-9]{1,6}", text, re.ASCII) or not least <= int(text) <= most:
            raise self._bad(name, text, f"a whole number from {least} to {most}")
        return int(text)

    def number(self, name: str, above: float, most: float) -> float | None:
        text = self.text(name)
        if text is None:
            return None
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text, re.ASCII) or not above < float(text) <= most:
            raise self._bad(name, text, "a number above 0" + ("" if math.isinf(most) else f" and up to {most:g}"))
        return float(text)

    def flag(self, name: str) -> bool | None:
        text = self.text(name)
        if text is None:
            return None
        if text not in ("true", "false"):
            raise self._bad(name, text, "true or false")
        return text == "true"

    def duration(self, name: str, most_s: float = math.inf) -> float | None:
        text = self.text(name)
        if text is None:
            return None
        seconds = go_duration_s(text)
        if seconds is None or not 0 < seconds <= most_s:
            limit = "" if math.isinf(most_s) else f" of at most {most_s:g} s"
            raise self._bad(name, text, f"a duration such as 30s or 15m{limit}")
        return seconds

    def choice(self, name: str) -> ScaleType | None:
        text = self.text(name)
        if text is None:
            return None
        known = {each.value: each for each in ScaleType}
        if text not in known:
            raise self._bad(name, text, f"one of {', '.join(known)} (nothing else is measured here)")
        return known[text]

    def refuse_unknown(self, known: str) -> None:
        for name in self._left:
            raise ConfigurationError(f"there is no label {self._prefix}{name[:60]}: those of its kind are {known}")

    def _bad(self, name: str, text: str, wanted: str) -> ConfigurationError:
        return ConfigurationError(f"{self._prefix}{name} is {text[:40]!r}: it must be {wanted}")


def go_duration_s(text: str) -> float | None:
    """``"1h30m"`` -> 5400.0; None: it is no duration as Go writes them."""
    if len(text) > 40 or not _GO_DURATION.fullmatch(text):
        return None
    return sum(float(number) * _SECONDS[unit] for number, unit in _GO_PART.findall(text))
