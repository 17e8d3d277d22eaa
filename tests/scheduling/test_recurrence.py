"""Habits of calls are learned, and models loaded before they are called: where it costs little, and not for ever."""

from __future__ import annotations

import pytest
from scheduling_world import GIB, World

from hotset.errors import ConfigurationError
from hotset.scheduling import recurrence
from hotset.scheduling.actions import Load, Restore
from hotset.scheduling.config import SchedulerConfig

CONFIG = SchedulerConfig(overlap=True, prefetch_recurring=True)
LOAD_S = 4.0
PAUSES_S = (40.0, 170.0, 75.0, 260.0, 110.0, 330.0, 55.0)


def world(*, gib: float = 2.0, gpus: int = 1, models: str = "abcd", host_gib: int = 0) -> World:
    config = SchedulerConfig(overlap=True, prefetch_recurring=True, host_memory_bytes=host_gib * GIB)
    return World("hotset", gpus=(gib,) * gpus, models=tuple(models), config=config)


def call(world: World, name: str) -> None:
    """Call, and let the GPU do what it is asked to."""
    world.arrive(name)
    settle(world)


def settle(world: World) -> None:
    for gpu_id, device in list(world.devices.items()):
        while device.loading is not None or device.running is not None:
            if device.running is not None:
                world.finish(gpu_id)
            else:
                took_s = LOAD_S if isinstance(device.loading, Load) else LOAD_S / 10
                world.wait(took_s)
                world.loaded(gpu_id, load_s=took_s)


def after_each_other(world: World, times: int, names: str = "abcd") -> None:
    """``b`` is called two seconds after ``a``, with others in between so that neither stays."""
    for turn in range(times):
        for place, name in enumerate(names):
            call(world, name)
            world.wait(2.0 if name == "a" else PAUSES_S[(turn * 3 + place * turn) % len(PAUSES_S)])


def loaded_for_nobody(world: World) -> list[str]:
    return [action.model for action in world.actions(Load) if isinstance(action, Load) and action.request_id is None]


@pytest.fixture
def no_rhythm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "LEAST_INTERVALS", 1_000_000)


@pytest.mark.usefixtures("no_rhythm")
class TestSuccession:
    def test_what_follows_is_loaded_as_soon_as_what_it_follows_is_called(self):
        told = world()
        after_each_other(told, 10)
        told.log.clear()
        told.arrive("a")
        told.wait(LOAD_S)
        told.loaded("g0")
        assert told.doing("g0") == "running a, loading b"
        settle(told)
        told.log.clear()
        request = told.arrive("b")
        assert told.running("g0") == (request,)
        assert told.actions(Load) == []

    def test_it_is_not_believed_at_once(self):
        told = world()
        after_each_other(told, 3)
        assert loaded_for_nobody(told) == []

    def test_what_does_not_follow_is_not_loaded(self):
        told = world()
        for turn in range(20):
            for name in ("a", "bcd"[turn % 3]):
                call(told, name)
                told.wait(2.0 if name == "a" else PAUSES_S[turn * turn % len(PAUSES_S)])
        assert loaded_for_nobody(told) == []

    def test_a_model_that_is_resident_is_not_loaded_again(self):
        told = world(gib=8.0)
        after_each_other(told, 12)
        assert len(told.actions(Load)) == 4

    def test_it_goes_by_episodes(self):
        """A model in use, called every second, precedes everything and says nothing."""
        told = world(gib=3.0, models="abcde")
        for turn in range(12):
            for _ in range(10):
                call(told, "e")
                told.wait(1.0)
            call(told, "bcd"[turn % 3])
            told.wait(5.0)
        assert loaded_for_nobody(told) == []


class TestRhythm:
    def test_a_beat_is_awaited(self):
        """``a`` comes every 300 s, ``b``, ``c`` and ``d`` now and then."""
        told = world()
        for turn in range(6):
            call(told, "a")
            for name, wait_s in (("b", 50.0 + turn * 13 % 40), ("c", 60.0), ("d", 50.0)):
                told.wait(wait_s)
                call(told, name)
            told.wait(300.0 - (160.0 + turn * 13 % 40) - recurrence.EARLY_LOADS * LOAD_S - 1.0)
            assert told.doing("g0") == "idle"
            told.wait(recurrence.EARLY_LOADS * LOAD_S + 1.0)
            settle(told)
        assert "a" in loaded_for_nobody(told)
        assert told.scheduler.cache.useful_prefetches > 0

    def test_calls_at_odd_times_are_no_rhythm(self):
        told = world()
        for turn in range(12):
            call(told, "a")
            told.wait(40.0 + 170.0 * (turn % 3))
            call(told, "bcd"[turn % 3])
            told.wait(35.0 + 90.0 * (turn % 2))
            call(told, "bcd"[(turn + 1) % 3])
        assert "a" not in loaded_for_nobody(told)

    def test_without_a_gpu_nothing_is_due(self):
        told = world(gpus=0)
        for _ in range(6):
            told.arrive("a")
            told.wait(100.0)
        assert told.scheduler.next_wakeup_s() is None


