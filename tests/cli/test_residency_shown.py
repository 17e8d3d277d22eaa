"""How commands tell where a model is and what moving it costs."""

from __future__ import annotations

from typing import Any

from hotset.cli.residency import brief_transitions, residency_rows, tier

GPU = "local/cuda:0"
MIB = 1 << 20


def function(**changes: Any) -> dict[str, Any]:
    """A function as ``/system/state`` has it, nothing known of it."""
    return {"kind": "gpu", "hot": [], "warm": [], "transitions": {}, "last_load": None} | changes


def times(last_s: float, median_s: float, count: int) -> dict[str, float]:
    return {"last_s": last_s, "median_s": median_s, "count": count}


PARTS = {"room_s": 0.01, "process_s": 0.002, "import_s": 0.003, "load_s": 0.02, "first_run_s": None, "ahead": False}


def test_a_function_is_told_by_its_best_tier() -> None:
    assert tier(function(hot=[GPU], warm=["b"])) == "hot"
    assert tier(function(warm=[GPU])) == "warm"
    assert tier(function()) == "cold"
    assert tier(function(kind="cpu")) == "-"


def test_what_never_moved_is_cold_and_a_cpu_function_has_no_tier() -> None:
    assert residency_rows(function(), []) == [("tier", "cold"), ("hot on", "no GPU now"), ("warm on", "no GPU now")]
    assert residency_rows(function(kind="cpu"), []) == []
    assert residency_rows(None, []) == []


def test_transitions_are_told_in_their_order_with_last_and_median() -> None:
    moved = function(hot=[GPU], transitions={"offload": times(0.002, 0.003, 4), "load": times(0.5, 0.4, 1)})
    assert residency_rows(moved, [])[3:] == [
        ("load", "last 500.0 ms, median 400.0 ms (once)"),
        ("offload", "last 2.0 ms, median 3.0 ms (4 times)"),
    ]
    assert brief_transitions(moved) == ["500.0 (400.0)", "-", "2.0 (3.0)", "-"]


def test_the_last_loads_time_is_told_part_by_part() -> None:
    (*_, row) = residency_rows(function(last_load=PARTS), [])
    assert row == ("last load", "35.0 ms: room 10.0 ms, process 2.0 ms, import 3.0 ms, load 20.0 ms")
    # What was imported while another model left did not cost the load anything.
    (*_, row) = residency_rows(function(last_load=PARTS | {"ahead": True, "first_run_s": 0.004}), [])
    assert row[1].startswith("32.0 ms: room 10.0 ms, ")
    assert "import 3.0 ms (while there was no room), load" in row[1]
    assert row[1].endswith("; first run 4.0 ms")


def test_processes_tell_what_they_take_of_the_gpu_and_of_the_host() -> None:
    process = {"pid": 7, "gpu_id": GPU, "device_bytes": 48 * MIB, "private_bytes": 8 * MIB, "shared_bytes": 2 * MIB}
    (row,) = residency_rows(None, [process])
    assert row == (
        "process 7",
        "48 MiB of local/cuda:0, 10 MiB of host memory: 8 MiB private, 2 MiB its share of what is shared",
    )
    ((_, told),) = residency_rows(None, [process | {"gpu_id": ""}])
    assert told.startswith("10 MiB of host memory")
