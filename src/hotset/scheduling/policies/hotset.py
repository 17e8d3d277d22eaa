"""The default policy: hits first, and a miss only where it pays (docs/policies.md derives and measures every term)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from operator import attrgetter

import msgspec

from hotset.scheduling.cluster import Cluster, GpuState
from hotset.scheduling.policies.interface import Placement, PolicySettings, Rule
from hotset.scheduling.prices import Outlook, saved_by_copy
from hotset.scheduling.queue import Entry

MOST_NEW = 3
"""Idle GPUs, and lines, that one decision looks at for hits, newest first."""
MOST_GPUS = 16
"""GPUs compared for one load."""
MOST_LINES = 32
"""Models waited for that one decision looks at; of more, those that no GPU holds come first, the others in turns."""
MOST_COPIED = 8
"""Of these, the models that are considered for a further copy."""
MOST_PRICED = 4
"""Models for which one decision looks for the cheapest GPU."""
HEAD_START_LOADS = 2.0
"""Added to a line's age, in typical loads: a young line of many requests is worth a load before an old line of one."""
RELOAD_PRICE = 5.0
"""GPU time that a second of the victims' callers' waiting stands for: they wait, and a GPU loads, for whom it loses."""
GPU_TIME_PRICE = 0.3
"""Waiting that a second of an idle GPU's time, spent on a load that could be done without, causes elsewhere; less where
most GPUs are idle."""
URGENCY = 1.5
"""Where room is free: how much more a second weighs for a line that will have waited for a load and a run's time."""
URGENT_SHARE = 0.3
"""How much of that counts where room is not free."""
CROWDING = 8.0
"""How much dearer that time gets for each request, per GPU, that waits for a model that no GPU holds."""
BLOCKED = 0.2
"""Share of requests for a loading GPU's other models that wait for that: most find a copy, or wait for each other."""
MOST_HARM = 0.3
"""What a load for a request beyond its caller's share may cost others, as a share of the GPU time that it takes."""

MOST_COUNTED = 64
"""Requests of a line, the newest ones, of which it is asked whether they would be in time."""
HITS_ALONE = 5.0
"""How long the oldest request is passed by for hits as a matter of course, in times of a typical load and run."""
MUCH_SHORTER = 2.0
"""How many times as many answers per second of GPU time than hits a load has to give to go before them."""

STAY_LOADS = 4.0
"""How long a GPU that thrashes may stay with a model, in times of its load, although an older request is due."""


class _Load(msgspec.Struct, frozen=True, gc=False):
    """Where a model could be loaded."""

    gpu: GpuState
    price_s: float
    """What its victims' callers would pay."""
    total_s: float
    """With what the callers of the other residents would pay, as the GPU is not theirs meanwhile."""


class _Line(msgspec.Struct, gc=False):
    """A line that waits for a model that no GPU holds."""

    outlook: Outlook
    waiting_s: float
    """What it has to end: requests times age."""
    gpu_s: float
    """GPU time that this takes: a load, and a run for each request."""
    most_worth: float
    """Waiting ended per second of GPU time, were room free."""
    load: _Load | None = None
    """The cheapest place for its model; None: not looked for, or there is none."""
    worth: float = 0.0
    """As ``most_worth``, but the victims' reloads are counted in."""


class _Candidate(msgspec.Struct, gc=False):
    """A model that is worth a further copy."""

    outlook: Outlook
    worth: float
    """Per second of GPU time; to compare candidates by."""
    most_s: float
    """Most that its victims' callers may pay for it."""
    urgent_s: float
    """What it gains besides where room costs nobody anything; elsewhere a share of it."""
    place: int
    """Of the request, in its line, that the load is for."""
    wait_s: float
    """Until a holder could start that line."""


_most_worth, _by_worth = attrgetter("most_worth"), attrgetter("worth")


