"""Clockwork and ServerlessLLM, each by the rule of its source. Loads take 4 s, runs 1 s, a GPU of 2 GiB holds two."""

from __future__ import annotations

from scheduling_world import World, model

from hotset.scheduling.actions import Load


def loads(world: World) -> list[tuple[str, str]]:
    return [(action.gpu_id, action.model) for action in world.log if isinstance(action, Load)]


class TestClockwork:
    def hot(self) -> World:
        """One GPU that holds a and b and runs a."""
        world = World("clockwork", models=("a", "b", "c"))
        for name in "ab":
            world.arrive(name)
            world.serve("g0")
        world.arrive("a")
        return world

    def test_of_hits_the_one_that_must_start_soonest_runs_first(self):
        world = self.hot()
        world.arrive("a", patience_s=60.0)
        world.arrive("b", patience_s=30.0)
        world.finish("g0")
        assert world.doing("g0") == "running b"

    def test_without_deadlines_the_oldest_hit_does(self):
        world = self.hot()
        world.arrive("c")
        world.arrive("b")
        world.arrive("a")
        world.finish("g0")
        assert world.doing("g0") == "running b"

    def test_a_load_is_for_the_model_with_most_demand_that_a_load_would_serve_in_time(self):
        world = self.hot()
        world.arrive("c")
        world.add(model("d"))
        for _ in range(2):
            world.arrive("d")
        world.finish("g0")
        assert world.doing("g0") == "loading d"

    def test_what_would_be_late_is_no_demand(self):
        world = self.hot()
        world.add(model("d"))
        world.arrive("d", patience_s=4.5)
        world.arrive("c")
        world.finish("g0")
        assert world.doing("g0") == "loading c"

    def test_but_where_nothing_else_is_wanted_it_is_loaded_for_the_next_ones(self):
        world = self.hot()
        world.arrive("c", patience_s=4.5)
        world.finish("g0")
        assert world.doing("g0") == "loading c"

    def test_a_further_copy_is_for_more_than_its_holders_can_serve_meanwhile(self):
        world = World("clockwork", gpus=(2.0, 2.0))
        world.arrive("a")
        world.serve("g0")
        for _ in range(4):
            world.arrive("a")
        assert world.doing("g1") == "idle", "three runs, one after the other, take less than a load"
        for _ in range(3):
            world.arrive("a")
        assert world.doing("g1") == "loading a"

    def test_a_further_copy_waits_for_models_that_are_wanted_as_much_and_nowhere(self):
        for wanted in (1, 2):
            world = World("clockwork", gpus=(2.0, 2.0), models=("a", "b", "c"))
            for name, gpu_id in (("a", "g0"), ("b", "g1")):
                world.arrive(name)
                world.serve(gpu_id)
            world.arrive("a")
            world.arrive("b")
            for _ in range(wanted):
                world.arrive("c")
            world.arrive("a")
            world.finish("g1")
            assert world.doing("g1") == "loading c"

    def test_a_model_that_fits_on_no_idle_gpu_waits(self):
        world = World("clockwork", gpus=(1.0, 4.0), models=("a", model("large", 3.0)))
        world.arrive("large")
        world.arrive("large")
        world.arrive("a")
        assert loads(world) == [("g1", "large"), ("g0", "a")]


class TestServerlessLlm:
    def test_a_busy_holder_that_is_free_before_a_load_would_be_done(self):
        world = World("serverlessllm", gpus=(2.0, 2.0))
        world.arrive("a")
        world.serve("g0")
        world.arrive("a")
        waits = world.arrive("a")
        assert world.local("g0") == [waits]
        assert world.doing("g1") == "idle"

    def test_another_gpu_once_its_queue_is_longer_than_a_load(self):
        world = World("serverlessllm", gpus=(2.0, 2.0))
        world.arrive("a")
        world.serve("g0")
        for _ in range(6):
            world.arrive("a")
        assert world.doing("g1") == "loading a"

    def test_where_it_fits(self):
        world = World("serverlessllm", gpus=(1.0, 4.0), models=("a", model("large", 3.0)))
        world.arrive("large")
        assert loads(world) == [("g1", "large")]

    def test_one_that_can_start_nowhere_yet_is_passed_by(self):
        world = World("serverlessllm", gpus=(4.0, 1.0), models=("a", model("large", 3.0)))
        world.arrive("large")
        second, third = world.arrive("large"), world.arrive("a")
        assert world.local("g0") == [second]
        assert loads(world) == [("g0", "large"), ("g1", "a")]
        assert third in world.open
