"""ONNX files, kept a second time as ONNX Runtime runs them: optimised, and with weights that are mapped as packed.

A session reads its file, optimises the graph and packs each weight for this CPU into memory of the process's own.
After a deploy, each large ``.onnx`` file of a bundle is written once more by ONNX Runtime itself, with its packed
weights in a file beside the graph, in a folder beside the bundle's (``converted.folder_of``). A session from that takes
half the time or less, and its weights are pages that all processes of the machine share. The copy stays unchecked, and
unused, until the outputs of the function's own sessions were found to be the same (``check.py``).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from hotset.node.worker.converted import MOST_FILES, folder_of, origin_of
from hotset.node.worker.memory import trim_heap

LEAST_BYTES = 16 << 20
"""Smaller files are read in no time."""
UNCHECKED = ".unchecked"
_ENDING = ".onnx"
_GRAPH, _WEIGHTS, _ORIGIN = "graph.onnx", "weights", "origin.json"
_CPU = "CPUExecutionProvider"
_LEAST_WEIGHT_BYTES = 1024
_COPIES = 2
"""Of the weights, as they are and packed: both are read from the disk, the packed ones stay mapped."""
_SPARE_MEMORY = 4
"""What making a session takes at most, in sizes of its file."""
_CPUINFO_BYTES = 8192
"""The first processor is in there."""


class Made(msgspec.Struct, frozen=True):
    """A session that a function made."""

    session: Any
    path: Any = None
    """Of the original, where it was made from a converted file."""
    mapped_bytes: int = 0
    """Of its weights; 0: they are the process's own memory."""


def weights_twin_of(path: str | os.PathLike[str], code_path: str) -> str | None:
    """The converted weights of a bundle's ONNX file, there or not; None: that is no such file."""
    twin = _twin_of(path, code_path)
    return None if twin is None else os.path.join(twin, _WEIGHTS)


def convert_sessions(code_path: str, most_bytes: int) -> list[str]:
    """Convert the bundle's large ONNX files, and name those it did; ``accept`` has them used.

    ``most_bytes``: memory that may be used. A converted file takes at most half of what the disk has free. One process
    at a time may do it for a bundle.
    """
    done: list[str] = []
    for path in sorted(Path(code_path).rglob(f"*{_ENDING}")):
        if not path.is_file() or len(done) == MOST_FILES:
            continue
        size = path.stat().st_size
        fits = _SPARE_MEMORY * size <= most_bytes and _COPIES * size <= shutil.disk_usage(path).free // 2
        if size >= LEAST_BYTES and fits:
            twin = Path(f"{_twin_of(path, code_path)}{UNCHECKED}")
            try:
                _convert(path, twin)
                done.append(os.path.relpath(path, code_path))
            except Exception:  # noqa: BLE001 - broken, or with operators of its own: the function's session says what it is
                shutil.rmtree(twin, ignore_errors=True)
    return done


def accept(code_path: str, names: Sequence[str], equal: Sequence[str]) -> None:
    """Use what was converted of the files that are ``equal`` from now on, and remove what was of the others."""
    for name in names:
        twin = os.path.join(folder_of(code_path), name)
        shutil.rmtree(twin, ignore_errors=True)  # of an earlier check of the same bundle
        if name in equal:
            os.rename(f"{twin}{UNCHECKED}", twin)
        else:
            shutil.rmtree(f"{twin}{UNCHECKED}", ignore_errors=True)


@contextlib.contextmanager
def watched_sessions(code_path: str, ending: str = "") -> Iterator[list[Made]]:
    """While the context is open, sessions are made of converted files where those can take the originals' place; gives
    the sessions made. ``code_path``: the function's bundle; "": all are made as ever. ``ending``: ``UNCHECKED`` for
    those that were not accepted yet."""
    made: list[Made] = []
    folder = folder_of(code_path) if code_path else ""
    if os.path.isdir(folder) and any(Path(folder).rglob(f"*{_ENDING}{ending}/{_ORIGIN}")):
        with contextlib.suppress(ImportError):
            import onnxruntime  # type: ignore[import-untyped]  # noqa: F401 - which the load would import
    kind = getattr(sys.modules.get("onnxruntime"), "InferenceSession", None)
    if kind is None:
        yield made
        return
    original = kind.__init__

    @functools.wraps(original)
    def initialise(
        session: Any, path_or_bytes: Any, sess_options: Any = None, providers: Any = None, *rest: Any, **kwargs: Any
    ) -> None:
        twin = None if rest or kwargs else _usable(path_or_bytes, code_path, ending, sess_options, providers)
        if twin is not None:
            with contextlib.suppress(Exception):  # whatever is wrong with it, the original is there
                original(session, os.path.join(twin, _GRAPH), sess_options, [_CPU], enable_fallback=0)
                session.enable_fallback()
                session._model_path = os.fspath(path_or_bytes)  # what set_providers makes it anew from
                trim_heap()  # it packs all the same, to compare: that memory is free, and kept without this
                made.append(Made(session, path_or_bytes, os.stat(path_or_bytes).st_size))
                return
        original(session, path_or_bytes, sess_options, providers, *rest, **kwargs)
        made.append(Made(session))

    kind.__init__ = initialise
    try:
        yield made
    finally:
        kind.__init__ = original