class Hotset:
    """Late binding: a request is bound to a GPU only when that GPU starts on it.

    In this order: the oldest request whose model is on an idle GPU; a load for a model that no GPU holds; a further
    copy of one whose holders cannot drain its line. The oldest request goes first regardless once it was passed over
    ``max_skips`` times or has waited ``max_wait_s``. Where requests cannot all be answered in time, what goes first is
    what ends most waiting per second of GPU time.
    """

    name = "hotset"

    def __init__(self, settings: PolicySettings) -> None:
        self.most_skips = settings.max_skips
        self.longest_wait_s = settings.max_wait_s

    def next_placement(self, cluster: Cluster, now_s: float) -> Placement | None:
        queue = cluster.queue
        head = queue.head()
        if head is None or not cluster.idle:
            return None
        if self._is_due(cluster, head, now_s):
            return self._stay(cluster, head, now_s) or self._in_order(cluster, now_s)
        if now_s < cluster.overload_until_s:
            most = self._most_ended(cluster, head, now_s)
            if most is not None:
                return most
        hit = self._hit(cluster, head, now_s)
        if hit is not None:
            return (hit.skips and self._shorter_load(cluster, head, hit, now_s)) or hit
        lines, held = queue.models if len(queue.models) <= MOST_LINES else _look(cluster), cluster.cache.held
        nowhere = [model for model in lines if model not in held]
        if nowhere:
            miss = self._miss(cluster, head, nowhere, now_s)
            if miss is not None:
                return miss
        if len(nowhere) == len(lines):
            return None
        copied = islice((model for model in lines if model in held), MOST_COPIED)
        return self._copy(cluster, head, nowhere, list(copied), now_s)

    def _is_due(self, cluster: Cluster, head: Entry, now_s: float) -> bool:
        """Whether the oldest request may be passed over no more. One whose model has all its copies waits for these,
        not for GPUs that others could take. What is beyond its caller's share waits for what others leave."""
        queues = cluster.queues
        if queues.contended and queues.sparing:
            return False
        if cluster.is_spread(head.model):
            others = (line[0] for model, line in cluster.queue.models.items() if not cluster.is_spread(model))
            oldest_s = min((entry.since_s for entry in others), default=now_s)
            return now_s - oldest_s >= self.longest_wait_s
        return cluster.queue.skips_of_head >= self.most_skips or now_s - head.since_s >= self.longest_wait_s

    def _stay(self, cluster: Cluster, head: Entry, now_s: float) -> Placement | None:
        """While GPUs thrash: the oldest request for a model that was loaded lately where it is, on that GPU."""
        if cluster.queue.skips_of_head >= self.most_skips or cluster.thrash.episode(now_s) is None:
            return None
        lines, gpu = cluster.queue.models, next(reversed(cluster.idle))
        for model, resident in reversed(gpu.memory.residents.items()):
            line = lines.get(model)
            if line is not None and model != gpu.memory.copying:
                stay_s = (1.0 + STAY_LOADS) * cluster.prices.outlook(model, gpu, now_s).load_s
                if now_s - resident.loaded_s < stay_s:
                    return Placement(line[0], gpu, Rule.LONGER_RUN, skips=line[0] is not head)
        return None

    def _in_order(self, cluster: Cluster, now_s: float) -> Placement | None:
        """The oldest request that fits on an idle GPU: where its model is, else where room is cheapest."""
        for line in sorted(cluster.queue.models.values(), key=lambda line: line[0].seq):
            entry = line[0]
            gpu = cluster.idle_holder(entry.model)
            if gpu is None:
                outlook = cluster.prices.outlook(entry.model, next(iter(cluster.idle)), now_s)
                load = self._cheapest_load(cluster, outlook, now_s)
                gpu = load.gpu if load is not None else cluster.first_idle(entry.model)
            if gpu is not None:
                return Placement(entry, gpu, Rule.OLDEST_FIRST)
        return None

    def _most_ended(self, cluster: Cluster, head: Entry, now_s: float) -> Placement | None:
        """In overload: what ends most waiting per second of GPU time, shared by whom it is in time for, hit or load."""
        best: Placement | None = None
        most, first, queued = -1.0, next(iter(cluster.idle)), cluster.queue.models
        newest = (gpu.memory.residents for gpu in islice(reversed(cluster.idle), MOST_NEW))
        hits = [model for residents in newest for model in residents if model in queued]
        for model in dict.fromkeys([*hits, *(queued if len(queued) <= MOST_LINES else _look(cluster))]):
            line, gpu, load_s = queued[model], cluster.idle_holder(model), 0.0
            outlook = cluster.prices.outlook(model, gpu or first, now_s)
            if gpu is None:
                helped = _helped(cluster, outlook, line, now_s)
                load = self._cheapest_load(cluster, outlook, now_s) if helped else None
                if load is None:
                    continue
                gpu, load_s = load.gpu, (_soonest_s(cluster, outlook) + RELOAD_PRICE * load.price_s) / helped
            each_s = load_s + _each_s(cluster, outlook, gpu, len(line))
            worth = (now_s - line[0].since_s) / each_s if each_s else math.inf
            if worth > most:
                most, best = worth, Placement(line[0], gpu, Rule.MOST_ENDED, skips=line[0] is not head)
        return best

    def _shorter_load(self, cluster: Cluster, head: Entry, hit: Placement, now_s: float) -> Placement | None:
        """Where requests queue up, hits alone may keep GPUs busy for good: a load after which an answer takes far less
        GPU time than theirs, load and victims included, goes first."""
        profiles, queue = cluster.profiles, cluster.queue
        if queue.waiting <= len(cluster.gpus):
            return None
        if now_s - head.since_s < HITS_ALONE * (profiles.typical_load_s() + profiles.typical_inference_s()):
            return None
        best, gpu = None, next(iter(cluster.idle))
        least_s = cluster.inference_s(hit.entry.model, hit.gpu) / MUCH_SHORTER
        if profiles.shortest_each_s >= least_s:
            return None
        for model in islice(queue.models, MOST_LINES):
            if model in cluster.cache.held:
                continue
            line = queue.models[model]
            run_s = cluster.each_s(model, gpu, len(line))
            if run_s >= least_s:
                continue
            each_s = cluster.load_s(model, gpu) / len(line) + run_s
            if each_s < least_s:
                load = self._cheapest_load(cluster, cluster.prices.outlook(model, gpu, now_s), now_s)
                if load is not None and each_s + RELOAD_PRICE * load.price_s / len(line) < least_s:
                    least_s = each_s + RELOAD_PRICE * load.price_s / len(line)
                    best = Placement(line[0], load.gpu, Rule.SHORTER_LOAD, skips=line[0] is not head)
        return best

    def _hit(self, cluster: Cluster, head: Entry, now_s: float) -> Placement | None:
        """The oldest request that needs no load, on the holder that the others' models can best spare."""
        best: Entry | None = None
        # What could be a hit was one at once: only GPUs that have just become idle and lines that have just begun are
        # new, and both stand last.
        for gpu in islice(reversed(cluster.idle), MOST_NEW):
            hit = cluster.first_waiting_hit(gpu)
            if hit is not None and (best is None or hit.seq < best.seq):
                best = hit
        if len(cluster.idle) > MOST_NEW:
            lines = cluster.queue.models
            for model in islice(reversed(lines), MOST_NEW):
                entry = lines[model][0]
                if (best is None or entry.seq < best.seq) and cluster.idle_holder(model) is not None:
                    best = entry
        if best is None:
            return None
        rule = Rule.HIT_ELSEWHERE if best is head else Rule.OUT_OF_ORDER_HIT
        return Placement(best, _most_spare_holder(cluster, best.model, now_s), rule, skips=best is not head)

    def _miss(self, cluster: Cluster, head: Entry, models: list[str], now_s: float) -> Placement | None:
        """Load a model that no GPU holds, unless a better place for it is about to be free.

        The one first that ends the most waiting per second of GPU time, its victims' reloads counted in.
        """
        options: list[_Line] = []
        most = -1.0  # of requests that have just come, where loads take no time, none is worth anything yet
        for line in _by_most_worth(cluster, models, now_s):
            if line.most_worth <= most or len(options) == MOST_PRICED:
                break
            line.load = load = self._cheapest_load(cluster, line.outlook, now_s)
            if load is not None:
                gpu_s = line.gpu_s + RELOAD_PRICE * load.price_s
                line.worth = worth = line.waiting_s / gpu_s if gpu_s else math.inf
                options.append(line)
                if worth > most:
                    most = worth
        if len(options) > 1:
            options.sort(key=_by_worth, reverse=True)
        for line in options:
            load = line.load
            if load is not None and not self._worth_putting_off(cluster, line.outlook, load, now_s):
                entry = cluster.queue.models[line.outlook.model][0]
                return Placement(entry, load.gpu, Rule.CHEAPEST_ROOM, False, entry is not head)
        return None

    def _worth_putting_off(self, cluster: Cluster, outlook: Outlook, load: _Load, now_s: float) -> bool:
        """Whether a busy GPU will soon make room for so much less that waiting for it is cheaper.

        One that others already wait for does not count: it will be theirs.
        """
        if not load.price_s or len(cluster.gpus) > MOST_GPUS or cluster.queues.several:
            # In a large cluster some GPU has cheap room at any time. Where there are other queues, their requests would
            # take this GPU meanwhile, and that one as well.
            return False
        lines, latest_s = cluster.queue.models.keys(), now_s + load.total_s
        for gpu in cluster.gpus.values():
            work = gpu.work
            if work is None or gpu.busy_until_s >= latest_s or work.model in lines:
                continue
            if lines.isdisjoint(gpu.memory.residents):
                other = _load_on(cluster, gpu, outlook, now_s)
                if other is not None and max(gpu.busy_until_s, now_s) + other.total_s < latest_s:
                    return True
        return False

    def _copy(
        self, cluster: Cluster, head: Entry, nowhere: list[str], held: list[str], now_s: float
    ) -> Placement | None:
        """Load one more copy of a model, for the first of its line whom no holder can start before the load is done.

        ``nowhere``: models waited for that no GPU holds; ``held``: those whose holders are all busy.
        """
        prices, gpu, lines = cluster.prices, next(iter(cluster.idle)), cluster.queue.models
        homeless = sum(len(lines[model]) for model in nowhere)
        busy = 1.0 - (len(cluster.idle) - 1) / len(cluster.gpus)
        gpu_time_price = GPU_TIME_PRICE * min(2.0 * busy, 1.0) * (1.0 + CROWDING * homeless / len(cluster.gpus))
        candidates: list[_Candidate] = []
        for model in held:
            line = lines[model]
            holder = cluster.earliest_holder(model)
            if holder is None:  # they are all idle
                skips = line[0] is not head
                return Placement(line[0], _most_spare_holder(cluster, model, now_s), Rule.HIT_ELSEWHERE, skips=skips)
            if cluster.is_spread(model):
                continue
            outlook = prices.outlook(model, gpu, now_s)
            load_s = _soonest_s(cluster, outlook)
            wait_s = _wait_for(cluster, holder, model, line[0], now_s)
            gain_s = prices.another_copy_s(gpu, model, now_s) - gpu_time_price * load_s
            if load_s == outlook.load_s:  # no idle GPU could restore it: from now on one can
                gain_s += prices.foothold_s(gpu, model, now_s)
            urgent_s, helped = 0.0, 1
            if len(line) > 1 or wait_s > load_s:
                inference_s = _each_s(cluster, outlook, gpu, len(line))
                saved_s, helped = saved_by_copy(len(line), wait_s, load_s, inference_s, outlook.copies)
                gain_s += saved_s
                if saved_s:
                    waited_s = now_s - line[0].since_s + wait_s
                    urgent_s = URGENCY * saved_s * waited_s / (load_s + inference_s or waited_s)
            if gain_s + urgent_s > 0.0:
                worth = (gain_s + urgent_s) / load_s if load_s else math.inf
                candidates.append(_Candidate(outlook, worth, gain_s, urgent_s, len(line) - helped, wait_s))
        for candidate in _best(candidates):
            load = self._cheapest_load(cluster, candidate.outlook, now_s)
            if load is None:
                continue
            urgent_s = candidate.urgent_s * (URGENT_SHARE if load.price_s else 1.0)
            if load.price_s < candidate.most_s + urgent_s:
                entry = lines[candidate.outlook.model][candidate.place]
                skips = entry is not head
                return Placement(entry, load.gpu, Rule.EXTRA_COPY, skips=skips, waited_s=candidate.wait_s)
        return None

    def _cheapest_load(self, cluster: Cluster, outlook: Outlook, now_s: float) -> _Load | None:
        """The idle GPU on which room for the model costs least; the one idle longest of equals."""
        if len(cluster.idle) == 1:
            gpu = next(iter(cluster.idle))
            if gpu.memory.copying is not None:
                return None
            cluster.prices.is_current(gpu)
            return _load_on(cluster, gpu, outlook, now_s)
        while True:
            best: _Load | None = None
            for gpu in islice(cluster.idle, MOST_GPUS):
                load = _load_on(cluster, gpu, outlook, now_s)
                if load is not None and (best is None or load.total_s < best.total_s):
                    best = load
            if best is None or cluster.prices.is_current(best.gpu):
                return best


