"""Whose turn it is on one GPU."""

from __future__ import annotations

from typing import ClassVar

from hypothesis import given
from hypothesis import strategies as st

from hotset.node.order import Operation, Turns


class Copy(Operation):
    """A load or a restore."""


class Leave(Operation):
    """An unload or an offload."""

    leaves: ClassVar[bool] = True


class Run(Operation):
    runs: ClassVar[bool] = True


def added(*operations: Operation) -> Turns[Operation]:
    turns: Turns[Operation] = Turns()
    for operation in operations:
        turns.add(operation)
    return turns


def test_a_run_waits_for_its_models_load_and_for_no_other() -> None:
    first, other, run, run_other = Copy(model="a"), Copy(model="b"), Run(model="a"), Run(model="b")
    turns = added(first, other, run, run_other)
    assert turns.start() is first
    assert turns.start() is None
    turns.done(first)
    assert [turns.start(), turns.start(), turns.start()] == [run, other, None]
    turns.done(run)
    assert turns.start() is None  # b is still being loaded
    turns.done(other)
    assert turns.start() is run_other


def test_what_takes_a_model_away_waits_for_its_runs() -> None:
    run, again, leave, load = Run(model="a"), Run(model="a"), Leave(model="a"), Copy(model="b")
    turns = added(run, again, leave, load)
    assert [turns.start(), turns.start()] == [run, None]
    turns.done(run)
    assert [turns.start(), turns.start()] == [again, None]
    turns.done(again)
    assert [turns.start(), turns.start()] == [leave, None]  # b's load needs a's memory
    turns.done(leave)
    assert turns.start() is load


def test_another_models_memory_may_leave_while_one_runs() -> None:
    run, leave, late = Run(model="a"), Leave(model="b"), Run(model="b")
    turns = added(run, leave, late)
    assert [turns.start(), turns.start()] == [run, leave]
    turns.done(run)
    assert turns.start() is None
    turns.done(leave)
    assert turns.start() is late


def test_what_has_not_begun_can_be_forgotten() -> None:
    turns = added(Copy(model="a"), Run(model="a"), Copy(model="b"))
    turns.start()
    turns.clear()
    assert turns.copying is not None
    turns.done(turns.copying)
    assert turns.start() is None


KINDS = st.sampled_from([Copy, Leave, Run])


@given(st.lists(st.tuples(KINDS, st.sampled_from("abc")), max_size=12), st.randoms(use_true_random=False))
def test_everything_has_its_turn_and_each_model_keeps_its_order(asked: list[tuple[type, str]], random: object) -> None:
    operations = [kind(model=model) for kind, model in asked]
    turns = added(*operations)
    current: list[Operation] = []
    begun: list[Operation] = []
    while True:
        while (operation := turns.start()) is not None:
            assert all(each.model != operation.model or not (each.leaves or operation.leaves) for each in current)
            current.append(operation)
            begun.append(operation)
        if not current:
            break
        over = current.pop(random.randrange(len(current)))  # type: ignore[attr-defined]
        turns.done(over)
    assert sorted(begun, key=lambda each: each.number) == operations
    for lane in (True, False):
        in_lane = [each.number for each in begun if each.runs is lane]
        assert in_lane == sorted(in_lane)