@pytest.mark.usefixtures("no_rhythm")
class TestGuessesAreCheap:
    def test_nothing_is_loaded_while_somebody_waits_for_a_model_that_is_nowhere(self):
        told = world()
        after_each_other(told, 10)
        told.log.clear()
        told.arrive("a")
        told.arrive("c")
        assert loaded_for_nobody(told) == []

    def test_a_guess_that_costs_more_than_it_saves_is_not_made(self):
        """The GPU's whole memory is for models that are called all the time."""
        told = world(models="abef")
        for turn in range(12):
            for _ in range(30):
                call(told, "e")
                call(told, "f")
                told.wait(1.0)
            call(told, "a")
            call(told, "b")
            told.wait(turn % 7)
        assert loaded_for_nobody(told) == []

    def test_one_that_found_no_room_in_time_is_given_up(self):
        told = world(gib=1.0)
        after_each_other(told, 10)
        told.log.clear()
        told.arrive("a")
        told.wait(LOAD_S)
        told.loaded("g0")
        expected = told.scheduler._recurrence.expected  # type: ignore[union-attr]
        assert list(expected) == ["b"]
        told.wait(recurrence.SUCCESSION_S)
        told.finish("g0")
        assert not expected
        assert loaded_for_nobody(told) == []

    def test_at_most_one_guess_a_gpu_is_there_unused(self):
        told = world(gib=4.0, models="abcdef")
        for _ in range(10):
            for name in "abcdef":
                call(told, name)
                told.wait(2.0 if name in "abc" else 100.0)
        residents = told.scheduler.cluster.gpus["g0"].memory.residents.values()
        assert sum(resident.guessed for resident in residents) <= 1  # and so it was after every event (invariants)
        assert loaded_for_nobody(told)

    def test_a_model_is_guessed_once_until_it_is_called_again(self):
        told = world()
        after_each_other(told, 10)
        told.log.clear()
        after_each_other(told, 4, "acd")
        assert loaded_for_nobody(told) == ["b"]
        assert told.scheduler.cache.useless_prefetches > 0

    def test_one_whose_guess_came_to_nothing_is_passed_over_the_next_times(self):
        told = world()
        after_each_other(told, 14)

        def guessed_after_a() -> bool:
            told.log.clear()
            call(told, "a")
            told.wait(100.0)
            made = loaded_for_nobody(told) == ["b"]
            for name in "cdcd":
                call(told, name)
                told.wait(100.0)
            assert "b" not in told.resident("g0")
            return made

        assert guessed_after_a()
        call(told, "b")  # much later than it used to: the guess was no use
        call(told, "c")
        call(told, "d")
        told.wait(100.0)
        assert [guessed_after_a() for _ in range(3)] == [False, False, True]


class TestWhatHappensMeanwhile:
    def test_a_removed_model_is_expected_no_more(self):
        told = world()
        after_each_other(told, 10)
        told.remove("b")
        told.log.clear()
        call(told, "a")
        assert loaded_for_nobody(told) == []
        after_each_other_without_b(told)

    def test_a_parked_model_is_brought_back(self):
        told = world(host_gib=8)
        after_each_other(told, 10)
        for name in told.resident("g0"):
            told.process_dies("g0", name)  # a restore saves little: nobody would have to go for it
        told.log.clear()
        told.arrive("a")
        settle(told)
        assert [action.model for action in told.actions(Restore) if isinstance(action, Restore)] == ["a", "b"]

    def test_counts_and_what_is_kept_are_bounded(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(recurrence, "MOST_COUNTED", 6)
        monkeypatch.setattr(recurrence, "MOST_SUCCESSORS", 1)
        told = world(gib=1.0, models="abcdef")
        for _ in range(16):
            for name in "abcdef":
                call(told, name)
                told.wait(3.0 if name in "ab" else 100.0)
        habits = told.scheduler._recurrence._habits  # type: ignore[union-attr]
        assert all(len(each.successors) <= 1 and each.episodes <= 6 for each in habits.values())

    def test_so_is_how_many_are_expected(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(recurrence, "MOST_EXPECTED", 1)
        habits = recurrence.Recurrence(world(gpus=0).scheduler.cluster)
        for turn in range(9):
            for after_s, name in enumerate("abc"):
                habits.arrived(name, turn * 100.0 + after_s)
        habits.arrived("a", 1000.0)
        assert list(habits.expected) == ["c"]

    def test_a_model_that_was_removed_is_followed_by_nobody(self):
        habits = recurrence.Recurrence(world(gpus=0).scheduler.cluster)
        habits.arrived("a", 0.0)
        habits.forget("a")
        habits.arrived("b", 2.0)
        assert list(habits._habits) == ["b"]

    def test_it_needs_two_lanes(self):
        with pytest.raises(ConfigurationError, match=r"set overlap too \(--overlap\)$"):
            SchedulerConfig(prefetch_recurring=True)


def after_each_other_without_b(world: World) -> None:
    for name in ("a", "c", "d"):
        call(world, name)
        world.wait(50.0)