def sessions_difference(ours: Sequence[Made], theirs: Sequence[Made]) -> str | None:
    """What sessions of converted files answer that those of the originals do not; None: nothing. Inputs are made up, so
    any may be refused, by both."""
    if len(ours) != len(theirs):
        return f"it makes {len(ours)} ONNX sessions, the ordinary load {len(theirs)}"
    for one, other in zip(ours, theirs, strict=True):
        if not one.mapped_bytes:
            continue
        if _face(one.session) != _face(other.session):
            return "an ONNX session's inputs or outputs differ from the ordinary load's"
        feed = _made_up(other.session)
        answers, wanted = one.session.run(None, feed), other.session.run(None, feed)
        if any(_plain(answer) != _plain(each) for answer, each in zip(answers, wanted, strict=True)):
            return "an ONNX session's outputs differ from the ordinary load's"
    return None


def _convert(path: Path, twin: Path) -> None:
    import onnxruntime

    shutil.rmtree(twin, ignore_errors=True)
    twin.mkdir(parents=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # that it is for this machine only is known
    options.optimized_model_filepath = str(twin / _GRAPH)
    for key, value in {
        "session.optimized_model_external_initializers_file_name": _WEIGHTS,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(_LEAST_WEIGHT_BYTES),
        "session.save_external_prepacked_constant_initializers": "1",
    }.items():
        options.add_session_config_entry(key, value)
    origin = _origin(path)
    onnxruntime.InferenceSession(str(path), options, providers=[_CPU])
    (twin / _ORIGIN).write_text(json.dumps(origin))


def _twin_of(path: str | os.PathLike[str], code_path: str) -> str | None:
    if not code_path or not os.fspath(path).endswith(_ENDING):
        return None
    inside = os.path.relpath(path, code_path)
    return None if inside.startswith("..") else os.path.join(folder_of(code_path), inside)


def _usable(path: Any, code_path: str, ending: str, options: Any, providers: Any) -> str | None:
    """The folder of what the file was converted to, if a session of it is what is asked for."""
    twin = _twin_of(path, code_path) if isinstance(path, str | os.PathLike) else None
    if twin is None or not _on_cpu(providers) or not (options is None or _usual(options)):
        return None
    with contextlib.suppress(OSError, ValueError):
        if json.loads(Path(f"{twin}{ending}", _ORIGIN).read_text()) == _origin(path):
            return f"{twin}{ending}"
    return None


def _on_cpu(providers: Any) -> bool:
    """Of sessions that were told no provider, those on a GPU's machine may be anywhere."""
    if providers is None:
        available = sys.modules["onnxruntime"].get_available_providers()
        return set(available) <= {_CPU, "AzureExecutionProvider"}
    return list(providers) == [_CPU]


def _usual(options: Any) -> bool:
    level = sys.modules["onnxruntime"].GraphOptimizationLevel.ORT_ENABLE_ALL
    elsewhere = getattr(options, "has_providers", bool)()  # older ones cannot be told any
    return bool(options.graph_optimization_level == level and not options.optimized_model_filepath and not elsewhere)


def _origin(path: str | os.PathLike[str]) -> dict[str, str]:
    """What tells whether a converted file is of this original, and for this machine and ONNX Runtime."""
    return {**origin_of(path), "onnxruntime": sys.modules["onnxruntime"].__version__, "cpu": _cpu()}


@functools.cache
def _cpu() -> str:
    """The first processor's instructions: graphs are optimised and weights packed for them."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", "rb") as file:
        lines = file.read(_CPUINFO_BYTES).splitlines()
        known = [line for line in lines if line.startswith((b"flags", b"Features", b"model name"))]
        return hashlib.sha256(b"\n".join(sorted(set(known)))).hexdigest()
    return ""


def _face(session: Any) -> Any:
    tensors = [(each.name, each.shape, each.type) for each in (*session.get_inputs(), *session.get_outputs())]
    return tensors, session.get_modelmeta().custom_metadata_map


def _made_up(session: Any) -> dict[str, Any]:
    """One of everything that may vary in number; raises ``LookupError`` for what is neither number nor truth value."""
    import numpy as np

    kinds = {"float": "f4", "double": "f8", "float16": "f2", "bool": "?"}
    kinds.update({f"{sign}int{bits}": f"{sign or 'i'}{bits // 8}" for sign in ("", "u") for bits in (8, 16, 32, 64)})
    random = np.random.default_rng(0)
    return {
        each.name: random.random([n if isinstance(n, int) and n > 0 else 1 for n in each.shape])
        .round(0 if "int" in each.type else 6)
        .astype(kinds[each.type.removeprefix("tensor(").removesuffix(")")])
        for each in session.get_inputs()
    }


def _plain(answer: Any) -> Any:
    """Arrays by their bits: not numbers are equal where those are."""
    return (answer.dtype.str, answer.shape, answer.tobytes()) if hasattr(answer, "tobytes") else repr(answer)
