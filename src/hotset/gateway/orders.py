"""From what the scheduler decides to what a node is asked for, noted down on the calls and counters it concerns."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hotset.gateway.calls import PendingCall
from hotset.gateway.functions import Functions, Version
from hotset.node.interface import Call, Node
from hotset.scheduling.actions import Action, Load, Offload, Restore, Run, Unload


class Orders:
    """Carries out the control loop's actions, all but rejections.

    ``calls`` and ``node_of`` (by request id and by GPU id) are the control loop's own, as is ``now_s``.
    """

    def __init__(
        self,
        calls: Mapping[int, PendingCall],
        functions: Functions,
        node_of: Mapping[str, Node],
        now_s: Callable[[], float],
    ) -> None:
        self._calls = calls
        self._functions = functions
        self._node_of = node_of
        self._now_s = now_s

    def carry_out(self, action: Action) -> None:
        if type(action) is Run:
            self._run(action)
        elif type(action) is Load:
            self._load(action)
        elif type(action) is Unload:
            self._unload(action)
        elif type(action) is Offload:
            self._offload(action)
        elif type(action) is Restore:
            self._restore(action)

    def expect(self, version: Version) -> None:
        """A call of it waits, and no GPU has it or loads it: where it may come to, its files are got ready."""
        for node in dict.fromkeys(self._node_of.values()):
            node.expect(version.spec.launch)

    def _run(self, action: Run) -> None:
        now_s = self._now_s()
        gpu_id, hit = action.gpu_id, action.hit
        calls: list[Call] = []
        for request_id in action.request_ids:
            pending = self._calls.get(request_id)
            if pending is not None:
                pending.run_begins(gpu_id, hit, now_s)
                pending.version.metrics.hits += hit
                calls.append(pending.call)
            hit = True  # the ones that join a load's first run found the model there
        self._node_of[gpu_id].run(gpu_id, action.model, calls)

    def _load(self, action: Load) -> None:
        version = self._functions.versions[action.model]
        if action.request_id is not None:
            version.metrics.misses += 1
            version.metrics.false_misses += action.false_miss
            pending = self._calls.get(action.request_id)
            if pending is not None:
                pending.load_begins(action.gpu_id, self._now_s())
        self._node_of[action.gpu_id].load(action.gpu_id, version.spec.launch)

    def _restore(self, action: Restore) -> None:
        version = self._functions.versions.get(action.model)
        if version is not None:
            version.metrics.restores += 1
        pending = None if action.request_id is None else self._calls.get(action.request_id)
        if pending is not None:
            pending.load_begins(action.gpu_id, self._now_s(), warm=True)
        self._node_of[action.gpu_id].restore(action.gpu_id, action.model)

    def _offload(self, action: Offload) -> None:
        version = self._functions.versions.get(action.model)
        if version is not None:
            version.metrics.offloads += 1
        self._node_of[action.gpu_id].offload(action.gpu_id, action.model)

    def _unload(self, action: Unload) -> None:
        version = self._functions.versions.get(action.model)
        if version is not None:
            version.metrics.evictions += 1
        self._node_of[action.gpu_id].unload(action.gpu_id, action.model)