def _load_on(cluster: Cluster, gpu: GpuState, outlook: Outlook, now_s: float) -> _Load | None:
    """What a load on that GPU would cost others; None: there is no way to make room, or none that they should pay."""
    memory, prices, price_s = gpu.memory, cluster.prices, 0.0
    known = cluster.models[outlook.model]
    if memory.copying is not None or (known.max_copies is not None and not cluster.fits(gpu, outlook.model)):
        return None
    missing_bytes = known.memory_bytes - memory.capacity_bytes + memory.used_bytes - memory.parked_bytes
    if missing_bytes > 0:
        room_s = cluster.cache.eviction.price_s(memory, missing_bytes, now_s)
        if room_s is None:
            return None
        price_s = room_s
    known_s = outlook.kind == gpu.kind and not memory.parked
    load_s = outlook.load_s if known_s else cluster.load_s(outlook.model, gpu)
    # Requests for the other residents that come meanwhile wait for half of the time, on average.
    busy_s = outlook.run_s if cluster.overlap else outlook.run_s + load_s
    typical_run_s = cluster.profiles.typical_inference_s()
    coming = prices.utilisation(gpu, now_s) * busy_s / typical_run_s if typical_run_s else 0.0
    total_s = price_s + BLOCKED * coming * busy_s / 2
    queues = cluster.queues
    if queues.contended and total_s > MOST_HARM * (load_s + outlook.run_s) and queues.sparing:
        return None
    if cluster.cache.host_memory_bytes and cluster.cache.parked_on(outlook.model):
        total_s += load_s  # it is not the same everywhere
    return _Load(gpu, price_s, total_s)


