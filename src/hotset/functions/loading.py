"""From an entry (``"module:Class"``) and a code directory to the decorated object.

Importing runs the user's code: this happens in the function's own process, in ``hotset dev`` and in tests, never in
the gateway.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from hotset.errors import FunctionError
from hotset.functions.contract import options_of


def load_entry(code_path: str | Path, entry: str, *, reload: bool = False) -> Callable[..., Any]:
    """The decorated class or function that ``entry`` names in the directory ``code_path``.

    ``entry``: ``"module:Name"``, or ``"module"`` when the module holds exactly one decorated object. The directory is
    put first on ``sys.path``. ``reload``: forget what was imported from it before. Raises ``FunctionError`` for a
    module or name that is not there, not decorated, or not the only one; what the user's own code raises on import
    passes through, so that its traceback stays whole.
    """
    directory = Path(code_path).resolve()
    module_name, _, name = entry.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise FunctionError(f"entry {entry!r} is not module:Name; name a Python file without .py, such as app:Embed")
    module = _import(directory, module_name, reload)
    if not name:
        return _only_one(module)
    target = getattr(module, name, None)
    if target is None:
        raise FunctionError(f"{module_name} has no {name}; {_choice(module)}")
    if options_of(target) is None:
        raise FunctionError(f"{name} in {module_name} is no function yet; put @hotset.function above it")
    return target  # type: ignore[no-any-return]


def find_entry(file: str | Path) -> str:
    """``"module:Name"`` of the single decorated object in a Python file; imports it.

    Raises ``FunctionError`` when the file holds none or several, or is no Python file.
    """
    path = Path(file).resolve()
    if path.suffix != ".py" or not path.is_file():
        raise FunctionError(f"{path.name} is no Python file; name the .py file that holds the function")
    target = load_entry(path.parent, path.stem)
    return f"{path.stem}:{target.__name__}"


def functions_in(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """The decorated objects that a module defines itself (not those it imports), by name, in their order."""
    return {
        name: value
        for name, value in vars(module).items()
        if options_of(value) is not None and getattr(value, "__module__", None) == module.__name__
    }


def _import(directory: Path, module_name: str, reload: bool) -> ModuleType:
    if not directory.is_dir():
        raise FunctionError(f"{directory} is no directory; deploy the function again")
    if reload:
        for known, module in list(sys.modules.items()):
            if _lies_in(module, directory):
                del sys.modules[known]
        importlib.invalidate_caches()
    path = str(directory)
    if path in sys.path:
        sys.path.remove(path)
    sys.path.insert(0, path)
    # This directory's listing only: every other one that is known takes a fork of the zygote 2 ms to forget.
    sys.path_importer_cache.pop(path, None)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that the user's code misses is the user's error, with its traceback.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise FunctionError(f"no module {module_name} in {directory}; check the entry's name") from None
    if not _lies_in(module, directory):
        origin = getattr(module, "__file__", None) or "the interpreter itself"
        raise FunctionError(f"the name {module_name} already belongs to {origin}; rename the function's file")
    return module


def _lies_in(module: ModuleType, directory: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(directory)


def _only_one(module: ModuleType) -> Callable[..., Any]:
    found = list(functions_in(module).values())
    if len(found) != 1:
        raise FunctionError(f"{module.__name__}: {_choice(module)}")
    return found[0]


def _choice(module: ModuleType) -> str:
    names = list(functions_in(module))
    if not names:
        return "nothing in it is decorated; put @hotset.function above a class with predict or a plain function"
    return f"choose one of its functions with --entry: {', '.join(f'{module.__name__}:{name}' for name in names)}"
