"""How a call that ended without a result looks in HTTP: the one table from ``RejectReason`` to status and body."""

from __future__ import annotations

import msgspec

from hotset.vocabulary import FailureKind, RejectReason

STATUS: dict[RejectReason, int] = {
    RejectReason.UNKNOWN_MODEL: 404,
    RejectReason.TOO_LARGE: 507,
    RejectReason.QUEUE_FULL: 429,
    RejectReason.DEADLINE: 504,
    RejectReason.HOPELESS: 504,
    RejectReason.QUARANTINED: 503,
    RejectReason.NO_GPU: 503,
    RejectReason.SHUTTING_DOWN: 503,
    RejectReason.REMOVED: 404,
    RejectReason.FAILED: 502,
}
"""TOO_LARGE is a model that fits no GPU (507, Insufficient Storage); a body over the limit is 413 and never a call."""

STATUS_OF_FAILURE: dict[FailureKind, int] = {FailureKind.HANG: 504, FailureKind.OUT_OF_MEMORY: 507}
"""In place of FAILED's, where the way a process failed has a status of its own."""

CLIENT_CLOSED = 499
"""Nobody reads it: the client left first. The figure that nginx logs for it, so dashboards know it."""

WAIT_BEFORE_RETRY_S: dict[RejectReason, float] = {
    RejectReason.QUEUE_FULL: 1.0,
    RejectReason.QUARANTINED: 5.0,
    RejectReason.NO_GPU: 5.0,
    RejectReason.SHUTTING_DOWN: 5.0,
}
"""``Retry-After`` when the scheduler named no time of its own; the reasons that are not here get no such header."""

_encoder = msgspec.json.Encoder()


def error_body(message: str, **details: object) -> bytes:
    """The body of every error response: ``{"error": "one sentence", ...}``."""
    return _encoder.encode({"error": message, **details})
