"""Which frameworks a function needs. In a fork of the zygote they are there already, so that ``sys.modules`` does not
tell: what its import asks for does, and what that asked for when the zygote imported it."""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from hotset.node.worker.environment import FRAMEWORKS

_DOTTED = tuple(name for name in FRAMEWORKS if "." in name)
_asked: dict[str, set[str]] = {}
"""Package -> packages that it has imported while somebody watched."""


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """While the context is open, it is noted which package imports which."""
    original = builtins.__import__

    def note(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if not level:
            asked = _asked.setdefault(_package((globals or {}).get("__name__") or ""), set())
            asked.add(_package(name))
            asked.update(each for each in _DOTTED if each in {f"{name}.{part}" for part in fromlist or ()})
        return original(name, globals, locals, fromlist, level)

    builtins.__import__ = note
    try:
        yield
    finally:
        builtins.__import__ = original


def frameworks_of(module: str) -> tuple[str, ...]:
    """Those that a module which was imported under watch needs, directly or not, in the order of ``FRAMEWORKS``."""
    needed: set[str] = set()
    to_do = {_package(module)}
    while to_do:
        package = to_do.pop()
        needed.add(package)
        parent = package.partition(".")[0]
        to_do |= ({parent} | _asked.get(package, set())) - needed
    return tuple(name for name in FRAMEWORKS if name in needed and name in sys.modules)


def _package(module: str) -> str:
    """The framework that the module is part of, or else its first name."""
    return next((each for each in _DOTTED if f"{module}.".startswith(f"{each}.")), module.partition(".")[0])
