"""The statistics extension: what the inference requests of each model version took since the server's start.

Only v2 requests count here; ``/metrics`` counts every call.
"""

from __future__ import annotations

import time
from typing import Any

from hotset.gateway.calls import CallRecord


class _Counters:
    def __init__(self) -> None:
        self.succeeded = 0
        self.failed = 0
        self.succeeded_s = 0.0
        self.failed_s = 0.0
        self.queue_s = 0.0
        self.inference_s = 0.0
        self.last_unix_s = 0.0


class Statistics:
    """Counters by model and version."""

    def __init__(self) -> None:
        self._counters: dict[tuple[str, str], _Counters] = {}

    def observe(self, name: str, version: str, record: CallRecord) -> None:
        """Count a request that ended."""
        counters = self._counters.get((name, version))
        if counters is None:
            counters = self._counters[name, version] = _Counters()
        counters.last_unix_s = time.time()
        if record.status == 200:
            counters.succeeded += 1
            counters.succeeded_s += record.duration_s
            counters.queue_s += record.queue_s + record.load_s
            counters.inference_s += record.inference_s
        else:
            counters.failed += 1
            counters.failed_s += record.duration_s

    def of(self, name: str, version: str) -> dict[str, Any]:
        """One ``model_stats`` entry of the protocol; times are nanoseconds.

        Waiting for a load counts as queueing. Decoding and encoding happen in the worker and count as inference. How
        many requests shared a run is not known here: every request counts as an execution.
        """
        counters = self._counters.get((name, version)) or _Counters()
        done = counters.succeeded
        return {
            "name": name,
            "version": version,
            "last_inference": round(counters.last_unix_s * 1000),
            "inference_count": done,
            "execution_count": done,
            "inference_stats": {
                "success": _duration(done, counters.succeeded_s),
                "fail": _duration(counters.failed, counters.failed_s),
                "queue": _duration(done, counters.queue_s),
                "compute_input": _duration(done, 0.0),
                "compute_infer": _duration(done, counters.inference_s),
                "compute_output": _duration(done, 0.0),
                "cache_hit": _duration(0, 0.0),
                "cache_miss": _duration(0, 0.0),
            },
            "batch_stats": [],
        }


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": round(seconds * 1e9)}