def _helped(cluster: Cluster, outlook: Outlook, line: Sequence[Entry], now_s: float) -> float:
    """Requests that one more load of a model, begun now, is in time for, those that come while it lasts included; none
    where its holders, all busy, will have served the line in time."""
    copies, load_s = outlook.copies, _soonest_s(cluster, outlook)
    if copies:
        holder, last_s = cluster.earliest_holder(outlook.model), line[-1].request.deadline_s
        if holder is None or last_s is None:  # it is on its way there
            return 0.0
        if max(holder.busy_until_s, now_s) + len(line) * outlook.run_s / copies <= last_s:
            return 0.0
    soonest_s = now_s + load_s + outlook.run_s
    newest = (entry.request.deadline_s for entry in islice(reversed(line), MOST_COUNTED))
    in_time = sum(deadline_s is None or deadline_s >= soonest_s for deadline_s in newest)
    return in_time + outlook.per_s * load_s / (copies + 1)


def _soonest_s(cluster: Cluster, outlook: Outlook) -> float:
    """Until an idle GPU could have the model: a restore, if it is parked on one of them."""
    for gpu_id in cluster.cache.parked_on(outlook.model):
        gpu = cluster.gpus[gpu_id]
        if gpu.work is None and gpu.memory.copying is None:
            return cluster.load_s(outlook.model, gpu)
    return outlook.load_s


