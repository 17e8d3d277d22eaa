"""The field's evictions, each by the rule of its source. One GPU; loads take 4 s, runs 1 s."""

from __future__ import annotations

from scheduling_world import World, model

from hotset.scheduling.actions import Unload


def world_of(eviction: str, *, models=("a", "b", "c", "d"), gib: float = 2.0) -> World:
    return World("lalb_o3", eviction=eviction, gpus=(gib,), models=models)


def use(world: World, names: str) -> None:
    for name in names:
        world.arrive(name)
        world.serve("g0")


def evicted(world: World) -> list[str]:
    return [action.model for action in world.log if isinstance(action, Unload)]


class TestLfu:
    def test_the_model_that_ran_least_often_goes(self):
        world = world_of("lfu")
        use(world, "aabc")
        assert evicted(world) == ["b"]

    def test_of_equals_the_one_used_longest_ago_goes(self):
        world = world_of("lfu")
        use(world, "babac")
        assert evicted(world) == ["b"]

    def test_a_stay_that_ended_counts_for_nothing(self):
        world = world_of("lfu")
        use(world, "aaab" + "c" * 4 + "d" * 5)  # c pushes b out, then d pushes a out
        assert evicted(world) == ["b", "a"]
        use(world, "a")
        assert evicted(world) == ["b", "a", "c"]
        use(world, "b")
        assert evicted(world)[-1] == "a", "its three runs of old are forgotten"


class TestGdsf:
    def test_small_and_often_used_stays(self):
        world = world_of("gdsf", models=(model("a", 2.0), model("b", 1.0), model("c", 1.0)), gib=3.0)
        use(world, "bac")
        assert evicted(world) == ["a"], "used later than b, but twice its size"

    def test_dear_to_load_stays(self):
        world = world_of("gdsf", models=(model("a"), model("b"), model("c")))
        for name, load_s in (("a", 20.0), ("b", 2.0)):
            world.arrive(name)
            world.serve("g0", load_s=load_s)
        use(world, "c")
        assert evicted(world) == ["b"]

    def test_fame_of_old_ages_as_the_clock_moves_on(self):
        world = world_of("gdsf")
        use(world, "aaa")
        use(world, "bcbcbcbc")
        assert "a" in evicted(world), "three runs do not protect for ever"
        assert evicted(world)[0] == "b"

    def test_a_model_that_never_ran_goes_first(self):
        world = world_of("gdsf")
        use(world, "a")
        request = world.arrive("b")
        world.cancel(request)
        world.wait(4.0)
        world.loaded("g0")
        use(world, "c")
        assert evicted(world) == ["b"]


class TestSieve:
    def test_the_hand_passes_by_what_was_used_and_takes_the_first_that_was_not(self):
        world = world_of("sieve", gib=3.0)
        use(world, "abca")
        use(world, "d")
        assert evicted(world) == ["b"]

    def test_a_second_lap_takes_what_the_first_one_unmarked(self):
        world = world_of("sieve", gib=3.0)
        use(world, "abcabc")
        use(world, "d")
        assert evicted(world) == ["a"], "all were marked: the oldest goes in the second lap"
        use(world, "a")
        assert evicted(world) == ["a", "b"], "its mark went in the first lap, the hand stands behind a"

    def test_the_hand_stays_where_it_was(self):
        world = world_of("sieve", gib=3.0)
        use(world, "abca")
        use(world, "d")  # the hand took a's mark away and b's place
        use(world, "b")
        assert evicted(world) == ["b", "c"], "on from b, not back to a"
