"""Profiles: what loads and runs cost, declared at first, learned from then on.

Load time is the median of the newest loads per model and GPU kind. Inference time is a moving least-squares line over
the batch size (``a + b * n``), so that one estimate serves single requests and batches (paper: latencies are profiled
per model).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

import msgspec

from hotset.vocabulary import Model, Profile

NEWEST_WEIGHT = 0.1
"""Weight of the newest observation once there are more than 1 / 0.1 of them."""

NEWEST_LOADS = 5
"""Loads that the expected load time is the median of."""

NEWEST_SIZES = 32
"""Loads that a model's footprint is learned from."""

DEFAULT_LOAD_S = 2.5
DEFAULT_INFERENCE_S = 0.1
DEFAULT_RESTORE_SHARE = 0.1
"""Of a load's time, until a restore, or an offload, of any model was seen."""


class Average:
    """A mean that starts exact and becomes a moving one."""

    __slots__ = ("count", "mean")

    def __init__(self, prior: float | None) -> None:
        self.count = 0
        self.mean = prior

    def observe(self, value: float) -> None:
        self.count += 1
        if self.mean is None or self.count == 1:
            self.mean = value
        else:
            self.mean += max(NEWEST_WEIGHT, 1.0 / self.count) * (value - self.mean)


class Typical:
    """The median of the newest few observations, so that one that is out of the ordinary teaches nothing: a first load
    that had to import a framework takes fifty times as long as those after it, and an average would remember it for
    dozens of loads."""

    __slots__ = ("_newest", "value")

    def __init__(self, prior: float | None) -> None:
        self.value = prior
        self._newest: deque[float] = deque(maxlen=NEWEST_LOADS)

    def observe(self, value: float) -> None:
        """Of two, the smaller counts: what was slow once need not be so again."""
        self._newest.append(value)
        self.value = sorted(self._newest)[(len(self._newest) - 1) // 2]


class BatchLine:
    """Seconds of a run as a line over its number of requests, by moving moments."""

    __slots__ = ("count", "cov", "mean_n", "mean_s", "var_n")

    def __init__(self, prior_s: float | None) -> None:
        self.count = 0
        self.mean_n = 1.0
        self.mean_s = prior_s
        self.var_n = 0.0
        self.cov = 0.0

    def observe(self, batch: int, seconds: float) -> None:
        self.count += 1
        if self.mean_s is None or self.count == 1:
            self.mean_n, self.mean_s = float(batch), seconds
            return
        weight = max(NEWEST_WEIGHT, 1.0 / self.count)
        dn, ds = batch - self.mean_n, seconds - self.mean_s
        self.mean_n += weight * dn
        self.mean_s += weight * ds
        if dn or self.var_n:
            self.var_n = (1.0 - weight) * (self.var_n + weight * dn * dn)
            self.cov = (1.0 - weight) * (self.cov + weight * dn * ds)

    def estimate(self, batch: int) -> float | None:
        """Seconds for a run of ``batch`` requests; n cost n times one until batches of two sizes were seen."""
        if self.mean_s is None:
            return None
        if not self.var_n:
            return self.mean_s if batch == self.mean_n else self.mean_s * batch / self.mean_n
        slope = max(0.0, self.cov / self.var_n)
        return max(self.mean_s + slope * (batch - self.mean_n), 0.0)


class Taken(msgspec.Struct, gc=False):
    """GPU memory that a model took from one load on, until it was loaded anew."""

    load_bytes: int
    run_bytes: int = 0
    """What its first run added."""
    growth_bytes: int = 0
    """The most that runs added."""


class Footprint:
    """GPU memory that a model takes, and a margin for what it may take next time, learned from how much that varies.

    The largest of n sizes is not exceeded by the next one in n of n + 1 cases, whatever they are distributed like. The
    mean gap between the sizes is added, as in the textbook estimate of a range's end from a sample of it (the German
    tank problem): that covers the first few sizes, from which little is known, and is nothing where all are equal.

    That is what loads take. What runs add (workspaces, caches, whatever a function keeps) comes on top: the most that
    they added to one of these loads. A load that nothing was added to is one more in which nothing was, so what a model
    no longer does is forgotten with the loads after which it did.
    """

    __slots__ = ("_newest",)

    def __init__(self, sizes_bytes: Iterable[int] = (), growth_bytes: int = 0) -> None:
        self._newest = deque(map(Taken, sizes_bytes), maxlen=NEWEST_SIZES)
        if self._newest:
            self._newest[-1].growth_bytes = growth_bytes

    @property
    def sizes_bytes(self) -> tuple[int, ...]:
        """What the newest loads took, oldest first."""
        return tuple([taken.load_bytes for taken in self._newest])

    @property
    def newest_bytes(self) -> int | None:
        """What it last took, runs included; None: that was never measured."""
        return self._newest[-1].load_bytes + self._newest[-1].growth_bytes if self._newest else None

    @property
    def least_bytes(self) -> int:
        """Without which no GPU can hold it: what a load, or a load and its first run, were seen to take."""
        return max((taken.load_bytes + taken.run_bytes for taken in self._newest), default=0)

    @property
    def growth_bytes(self) -> int:
        """What runs may add to a load."""
        return max((taken.growth_bytes for taken in self._newest), default=0)

    @property
    def need_bytes(self) -> int:
        """What to keep free for the next load and its runs; 0: nothing is known."""
        sizes = self.sizes_bytes
        if not sizes:
            return 0
        largest, gaps = max(sizes), len(sizes) - 1
        margin = -(-(largest - min(sizes)) // gaps) if gaps else 0
        return largest + margin + self.growth_bytes

    def observe(self, size_bytes: int) -> None:
        """A load took this much, or would have."""
        self._newest.append(Taken(size_bytes))

    def observe_again(self, size_bytes: int, *, first_run: bool = False) -> None:
        """What was loaded before takes this much now. ``first_run``: and has run only once since."""
        if not self._newest:
            self.observe(size_bytes)
            return
        newest = self._newest[-1]
        newest.growth_bytes = max(newest.growth_bytes, size_bytes - newest.load_bytes)
        if first_run:
            newest.run_bytes = max(newest.run_bytes, size_bytes - newest.load_bytes)


class Least:
    """The best that was seen of a model on any GPU: until then what was declared, and 0 where nothing was."""

    __slots__ = ("load_s", "next_try_s", "run_s", "seen_load", "seen_run")

    def __init__(self, profile: Profile) -> None:
        self.load_s = min((each for each in (profile.load_s, profile.restore_s) if each is not None), default=0.0)
        """Of a load or a restore."""
        self.run_s = profile.inference_s or 0.0
        """Of a request in a run."""
        self.seen_load = self.seen_run = False
        self.next_try_s = 0.0
        """When a request that the model's runs are too long for may be let in again (``Admission``)."""

    def observe_load(self, seconds: float) -> None:
        self.load_s = min(self.load_s, seconds) if self.seen_load else seconds
        self.seen_load = True

    def observe_run(self, seconds: float) -> None:
        self.run_s = min(self.run_s, seconds) if self.seen_run else seconds
        self.seen_run = True


class Profiles:
    """Estimates for every model; one object serves all GPUs."""

    def __init__(self) -> None:
        self._loads: dict[tuple[str, str], Typical] = {}
        self._reloads: dict[tuple[str, str], Typical] = {}
        self._restores: dict[tuple[str, str], Average] = {}
        self._offloads: dict[tuple[str, str], Average] = {}
        self._runs: dict[tuple[str, str], BatchLine] = {}
        self._models: dict[str, Model] = {}
        self.least: dict[str, Least] = {}
        """By model."""
        self.footprints: dict[str, Footprint] = {}
        """By model."""
        self._any_load = Typical(None)
        self._any_copy = Average(None)
        """Seconds a byte of restores and offloads, of all models: both are copies over the same bus."""
        self._any_run = Average(None)
        self.longest_run_s = DEFAULT_INFERENCE_S
        """No run of one request is expected to take longer (read only)."""
        self.shortest_each_s = math.inf
        """No request is expected to take less of a GPU's time, be its share of a full batch, once any model ran
        (read only)."""

    def add(self, model: Model) -> None:
        self._models[model.name] = model
        if model.profile.inference_s is not None:
            self._bound_runs(model.profile.inference_s, model.max_batch)
        self.least.setdefault(model.name, Least(model.profile))
        self.footprints.setdefault(model.name, Footprint(model.profile.sizes_bytes, model.profile.growth_bytes))

    def remove(self, name: str) -> None:
        self._models.pop(name, None)
        self.least.pop(name, None)
        self.footprints.pop(name, None)
        for table in (self._loads, self._reloads, self._restores, self._offloads, self._runs):
            for key in [key for key in table if key[0] == name]:
                del table[key]

    def load_s(self, model: str, kind: str, *, near: bool = False) -> float:
        """Expected seconds to load the model on a GPU of this kind. ``near``: while its node has the model on another
        GPU, so that its weights are in host memory; as any load, until one like that was seen."""
        if near and (again_s := self.reload_s(model, kind)) is not None:
            return again_s
        known = self._loads.get((model, kind)) or self._load(model, kind)
        if known.value is not None:
            return known.value
        return self.typical_load_s()

    def reload_s(self, model: str, kind: str) -> float | None:
        """Expected seconds of a load whose weights are in host memory; None: not declared, and none was seen."""
        return (self._reloads.get((model, kind)) or self._reload(model, kind)).value

    def restore_s(self, model: str, kind: str) -> float:
        """Expected seconds from WARM to HOT."""
        known = self._restores.get((model, kind))
        if known is None:
            declared = self._models.get(model)
            known = self._restores[model, kind] = Average(declared.profile.restore_s if declared else None)
        return known.mean if known.mean is not None else self._copy_s(model, kind)

    def offload_s(self, model: str, kind: str) -> float:
        """Expected seconds from HOT to WARM."""
        known = self._offloads.get((model, kind))
        return known.mean if known is not None and known.mean is not None else self._copy_s(model, kind)

    def _copy_s(self, model: str, kind: str) -> float:
        """By the model's size, as other models were copied; a share of its load while none was."""
        declared = self._models.get(model)
        if self._any_copy.mean is not None and declared is not None:
            return self._any_copy.mean * declared.memory_bytes
        return DEFAULT_RESTORE_SHARE * self.load_s(model, kind)

    def inference_s(self, model: str, kind: str, batch: int = 1) -> float:
        """Expected seconds of one run of ``batch`` requests."""
        known = self._runs.get((model, kind)) or self._run(model, kind)
        estimate = known.mean_s if batch == known.mean_n else known.estimate(batch)
        if estimate is not None:
            return estimate
        return batch * self.typical_inference_s()

    def typical_inference_s(self) -> float:
        """Seconds of a request of no model in particular."""
        return self._any_run.mean if self._any_run.mean is not None else DEFAULT_INFERENCE_S

    def typical_load_s(self) -> float:
        """Seconds of a load of no model in particular."""
        return self._any_load.value if self._any_load.value is not None else DEFAULT_LOAD_S

    def observe_load(self, model: str, kind: str, seconds: float, *, near: bool = False) -> None:
        table, begin = (self._reloads, self._reload) if near else (self._loads, self._load)
        (table.get((model, kind)) or begin(model, kind)).observe(seconds)
        self._any_load.observe(seconds)
        if model in self.least:
            self.least[model].observe_load(seconds)

    def observe_restore(self, model: str, kind: str, seconds: float, copied_bytes: int) -> None:
        self._observe_copy(self._restores, model, kind, seconds, copied_bytes)
        if model in self.least:
            self.least[model].observe_load(seconds)

    def observe_offload(self, model: str, kind: str, seconds: float, copied_bytes: int) -> None:
        self._observe_copy(self._offloads, model, kind, seconds, copied_bytes)

    def _observe_copy(
        self, table: dict[tuple[str, str], Average], model: str, kind: str, seconds: float, copied_bytes: int
    ) -> None:
        known = table.get((model, kind))
        if known is None:
            known = table[model, kind] = Average(None)
        known.observe(seconds)
        if copied_bytes:
            self._any_copy.observe(seconds / copied_bytes)

    def observe_run(self, model: str, kind: str, batch: int, seconds: float) -> None:
        if seconds >= self.longest_run_s or seconds / batch <= self.shortest_each_s:
            known = self._models.get(model)
            self._bound_runs(seconds, batch if known is None else max(batch, known.max_batch))
        (self._runs.get((model, kind)) or self._run(model, kind)).observe(batch, seconds)
        self._any_run.observe(seconds / batch)
        if model in self.least:
            self.least[model].observe_run(seconds / batch)

    def _bound_runs(self, seconds: float, most: int) -> None:
        """A run took so long that at most so many may share; with a little play, as means of these are rounded."""
        self.longest_run_s = max(self.longest_run_s, seconds * 1.000001)
        self.shortest_each_s = min(self.shortest_each_s, seconds / most / 1.000001)

    def _load(self, model: str, kind: str) -> Typical:
        declared = self._models.get(model)
        typical = self._loads[model, kind] = Typical(declared.profile.load_s if declared else None)
        return typical

    def _reload(self, model: str, kind: str) -> Typical:
        declared = self._models.get(model)
        typical = self._reloads[model, kind] = Typical(declared.profile.reload_s if declared else None)
        return typical

    def _run(self, model: str, kind: str) -> BatchLine:
        declared = self._models.get(model)
        line = self._runs[model, kind] = BatchLine(declared.profile.inference_s if declared else None)
        return line
