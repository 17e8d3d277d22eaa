"""hotset's own trace format: written, recorded from a live server, and read back as it was."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from hotset.errors import ConfigurationError, TraceError
from hotset.simulation.traces import open_trace
from hotset.simulation.traces.hotset_trace import TraceRecorder, TraceWriter
from hotset.simulation.traces.replay import Replay, replay
from hotset.simulation.workloads import Arrival, Popularity, Process, Synthetic

DATA = Path(__file__).parents[1] / "data" / "traces"
ALL_NAMES = pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.ndjson", "t.jsonl.gz"])


def read(path: Path) -> list[Arrival]:
    return list(replay(open_trace(path)).arrivals(seed=0))


@ALL_NAMES
def test_what_is_written_is_read_back_to_the_last_digit(name: str, tmp_path: Path) -> None:
    arrivals = [
        Arrival(1 / 3, "embed", 0.1 + 0.2, "ann"),
        Arrival(1 / 3, 'odd, "quoted"\nname', None, "bøb"),
        Arrival(1e6, "embed"),
    ]
    with TraceWriter(tmp_path / name) as writer:
        for arrival in arrivals:
            writer.write(arrival)

    assert read(tmp_path / name) == arrivals


def test_both_forms_say_the_same_and_unknown_columns_are_skipped() -> None:
    expected = [Arrival(0.5, "embed", 0.012, "ann"), Arrival(0.5, "ocr, big"), Arrival(2.25, "embed", 0.011, "bob")]

    assert read(DATA / "hotset.csv") == expected
    assert read(DATA / "hotset.ndjson") == expected


def test_a_workload_can_be_kept_as_a_trace(tmp_path: Path) -> None:
    workload = Synthetic(popularity=Popularity.zipf(5), process=Process.BURSTS, minutes=1)
    with TraceWriter(tmp_path / "kept.csv.gz") as writer:
        for arrival in workload.arrivals(seed=8):
            writer.write(arrival)

    assert read(tmp_path / "kept.csv.gz") == list(workload.arrivals(seed=8))


def test_a_long_trace_is_read_as_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text("# hotset-trace 1\narrival_s,function\n" + "".join(f"{second},f\n" for second in range(5000)))
    workload = replay(open_trace(path), Replay(minutes=60))
    path.write_text(path.read_text()[:-2000] + "broken")

    assert len(list(islice(workload.arrivals(seed=0), 3600))) == 3600, "rows after the window are not looked at"


def test_a_recorder_writes_requests_by_arrival_although_they_end_out_of_order(tmp_path: Path) -> None:
    path = tmp_path / "live.ndjson"
    writer = TraceWriter(path)
    recorder = TraceRecorder(writer)
    recorder.arrived(1, Arrival(0.0, "slow", caller="ann"))
    recorder.arrived(2, Arrival(0.1, "fast"))
    recorder.ended(2, 0.01)
    writer.flush()
    assert len(path.read_text().splitlines()) == 1, "the first request is still running"

    recorder.ended(1, 5.0)
    writer.flush()
    assert len(path.read_text().splitlines()) == 3

    recorder.arrived(3, Arrival(0.2, "rejected"))
    recorder.arrived(4, Arrival(0.3, "never ended"))
    recorder.arrived(5, Arrival(0.4, "ended behind it"))
    recorder.ended(3, None)
    recorder.ended(5, 0.5)
    recorder.ended(99, 1.0)
    recorder.close()

    assert read(path) == [
        Arrival(0.0, "slow", 5.0, "ann"),
        Arrival(0.1, "fast", 0.01),
        Arrival(0.2, "rejected"),
        Arrival(0.3, "never ended"),
        Arrival(0.4, "ended behind it", 0.5),
    ]


@pytest.mark.parametrize(
    "bad", [Arrival(0.5, "earlier than the last"), Arrival(float("nan"), "f"), Arrival(2.0, "")], ids=repr
)
def test_the_writer_refuses_what_could_not_be_read_back(bad: Arrival, tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t.csv") as writer:
        writer.write(Arrival(1.0, "f"))
        with pytest.raises(TraceError, match=r"expected a function's name and a time of 1\.0 s or later"):
            writer.write(bad)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot write the trace"):
        TraceWriter(tmp_path / "no" / "folder.csv")
