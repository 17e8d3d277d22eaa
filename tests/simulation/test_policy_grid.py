"""The grid benchmark goes on where it was cut short, and compares only what was run on the same seeds."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hotset.simulation.workloads import Popularity, Synthetic

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import policy_grid

    return policy_grid


def test_a_grid_that_was_cut_short_goes_on_and_its_table_is_of_common_seeds(grid: ModuleType, tmp_path: Path) -> None:
    cell = grid.Cell("a few calls", Synthetic(popularity=Popularity.zipf(20), minutes=0.25))
    path = tmp_path / "runs.csv"
    names = [grid.DEFAULT, "lb+lru"]

    def left() -> list[Any]:
        return list(grid.jobs_of([cell], names, range(3), 2, grid.read_runs(path)))

    assert [(job.seed, job.contestants) for job in left()] == [
        (0, (grid.BASELINE, grid.DEFAULT, "lb+lru")),
        (1, (grid.BASELINE, grid.DEFAULT, "lb+lru")),
        (2, (grid.BASELINE, grid.DEFAULT)),
    ]
    grid.carry_out(left()[:1], path, 1, math.inf)
    assert [job.seed for job in left()] == [1, 2]
    grid.carry_out(left(), path, 1, 0.0)
    assert [job.seed for job in left()] == [1, 2], "no time, no job"
    grid.carry_out(left(), path, 1, math.inf)
    assert left() == []

    runs = grid.read_runs(path)
    assert len(runs) == 8
    assert runs[0] == grid.measure(grid.Job(cell, 0, (grid.BASELINE,)))[0]
    rows = {row.contestant: row for row in grid.table(runs)}
    assert {name: row.seeds for name, row in rows.items()} == {grid.DEFAULT: 3, "lb+lru": 2}
    mean_s = {(run.contestant, run.seed): run.mean_s for run in runs}
    expected = sum(mean_s["lb+lru", seed] for seed in (0, 1)) / sum(mean_s[grid.BASELINE, seed] for seed in (0, 1))
    assert rows["lb+lru"].mean == pytest.approx(expected)
    assert rows[grid.DEFAULT].over_all_resident >= 1.0


def test_every_policy_there_is_takes_part(grid: ModuleType) -> None:
    from hotset.scheduling.policies import POLICIES

    assert {name.partition("+")[0] for name in grid.CONTESTANTS} == set(POLICIES)
    names = [cell.name for cell in grid.cells(None)]
    assert len(names) == len(set(names)) > 50
