"""``hotset explain``: why a request went where it went, and what the alternatives would have cost."""

from __future__ import annotations

from scheduling_world import World, model

from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.journal import MOST_ALTERNATIVES, Alternative
from hotset.scheduling.policies.interface import Rule
from hotset.vocabulary import RejectReason

JOURNAL = SchedulerConfig(journal_capacity=100)


def test_a_miss_names_its_victims_and_its_alternatives():
    world = World("lalb", gpus=(1.0, 1.0), config=JOURNAL)
    for gpu_id, name in (("g0", "a"), ("g1", "b")):
        world.arrive(name)
        world.serve(gpu_id)
    request_id = world.arrive("c")
    explanation = world.scheduler.journal.explain(request_id)
    assert explanation is not None
    (decision,) = explanation.decisions
    assert (decision.gpu_id, decision.rule, decision.hit, decision.evicted) == ("g0", Rule.NOWHERE, False, ("a",))
    assert (decision.wait_s, decision.load_s, decision.inference_s) == (0.0, 4.0, 1.0)
    assert decision.alternatives == (Alternative("g1", 0.0, 4.0, 1.0),)
    assert decision.alternatives[0].total_s == 5.0


def test_a_hit_on_an_idle_gpu_has_no_cheaper_alternative():
    world = World("lalb", gpus=(1.0, 1.0), config=JOURNAL)
    world.arrive("a")
    world.serve("g0")
    explanation = world.scheduler.journal.explain(world.arrive("a"))
    assert explanation is not None
    (decision,) = explanation.decisions
    assert (decision.rule, decision.hit, decision.alternatives) == (Rule.HIT_ELSEWHERE, True, ())


def test_a_wait_for_a_holder_shows_the_load_it_saved_and_then_its_start():
    world = World("lalb", gpus=(1.0, 1.0), config=JOURNAL)
    world.arrive("a")
    world.serve("g0")
    world.arrive("a")
    request_id = world.arrive("a")
    world.wait(1.0)
    world.finish("g0")
    world.wait(1.0)
    world.finish("g0")
    explanation = world.scheduler.journal.explain(request_id)
    assert explanation is not None
    wait, run = explanation.decisions
    assert (wait.rule, wait.wait_s) == (Rule.WAIT_FOR_HOLDER, 1.0)
    assert wait.alternatives == (Alternative("g1", 0.0, 4.0, 1.0),)
    assert run.rule is Rule.LOCAL_QUEUE
    assert (explanation.arrival_s, explanation.started_s, explanation.finished_s) == (5.0, 6.0, 7.0)


def test_rules_of_the_other_decisions():
    world = World("lalb_o3", gpus=(1.0,), config=JOURNAL)
    world.arrive("a")
    world.serve("g0")
    here = world.arrive("a")
    world.arrive("b")
    hit = world.arrive("a")
    world.finish("g0")
    world.join(1.0)
    world.run_fails("g0")
    journal = world.scheduler.journal
    assert [decision.rule for decision in journal.explain(here).decisions] == [Rule.HIT_HERE]  # type: ignore[union-attr]
    assert [decision.rule for decision in journal.explain(hit).decisions] == [Rule.OUT_OF_ORDER_HIT]  # type: ignore[union-attr]
    world.serve("g1")
    assert [decision.rule for decision in journal.explain(hit).decisions][1:] == [Rule.RETRY]  # type: ignore[union-attr]


def test_a_copy_is_explained_by_the_waits_it_saves():
    world = World("lalb", gpus=(1.0,) * 3, models=[model("a", load_s=0.5)], config=JOURNAL)
    world.arrive("a")
    explanation = world.scheduler.journal.explain(world.arrive("a"))
    assert explanation is not None
    (decision,) = explanation.decisions
    assert decision.rule is Rule.LOAD_IS_SHORTER
    # The holder first, then the GPU that is idle.
    assert decision.alternatives == (Alternative("g0", 1.5, 0.0, 1.0), Alternative("g2", 0.0, 0.5, 1.0))


def test_a_holder_left_to_a_larger_model_is_explained_too():
    world = World("lalb", gpus=(1.0, 4.0), models=["a", model("large", 4.0), "b"], config=JOURNAL)
    world.arrive("b")
    world.arrive("a")
    world.serve("g1")
    world.arrive("a")
    world.arrive("large")
    world.serve("g0")
    explanation = world.scheduler.journal.explain(world.arrive("a"))
    assert explanation is not None
    assert [decision.rule for decision in explanation.decisions] == [Rule.HOLDER_AWAITED]


def test_so_many_alternatives_and_no_more():
    world = World("lb", gpus=(1.0,) * 30, config=JOURNAL)
    for _ in range(12):
        request_id = world.arrive("a")
    explanation = world.scheduler.journal.explain(request_id)
    assert explanation is not None
    (decision,) = explanation.decisions
    assert len(decision.alternatives) == MOST_ALTERNATIVES
    assert decision.gpu_id not in {alternative.gpu_id for alternative in decision.alternatives}


def test_a_rejection_is_kept_with_its_reason():
    world = World("lb", config=JOURNAL)
    world.arrive("a")
    waited = world.arrive("b", patience_s=2.0)
    refused = world.arrive("nobody")
    world.wait(2.0)
    late = world.scheduler.journal.explain(waited)
    assert late is not None
    assert (late.rejected, late.finished_s, late.decisions) == (RejectReason.HOPELESS, 1.001, [])
    unknown = world.scheduler.journal.explain(refused)
    assert unknown is not None
    assert (unknown.rejected, unknown.note) == (RejectReason.UNKNOWN_MODEL, "no model 'nobody' is deployed")


def test_only_the_newest_requests_are_kept():
    world = World("lb", config=SchedulerConfig(journal_capacity=3))
    ids = [world.arrive("a")]
    world.loaded("g0")
    ids += [world.arrive("nobody") for _ in range(4)]
    world.finish("g0")  # forgotten meanwhile
    journal = world.scheduler.journal
    assert [journal.explain(request_id) is not None for request_id in ids] == [False, False, True, True, True]


def test_a_run_whose_decision_is_forgotten_tells_no_half_of_its_story():
    world = World("lb", gpus=(1.0, 1.0), config=SchedulerConfig(journal_capacity=1))
    old = world.arrive("a")
    world.loaded("g0")
    assert world.scheduler.journal.explain(old) is not None
    world.arrive("b")
    assert world.scheduler.journal.explain(old) is None


def test_those_who_joined_a_run_are_explained_too():
    world = World("lb", gpus=(1.0,), models=[model("a", max_batch=4)], config=JOURNAL)
    world.arrive("a")
    joined = world.arrive("a")
    world.serve("g0")
    explanation = world.scheduler.journal.explain(joined)
    assert explanation is not None
    (decision,) = explanation.decisions
    assert (decision.gpu_id, decision.rule, decision.hit) == ("g0", Rule.JOINED, True)
    assert decision.inference_s == 2.0, "of the whole run"
    assert (explanation.started_s, explanation.finished_s) == (4.0, 5.0)


def test_without_a_journal_nothing_is_kept():
    world = World("lb")
    assert world.scheduler.journal.explain(world.arrive("a")) is None
