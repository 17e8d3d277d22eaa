"""The error tree. Every message is one sentence that says what to do.

HotsetError
|-- ConfigurationError      a flag, file or label that cannot be honoured
|-- TraceError              a trace file that breaks its format (file, line, what was expected)
|-- UnknownNameError        a policy, eviction, preset, function or GPU nobody registered
|-- FunctionError           a function that breaks the function contract
|   `-- InputError          a request body that does not fit the function's signature (names the field)
|-- BundleError             a bundle that cannot be made, read or installed
|-- NodeError               a GPU process or device that failed
|   |-- OutOfMemoryError    a load or run that did not fit its GPU
|   `-- ProcessLostError    a GPU process that crashed or hung
|-- StoreError              a datastore that cannot be opened or written
`-- InvariantError          a bug in hotset itself: please report it
"""

from __future__ import annotations


class HotsetError(Exception):
    """Base of every error hotset raises on purpose; ``str(error)`` is fit to show to a user."""


class ConfigurationError(HotsetError):
    """A flag, configuration file or label that cannot be honoured."""


class TraceError(HotsetError):
    """A trace file that breaks its format."""

    def __init__(self, path: str, line: int, expected: str) -> None:
        super().__init__(f"{path}, line {line}: {expected}")
        self.path = path
        self.line = line
        self.expected = expected


class UnknownNameError(HotsetError):
    """A name that nothing is registered under."""

    def __init__(self, kind: str, name: str, known: tuple[str, ...] = ()) -> None:
        hint = f"; known: {', '.join(known)}" if known else ""
        super().__init__(f"unknown {kind} {name!r}{hint}")
        self.kind = kind
        self.name = name
        self.known = known


class FunctionError(HotsetError):
    """A function that breaks the function contract (docs/functions.md)."""


class InputError(FunctionError):
    """A request body that does not fit the function's signature; ``field`` is the path of the offending part."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}" if field else problem)
        self.field = field
        self.problem = problem


class BundleError(HotsetError):
    """A bundle that cannot be made, read or installed."""


class NodeError(HotsetError):
    """A GPU process or device that failed."""


class OutOfMemoryError(NodeError):
    """A load or a run that did not fit its GPU."""


class ProcessLostError(NodeError):
    """A GPU process that crashed or hung."""


class StoreError(HotsetError):
    """A datastore that cannot be opened or written."""


class InvariantError(HotsetError):
    """A broken invariant: a bug in hotset itself."""
