"""Whose asynchronous call is made next."""

from __future__ import annotations

from itertools import count

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
