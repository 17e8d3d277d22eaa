"""Who makes a call, and what he may have: by the key that the call shows, else by a header that the operator trusts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from hotset.vocabulary import HIGHEST_PRIORITY, LOWEST_PRIORITY, NORMAL_PRIORITY

if TYPE_CHECKING:
    from hotset.gateway.auth import ApiKeys

PRIORITY = b"x-hotset-priority"
LONGEST_NAME = 63


class Caller(msgspec.Struct, frozen=True, gc=False):
    """As the scheduler sees the caller of one call (``scheduling/fairness.py``)."""

    name: str = ""
    """Empty: nobody in particular."""
    weight: float = 1.0
    priority: int = NORMAL_PRIORITY


NOBODY = Caller()


class CallerError(Exception):
    """A call does not say rightly who makes it, or how urgently; the message is one sentence for the caller."""


class Callers:
    """Tells callers apart. Where there are no keys and no header is trusted, everybody is ``NOBODY``."""

    def __init__(self, keys: ApiKeys | None = None, header: str = "") -> None:
        """``header``: names the caller where no key does; anybody may write it, so it must come from a proxy."""
        self._keys = keys
        self._header = header.lower().encode("latin-1")

    def of(self, headers: Mapping[bytes, bytes]) -> Caller:
        """The caller of a call with these headers (lower case); raises ``CallerError``."""
        caller = NOBODY
        if self._keys and (record := self._keys.record(shown_key(headers))) is not None:
            caller = Caller(record.name, record.weight, record.priority)
        elif self._header and (name := headers.get(self._header)):
            if len(name) > LONGEST_NAME:
                raise CallerError(f"a caller's name has {LONGEST_NAME} characters at most")
            caller = Caller(name.decode("latin-1"))
        asked = headers.get(PRIORITY)
        return caller if asked is None else at_priority(caller, asked.decode("latin-1"))


def at_priority(caller: Caller, asked: str) -> Caller:
    """The caller of a call that asks for a priority: it is his, up to what he may have. Raises ``CallerError``."""
    try:
        priority = int(asked)
    except ValueError:
        priority = HIGHEST_PRIORITY + 1
    if not LOWEST_PRIORITY <= priority <= HIGHEST_PRIORITY:
        raise CallerError(f"a priority is a whole number from {LOWEST_PRIORITY} to {HIGHEST_PRIORITY}")
    return msgspec.structs.replace(caller, priority=min(priority, caller.priority))


def shown_key(headers: Mapping[bytes, bytes]) -> bytes:
    """The API key that a request shows; empty: none."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
