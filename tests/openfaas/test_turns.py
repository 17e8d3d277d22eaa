"""Whose asynchronous call is made next."""

from __future__ import annotations

from collections import Counter
from itertools import count

import pytest

from hotset.gateway.openfaas import turns as module
from hotset.gateway.openfaas.turns import Turns
from hotset.store.async_calls import AsyncCall

NUMBERS = count(1)


def call(caller: str, function: str = "cat", weight: float = 1.0) -> AsyncCall:
    return AsyncCall(
        number=next(NUMBERS), call_id="", function=function, caller=caller, weight=weight, accepted_at_s=0.0
    )


def filled(*calls: AsyncCall) -> Turns:
    turns = Turns()
    for each in calls:
        turns.add(each)
    return turns


def test_a_function_that_had_its_turn_is_behind_the_others():
    turns = filled(*(call("ann", "cat") for _ in range(3)), *(call("ann", "dog") for _ in range(2)))
    assert len(list(turns)) == 5
    taken = []
    while turns:
        taken.append(turns.take(turns.functions()[0]).function)
    assert taken == ["cat", "dog", "cat", "dog", "cat"]


def test_a_callers_backlog_delays_another_caller_by_one_call_and_his_own_order_is_kept():
    flood = [call("flood") for _ in range(100)]
    turns = filled(*flood)
    made = [turns.take("cat") for _ in range(10)]
    turns.add(call("quiet"))
    made += [turns.take("cat") for _ in range(4)]
    assert "quiet" in [each.caller for each in made[10:12]]
    assert [each for each in made if each.caller == "flood"] == flood[:13]


def test_turns_come_by_weight():
    turns = filled(*(call("ann", weight=3.0) for _ in range(50)), *(call("bob") for _ in range(50)))
    callers = [turns.take("cat").caller for _ in range(40)]
    assert 29 <= callers.count("ann") <= 31
    assert 9 <= callers.count("bob") <= 11


def test_who_sends_one_call_after_another_does_not_pass_those_who_wait():
    turns = filled(*(call("flood") for _ in range(20)), call("single"))
    callers = []
    for _ in range(20):
        made = turns.take("cat")
        callers.append(made.caller)
        if made.caller == "single":
            turns.add(call("single"))
    assert callers.count("flood") == 10


class Spending:
    """Callers whose calls take some GPU seconds each, one after the other."""

    def __init__(self, **call_s: float) -> None:
        self.call_s = call_s
        self.had_s: Counter[str] = Counter()
        self.turns = Turns(self.had_s.__getitem__)

    def make(self, calls: int) -> list[str]:
        """Calls of whichever function's turn it is; returns who sent them."""
        made = []
        for _ in range(calls):
            taken = self.turns.take(self.turns.functions()[0])
            made.append(taken.caller)
            self.had_s[taken.caller] += self.call_s[taken.caller]  # type: ignore[assignment]
            self.turns.made(taken)
        return made


def test_long_calls_have_fewer_turns():
    spending = Spending(long=4.0, short=0.5)
    for _ in range(50):
        spending.turns.add(call("long"))
        spending.turns.add(call("short"))
    made = spending.make(45)
    assert 37 <= made.count("short") <= 41, "as many GPU seconds for both: eight to one"


def test_a_flood_of_many_functions_has_no_more_turns_than_who_calls_one():
    spending = Spending(flood=1.0, quiet=1.0)
    for number in range(100):
        spending.turns.add(call("flood", f"cat{number % 10}"))
    for _ in range(10):
        spending.turns.add(call("quiet", "dog"))
    assert 9 <= spending.make(20).count("quiet") <= 10


def test_what_a_caller_has_besides_counts():
    spending = Spending(ann=1.0, bob=1.0)
    for _ in range(30):
        spending.turns.add(call("ann"))
        spending.turns.add(call("bob"))
    spending.had_s["ann"] += 10  # interactive calls
    assert spending.make(10).count("ann") <= 1


def test_who_was_silent_is_owed_nothing_for_it():
    spending = Spending(ann=1.0, bob=1.0)
    for _ in range(60):
        spending.turns.add(call("ann"))
    spending.make(30)
    for _ in range(30):
        spending.turns.add(call("bob"))
    assert 9 <= spending.make(20).count("bob") <= 11


def test_calls_that_need_no_gpu_are_counted_for_themselves():
    had_s = {"ann": 100.0, "bob": 0.0}
    turns = Turns(had_s.__getitem__, on_gpu=lambda function: function != "text")
    for _ in range(10):
        turns.add(call("ann", "text"))
        turns.add(call("bob", "text"))
    had_s["ann"] += 50.0
    assert [turns.take("text").caller for _ in range(4)].count("ann") == 2


def test_memory_does_not_grow_with_callers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MOST_IDLE", 5)
    turns = Turns()
    for number in range(20):
        turns.add(call(f"caller {number}"))
        turns.take("cat")
    assert all(len(accounts._by_caller) <= 7 for accounts in turns._accounts.values())
