"""Small hand-made traces of every format, read, chosen from, scaled and compressed."""

from __future__ import annotations

import errno
import gzip
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotset.errors import ConfigurationError, UnknownNameError
from hotset.simulation.traces import FORMATS, open_trace
from hotset.simulation.traces.azure2019 import Azure2019, Spread
from hotset.simulation.traces.azure2021 import Azure2021
from hotset.simulation.traces.gentd26 import UNNAMED_MODEL, GenTD26, Rows
from hotset.simulation.traces.replay import Replay, Timing, replay, with_shares_of
from hotset.simulation.traces.trace import Trace, Window
from hotset.simulation.working_set import FunctionUse, Scaling, WorkingSet, apportion
from hotset.simulation.workloads import Arrival, Popularity

DATA = Path(__file__).parents[1] / "data" / "traces"


def small(name: str) -> Trace:
    return open_trace(DATA / name)


def replayed(name: str, *, seed: int = 0, **how: Any) -> list[Arrival]:
    return list(replay(small(name), Replay(**how)).arrivals(seed))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("azure2019.csv", "azure2019"),
        ("azure2021.csv", "azure2021"),
        ("gentd26.csv", "gentd26"),
        ("azure_llm.csv", "azure_llm"),
        ("hotset.csv", "hotset"),
        ("hotset.ndjson", "hotset"),
    ],
)
def test_the_header_tells_the_format_and_gzip_is_told_by_content(name: str, expected: str, tmp_path: Path) -> None:
    packed = tmp_path / "no-telling-name"
    packed.write_bytes(gzip.compress((DATA / name).read_bytes()))

    plain, unpacked = open_trace(DATA / name), open_trace(packed)

    assert plain.format == unpacked.format == expected
    assert unpacked.functions(Window()) == plain.functions(Window())
    assert type(open_trace(DATA / name, expected)) is FORMATS[expected]


def test_a_format_nobody_knows_names_those_that_are_known() -> None:
    with pytest.raises(UnknownNameError, match="unknown trace format 'parquet'; known: hotset, azure2019"):
        open_trace(DATA / "hotset.csv", "parquet")


def test_a_missing_file_and_a_directory_are_refused_in_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.csv", tmp_path):
        with pytest.raises(ConfigurationError, match="give a regular file"):
            open_trace(path)


def test_a_disk_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(ConfigurationError, match=r"cannot read the trace .*azure2019\.csv: Input/output error"):
        open_trace(DATA / "azure2019.csv")


