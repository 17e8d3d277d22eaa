"""Sizes and durations as people write them."""

from __future__ import annotations

import math
import re

from hotset.errors import ConfigurationError

_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zµ]*)\s*", re.IGNORECASE | re.ASCII)

_BYTES: dict[str, int] = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    # Kubernetes' spelling of the binary units.
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SECONDS: dict[str, float] = {
    "": 1.0,
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "sec": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
}


def parse_bytes(value: str | int, what: str = "size") -> int:
    """``"600MiB"``, ``"2GB"``, ``"1.5Gi"`` or a number of bytes -> bytes.

    Powers of 1000 are kB, MB, GB, TB; powers of 1024 are KiB, MiB, GiB, TiB. Raises ``ConfigurationError`` that names
    ``what`` when the text is no size or the size is negative.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ConfigurationError(f"{what}: {value} is negative; write a size such as 600MiB")
        return value
    number, unit = _split(value)
    if unit not in _BYTES:
        raise ConfigurationError(f"{what}: {value!r} is no size; write one such as 600MiB or 2GB")
    return round(number * _BYTES[unit])


def parse_duration(value: str | float, what: str = "duration") -> float:
    """``"30s"``, ``"250ms"``, ``"5min"``, ``"1h"`` or a number of seconds -> seconds.

    Raises ``ConfigurationError`` that names ``what`` when the text is no duration, or it is negative or infinite.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value) or value < 0:
            raise ConfigurationError(f"{what}: {value} is no duration; write one such as 30s")
        return float(value)
    number, unit = _split(value)
    if unit not in _SECONDS:
        raise ConfigurationError(f"{what}: {value!r} is no duration; write one such as 30s, 250ms or 5min")
    return number * _SECONDS[unit]


def format_bytes(size_bytes: float) -> str:
    """Bytes as a person reads them, in binary units: ``614 MiB``, ``1.5 GiB``, ``0 B``."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1023.5:
            return _short(size, unit)
        size /= 1024
    return _short(size, "TiB")


def _short(size: float, unit: str) -> str:
    text = f"{size:.1f}".removesuffix(".0") if abs(size) < 99.95 else f"{size:.0f}"
    return f"{text} {unit}"


def _split(value: object) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return 0.0, "?"
    return float(match[1]), match[2].lower()
