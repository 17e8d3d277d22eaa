"""Sizes and durations as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotset.errors import ConfigurationError
from hotset.functions.units import format_bytes, parse_bytes, parse_duration


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("600MiB", 600 * 2**20),
        ("600 mib", 600 * 2**20),
        ("2GB", 2 * 10**9),
        ("1.5Gi", 3 * 2**29),
        ("250kB", 250_000),
        ("17", 17),
        ("0B", 0),
        (4096, 4096),
    ],
)
def test_sizes(text: str | int, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("250ms", 0.25), ("5min", 300), ("2m", 120), ("1h", 3600), ("45", 45), (1.5, 1.5), (7, 7)],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "MiB", "600 Mio", "-3MiB", "1,5GB", "6e2", "NaN", -1, True, None, 1.5])
def test_what_is_no_size_is_refused_by_name(text: object) -> None:
    with pytest.raises(ConfigurationError, match="gpu_memory"):
        parse_bytes(text, "gpu_memory")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "s", "3 days", "-3s", float("inf"), float("nan"), -1, True, None])
def test_what_is_no_duration_is_refused_by_name(text: object) -> None:
    with pytest.raises(ConfigurationError, match="timeout"):
        parse_duration(text, "timeout")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (600 * 2**20, "600 MiB"),
        (3 * 2**29, "1.5 GiB"),
        (2**30 - 1, "1 GiB"),
        (5 * 2**40, "5 TiB"),
        (2**62, "4194304 TiB"),
    ],
)
def test_bytes_for_people(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


@given(st.integers(0, 2**60))
def test_a_printed_size_reads_back_nearly_the_same(size_bytes: int) -> None:
    assert parse_bytes(format_bytes(size_bytes)) == pytest.approx(size_bytes, rel=0.05, abs=1)