class TestAzure2019:
    def test_functions_come_with_their_use_in_the_window_and_in_the_whole_trace(self) -> None:
        uses = small("azure2019.csv").functions(Window(60, 120))

        assert uses[0] == FunctionUse(name="checkout", requests=2, total_requests=12, trigger="http")
        assert [use.requests for use in uses] == [2, 1, 20, 0, 0]

    def test_a_minutes_requests_are_spread_evenly_in_an_order_that_the_seed_decides(self) -> None:
        arrivals = replayed("azure2019.csv")
        first_minute = arrivals[:17]

        assert [arrival.time_s for arrival in first_minute] == [index * 60 / 17 for index in range(17)]
        assert Counter(arrival.function for arrival in first_minute) == {"checkout": 6, "search": 1, "sort": 10}
        assert arrivals[17].time_s == 60
        assert {(a.function, a.caller) for a in arrivals} >= {("checkout", "ann"), ("sort", "bob")}
        assert arrivals == replayed("azure2019.csv") != replayed("azure2019.csv", seed=1)

    def test_or_anywhere_in_their_minute(self) -> None:
        trace = Azure2019(DATA / "azure2019.csv", Spread.UNIFORM)
        arrivals = list(replay(trace).arrivals(seed=0))
        gaps = {round(later.time_s - earlier.time_s, 6) for earlier, later in pairwise(arrivals)}

        assert Counter(int(arrival.time_s // 60) for arrival in arrivals) == {0: 17, 1: 23, 2: 6}
        assert min(gaps) >= 0
        assert len(gaps) > 20

    def test_scaled_to_a_rate_each_minute_has_it_and_each_function_its_share(self) -> None:
        arrivals = replayed("azure2019.csv", minutes=3, rate_per_minute=10)

        assert [arrival.time_s for arrival in arrivals] == [index * 6 for index in range(30)]
        # 30 requests in proportion to 30, 12, 3 and 1: quotas 19.57, 7.83, 1.96 and 0.65.
        assert Counter(arrival.function for arrival in arrivals) == {"sort": 19, "checkout": 8, "search": 2, "clean": 1}
        assert arrivals[-1].function != "sort", "the last minute has no call of it"

    def test_a_scaled_trace_may_keep_its_own_busy_and_calm_minutes(self) -> None:
        arrivals = replayed("azure2019.csv", minutes=3, rate_per_minute=100, timing=Timing.OWN)
        per_minute = Counter(int(arrival.time_s // 60) for arrival in arrivals)

        assert sum(per_minute.values()) == 300
        assert per_minute[1] > per_minute[0] > per_minute[2]

    def test_rows_of_one_function_add_up(self, tmp_path: Path) -> None:
        path = tmp_path / "twice.csv"
        path.write_text("HashOwner,HashApp,HashFunction,Trigger,1\no,a,f,http,3\no,b,f,http,4\n")

        assert [use.requests for use in open_trace(path).functions(Window())] == [7]
        assert len(list(replay(open_trace(path)).arrivals(0))) == 7


class TestAzure2021:
    def test_an_invocation_arrives_its_duration_before_its_end_in_order_of_arrival(self) -> None:
        arrivals = replayed("azure2021.csv")

        # Ends 10.5, 12, 30, 31, 95.5, 100 less durations 0.5, 0.25, 29, 2, 60, 1, from the first arrival (1.0) on.
        assert [(arrival.time_s, arrival.function) for arrival in arrivals] == [
            (0.0, "sort"),
            (9.0, "search"),
            (10.75, "search"),
            (28.0, "checkout"),
            (34.5, "sort"),
            (98.0, "search"),
        ]
        assert arrivals[0] == Arrival(0.0, "sort", 29.0, "mail")

    def test_a_window_starts_and_ends_in_the_traces_own_time(self) -> None:
        assert [a.time_s for a in replayed("azure2021.csv", start_minute=0.5, minutes=1)] == [4.5]
        assert [use.requests for use in small("azure2021.csv").functions(Window(0, 30))] == [2, 1, 1]

    def test_a_long_trace_is_never_held_in_memory(self, tmp_path: Path) -> None:
        path = tmp_path / "long.csv"
        with path.open("w") as stream:
            stream.write("app,func,end_timestamp,duration\n")
            stream.writelines(f"a,f{row % 7},{100 + row * 0.1:.1f},{row * 37 % 50}\n" for row in range(10_000))

        tracemalloc.start()
        try:
            count = sum(1 for _ in replay(open_trace(path)).arrivals(seed=0))
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        assert count == 10_000
        assert peak_bytes < 500_000, "500 invocations at a time are out of order; all 10,000 take 1.5 MB"

    @given(ends=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=30))
    def test_whatever_the_order_of_the_rows_arrivals_come_sorted_and_none_is_lost(
        self, ends: list[tuple[int, int]]
    ) -> None:
        class InMemory(Azure2021):
            def rows(self) -> Iterator[Arrival]:
                return (Arrival(float(end - duration), "f", float(duration)) for end, duration in ends)

        arrivals = list(replay(InMemory(Path("memory"))).arrivals(seed=0))
        first = min(end - duration for end, duration in ends)

        assert [arrival.time_s for arrival in arrivals] == sorted(end - duration - first for end, duration in ends)
        assert Counter(a.inference_s for a in arrivals) == Counter(duration for _, duration in ends)


class TestGenTD26:
    def test_models_are_functions_and_users_callers(self) -> None:
        arrivals = replayed("gentd26.csv")

        assert arrivals[0] == Arrival(0.0, "M0", 32.0, "G0")
        assert arrivals[1] == Arrival(30.0, "M1", None, "G1"), "a failed request has no run time of its own"
        assert arrivals[3] == Arrival(3600.0, "M2", None, "G0")
        assert arrivals[4] == Arrival(86400.0, UNNAMED_MODEL, 41.0, "G2")

    def test_unsuccessful_requests_may_be_left_out(self) -> None:
        trace = GenTD26(DATA / "gentd26.csv", Rows.SUCCEEDED)

        assert [arrival.function for arrival in replay(trace).arrivals(0)] == ["M0", "M0", UNNAMED_MODEL]

    def test_leaving_all_out_leaves_nothing_to_replay(self, tmp_path: Path) -> None:
        path = tmp_path / "failed.csv"
        lines = (DATA / "gentd26.csv").read_text().splitlines()
        path.write_text("\n".join([lines[0], lines[2]]))

        with pytest.raises(ConfigurationError, match="only 0 matching functions"):
            replay(GenTD26(path, Rows.SUCCEEDED))

    def test_a_day_compressed_sixty_times_takes_24_minutes_and_the_same_runs(self) -> None:
        workload = replay(small("gentd26.csv"), Replay(compression=60))
        arrivals = list(workload.arrivals(0))

        assert workload.duration_s == 24 * 60
        assert [arrival.time_s for arrival in arrivals] == [0.0, 0.5, 0.5, 60.0, 1440.0]
        assert arrivals[-1].inference_s == 41.0


class TestAzureLLM:
    def test_it_lends_its_arrivals_to_functions_of_any_popularity(self) -> None:
        workload = replay(small("azure_llm.csv"), popularity=Popularity.zipf(3))
        arrivals = list(workload.arrivals(0))

        assert [arrival.time_s for arrival in arrivals] == pytest.approx([0.0, 0.052, 120.0])
        assert {arrival.function for arrival in arrivals} <= set(workload.functions) == {"f00", "f01", "f02"}

    def test_without_a_popularity_there_is_nothing_to_call(self) -> None:
        with pytest.raises(ConfigurationError, match="give a popularity"):
            replay(small("azure_llm.csv"))
        with pytest.raises(ConfigurationError, match="replay its arrivals instead"):
            with_shares_of(small("azure_llm.csv"))
        with pytest.raises(ConfigurationError, match="leave the popularity out"):
            replay(small("gentd26.csv"), popularity=Popularity.zipf(3))


class TestScaling:
    def test_half_of_the_requests_keep_their_own_times(self) -> None:
        own = {arrival.time_s for arrival in replayed("azure2021.csv")}
        half = replayed("azure2021.csv", minutes=1.75, rate_per_minute=3 / 1.75)

        assert len(half) == 3
        assert {arrival.time_s for arrival in half} < own

    def test_repeated_requests_are_spread_over_the_time_to_the_next_one(self) -> None:
        workload = replay(small("azure_llm.csv"), Replay(rate_per_minute=6, minutes=2), Popularity.uniform(1))

        times = [arrival.time_s for arrival in workload.arrivals(0)]

        assert len(times) == 12
        assert times == sorted(times)
        assert len(set(times)) == 12

    def test_even_timing_keeps_the_order_and_drops_the_gaps(self) -> None:
        arrivals = replayed("gentd26.csv", rate_per_minute=5 / 24, timing=Timing.EVEN, compression=60)

        assert [arrival.time_s for arrival in arrivals] == pytest.approx([0, 288, 576, 864, 1152])
        assert [arrival.function for arrival in arrivals] == ["M0", "M1", "M0", "M2", UNNAMED_MODEL]

    def test_a_trace_of_one_moment_has_no_rate_to_scale(self, tmp_path: Path) -> None:
        path = tmp_path / "moment.csv"
        path.write_text("app,func,end_timestamp,duration\na,f,9,1\n")

        assert [arrival.time_s for arrival in replay(open_trace(path)).arrivals(0)] == [0.0]
        with pytest.raises(ConfigurationError, match="no length to scale"):
            replay(open_trace(path), Replay(rate_per_minute=10))

    def test_every_function_gets_its_number_exactly_whatever_the_phase(self) -> None:
        for phase in (0.0, 0.31, 0.999):
            scaling = Scaling([7, 1000], [3, 2500], [phase, phase])
            assert sum(scaling.take(0, 1) for _ in range(7)) == 3
            assert sum(scaling.take(1, 10) for _ in range(100)) == 2500

    def test_apportioning_adds_up_and_gives_the_rest_to_the_largest_remainders(self) -> None:
        assert apportion([6, 3, 1], 7) == [4, 2, 1]
        assert apportion([1, 1, 1], 2) == [1, 1, 0]
        with pytest.raises(ConfigurationError, match="no requests"):
            apportion([0, 0], 5)

    @pytest.mark.parametrize(
        ("how", "said"),
        [
            ({"compression": 0}, "time compression must be a number above 0"),
            ({"minutes": -1}, "minutes must be"),
            ({"rate_per_minute": 0}, "rate must be"),
            ({"start_minute": -1}, "start minute must be 0 or later"),
            ({"timing": Timing.EVEN}, "needs a rate"),
            ({"start_minute": 99}, "start before minute 99"),
            ({"minutes": 10}, "the trace has 3.0 minutes from there on, not 10"),
        ],
    )
    def test_a_replay_that_the_trace_cannot_serve_says_why(self, how: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigurationError) as raised:
            replayed("azure2019.csv", **how)
        assert said in str(raised.value)


class TestWorkingSet:
    def chosen(self, **choice: object) -> list[str]:
        uses = small("azure2019.csv").functions(Window(0, 60))
        return [use.name for use in WorkingSet(**choice).choose(uses)]  # type: ignore[arg-type]

    def test_the_busiest_of_the_window_are_chosen_busiest_first(self) -> None:
        assert self.chosen() == ["sort", "checkout", "search"]
        assert self.chosen(size=2) == ["sort", "checkout"]

    def test_functions_that_dominate_the_whole_trace_may_be_left_out(self) -> None:
        assert self.chosen(skip=1) == ["checkout", "search"]

    def test_one_trigger_may_be_chosen(self) -> None:
        assert self.chosen(trigger="http", size=1) == ["checkout"]

    @pytest.mark.parametrize(
        ("choice", "said"),
        [
            ({"size": 4}, "only 3 matching functions"),
            ({"trigger": "blob"}, "use one of http, queue, timer"),
            ({"trigger": "timer"}, "only 0 matching functions"),
            ({"skip": -1}, "skip of at least 0"),
        ],
    )
    def test_a_choice_that_the_trace_cannot_serve_says_why(self, choice: dict[str, object], said: str) -> None:
        with pytest.raises(ConfigurationError, match=said):
            self.chosen(**choice)

    def test_a_format_without_triggers_says_so(self) -> None:
        with pytest.raises(ConfigurationError, match="names no triggers"):
            WorkingSet(trigger="http").choose(small("gentd26.csv").functions(Window()))


def test_shares_of_a_trace_take_the_place_of_zipf_in_the_papers_preset() -> None:
    workload = with_shares_of(small("azure2019.csv"), Replay(working_set=WorkingSet(size=2), minutes=3))
    arrivals = list(workload.arrivals(seed=1))

    assert len(arrivals) == 3 * 325
    assert workload.functions == ("sort", "checkout")
    assert sum(arrival.function == "sort" for arrival in arrivals) / 975 == pytest.approx(30 / 42, abs=0.05)