def _look(cluster: Cluster) -> list[str]:
    """Of many models that are waited for, those that this decision considers."""
    queue, held = cluster.queue, cluster.cache.held
    models = list(islice(queue.models, MOST_LINES))
    queue.set_back([model for model in models if model in held])
    return models


def _by_most_worth(cluster: Cluster, models: list[str], now_s: float) -> list[_Line]:
    """Lines by what they would be worth were room free, best first; of equals the older one."""
    queued, gpu, prices = cluster.queue.models, next(iter(cluster.idle)), cluster.prices
    known, kind = prices.known, gpu.kind
    young_s = now_s + HEAD_START_LOADS * cluster.profiles.typical_load_s()
    parks, lines = cluster.cache.host_memory_bytes > 0, list[_Line]()
    for model in models:
        outlook = known.get(model)
        if outlook is None or now_s >= outlook.fresh_until_s or outlook.kind != kind:
            outlook = prices.outlook(model, gpu, now_s)
        line = queued[model]
        count = len(line)
        waiting_s = count * (young_s - line[0].since_s)
        load_s = _soonest_s(cluster, outlook) if parks else outlook.load_s
        each_s = _each_s(cluster, outlook, gpu, count) if outlook.batches else outlook.run_s
        gpu_s = load_s + count * each_s
        lines.append(_Line(outlook, waiting_s, gpu_s, waiting_s / gpu_s if gpu_s else math.inf))
    if len(lines) > 1:
        lines.sort(key=_most_worth, reverse=True)
    return lines


