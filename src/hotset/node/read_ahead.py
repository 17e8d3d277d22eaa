"""Read a cold model's files while its request still waits for a GPU: by its turn they are in the page cache.

A disk gives a few GB/s at best, so a load from a cold file takes ten to a hundred times as long as one from the page
cache (docs/residency.md); the queue is when the disk has nothing else to do.

Which files: the large ones of the function's bundle, or what they were converted to, and what an earlier process of the
model had mapped.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import queue
import threading
from collections import OrderedDict
from pathlib import Path

from hotset.node.worker.converted import twin_of
from hotset.node.worker.converted_sessions import weights_twin_of

LEAST_BYTES = 1 << 20
"""Smaller files are read in no time."""
MOST_FILES = 64
MOST_MODELS = 4096
_POPULATE_READ = 22
"""``MADV_POPULATE_READ`` of ``madvise(2)``, which Python does not name."""
_NEVER = (".so", ".py", ".pyc")


class ReadAhead:
    """Owned by a node; its methods are cheap and called on the node's loop. One thread reads, file after file."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._seen: set[str] = set()
        """Models of which a process was looked at."""
        self._asked: set[str] = set()
        """Models that were asked for since they were last loaded."""
        self._queue: queue.SimpleQueue[tuple[str, ...] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.files_read = 0
        """That were not in the page cache."""

    def expect(self, model: str, code_path: str) -> None:
        """A request for this model waits, and the model is on no GPU: once until it is loaded, its files are read."""
        if model in self._asked:
            return
        self._asked.add(model)
        if model not in self._files:
            self._remember(model, large_files(Path(code_path)))
        twins = ((path, twin_of(path, code_path) or weights_twin_of(path, code_path)) for path in self._files[model])
        if files := tuple(twin if twin and os.path.exists(twin) else path for path, twin in twins):
            if self._thread is None:
                self._thread = threading.Thread(target=self._read, name="hotset-read-ahead", daemon=True)
                self._thread.start()
            self._queue.put(files)

    def loaded(self, model: str, code_path: str, pid: int) -> None:
        """It is in memory, in this process: what that has mapped will be wanted again."""
        self._asked.discard(model)
        if model not in self._seen:
            self._seen.add(model)
            bundle = large_files(Path(code_path))
            self._remember(model, (*bundle, *(path for path in mapped_files(pid) if path not in bundle)))

    def close(self) -> None:
        """Begin no further file."""
        self._queue.put(None)

    def _remember(self, model: str, files: tuple[str, ...]) -> None:
        self._files[model] = files[:MOST_FILES]
        self._files.move_to_end(model)
        if len(self._files) > MOST_MODELS:
            forgotten, _ = self._files.popitem(last=False)
            self._asked.discard(forgotten)
            self._seen.discard(forgotten)

    def _read(self) -> None:
        while (files := self._queue.get()) is not None:
            for path in files:
                with contextlib.suppress(OSError, ValueError):  # it is gone, or empty
                    self.files_read += read_cold(path)


def read_cold(path: str) -> bool:
    """Have the file in the page cache, in large pages where the file system has them; False: it is there already.

    Blocks for as long as the disk takes. Raises ``OSError`` or ``ValueError`` for what cannot be mapped.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    view = ctypes.c_char.from_buffer(mapped)
    try:
        address, size = ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(len(mapped))
        held = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        if libc.mincore(address, size, held) == 0 and all(each & 1 for each in held):
            return False
        with contextlib.suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)
        if libc.madvise(address, size, _POPULATE_READ):  # Linux before 5.14
            mapped.madvise(mmap.MADV_WILLNEED)
        return True
    finally:
        del view
        mapped.close()


def large_files(folder: Path) -> tuple[str, ...]:
    """Of a bundle, largest first."""
    sizes: dict[str, int] = {}
    for directory, _, names in os.walk(folder):
        for name in names:
            if not name.endswith(_NEVER):
                path = os.path.join(directory, name)
                with contextlib.suppress(OSError):
                    sizes[path] = os.stat(path).st_size
    return tuple(sorted((path for path, size in sizes.items() if size >= LEAST_BYTES), key=lambda path: -sizes[path]))


def mapped_files(pid: int) -> tuple[str, ...]:
    """Large files that a process has mapped, other than its libraries; none of one that is gone."""
    sizes: dict[str, int] = {}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/") and ".so" not in fields[5] and "x" not in fields[1]:
                first, last = (int(each, 16) for each in fields[0].split("-"))
                sizes[fields[5]] = sizes.get(fields[5], 0) + last - first
    return tuple(path for path, size in sizes.items() if size >= LEAST_BYTES and os.path.isfile(path))