def _each_s(cluster: Cluster, outlook: Outlook, gpu: GpuState, count: int) -> float:
    """GPU time of each of so many requests; those of a model that batches share their runs."""
    return outlook.run_s if count == 1 or not outlook.batches else cluster.each_s(outlook.model, gpu, count)


def _best(candidates: list[_Candidate]) -> list[_Candidate]:
    """The few most worthy, best first; of equals the one whose line is older."""
    if len(candidates) > 1:
        candidates.sort(key=_by_worth, reverse=True)
        del candidates[2:]
    return candidates


def _wait_for(cluster: Cluster, holder: GpuState, model: str, entry: Entry, now_s: float) -> float:
    """Until a busy holder can start the request: what it does now, and older requests that it may be given first."""
    lines, copies = cluster.queue.models, cluster.cache.copies
    wait_s = max(holder.busy_until_s - now_s, 0.0)
    for other in holder.memory.residents:
        line = lines.get(other)
        if line is not None and other != model and line[0].seq < entry.seq:
            wait_s += cluster.inference_s(other, holder) / copies(other)
    return wait_s


def _most_spare_holder(cluster: Cluster, model: str, now_s: float) -> GpuState:
    """Of the idle holders the one whose models are asked for least, so that the others stay free for theirs."""
    best = cluster.idle_holder(model)
    assert best is not None
    holders = cluster.cache.holders(model)
    if len(holders) == 1 or len(cluster.idle) == 1:
        return best
    least = cluster.prices.utilisation(best, now_s)
    for gpu_id in islice(holders, MOST_GPUS):
        gpu = cluster.gpus[gpu_id]
        if gpu.work is None and gpu is not best:
            utilisation = cluster.prices.utilisation(gpu, now_s)
            if utilisation < least:
                best, least = gpu, utilisation
    return best
