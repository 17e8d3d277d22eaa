"""What bench_transitions.py runs in GPU processes: a model that loads in the ordinary way, and the floors beside it.

Run there, a floor is measured in the same kind of process, with the same threads and imports, as what it bounds.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pickle  # noqa: TID251 - it reads what it wrote
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import hotset
from hotset.node.worker.slab import Slab
from hotset.node.worker.staging import Copy, StagingRing

SIZES = {"100": (512, 8, 2048), "500": (1024, 10, 4096), "1500": (1024, 30, 4096)}
"""Width, layers and width of the layers' middle, by megabytes of float32."""
PIECE = 8 << 20
PAGE_FLOATS = 1024


class Net(torch.nn.Module):
    def __init__(self, width: int, layers: int, middle: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(width, 8, middle, batch_first=True, dropout=0.0) for _ in range(layers)
        )

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            words = layer(words)
        return words


def touch(net: torch.nn.Module) -> float:
    """Read a float of every page."""
    return sum(float(each.detach().view(-1)[::PAGE_FLOATS].sum()) for each in net.parameters())


@hotset.function
class Encoder:
    """Loads as any function would. ``TOUCH``: read every page before the load counts as done."""

    def load(self, device: str) -> None:
        self.shape = SIZES[os.environ["SIZE"]]
        net = Net(*self.shape)
        net.load_state_dict(load_file(os.environ["WEIGHTS"]))
        self.net = net.eval().to(device)
        if os.environ.get("TOUCH"):
            touch(self.net)

    def predict(self) -> float:
        with torch.inference_mode():
            return float(self.net(torch.ones(1, 16, self.shape[0])).sum())


@hotset.function
class Nothing:
    """All of its load is the process."""

    def predict(self) -> int:
        return 0


class Plan:
    """All that can be done before a module is needed."""

    def __init__(self, size: str) -> None:
        with torch.device("meta"):
            skeleton = Net(*SIZES[size]).eval()
        self._pickled = pickle.dumps(skeleton)
        self._names = [
            (module_name, name, f"{module_name}.{name}" if module_name else name)
            for module_name, module in skeleton.named_modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    def seconds(self, path: str) -> float:
        """Of making the module."""
        begin_s = time.perf_counter()
        net = pickle.loads(self._pickled)  # noqa: S301 - its own
        views = _views(path)
        modules = dict(net.named_modules())
        for module_name, name, full_name in self._names:
            modules[module_name]._parameters[name] = torch.nn.Parameter(views[full_name], requires_grad=False)
        return time.perf_counter() - begin_s


@hotset.function
class Floors:
    """Each ``what`` answers seconds."""

    def load(self, device: str) -> None:
        self.plans: dict[str, Plan] = {}

    def predict(self, what: str, size: str, path: str) -> float:
        floor: Callable[[str, str], float] = getattr(self, what)
        return floor(size, path)

    def write(self, size: str, path: str) -> float:
        begin_s = time.perf_counter()
        state = Net(*SIZES[size]).state_dict()
        save_file({name: torch.rand(each.shape) / 64 for name, each in state.items()}, path)
        evict(path)  # from here on, what is in the page cache was read, not written
        return time.perf_counter() - begin_s

    def ordinary(self, size: str, path: str) -> float:
        """Initialise, then copy the weights in."""
        begin_s = time.perf_counter()
        net = Net(*SIZES[size])
        net.load_state_dict(load_file(path))
        return time.perf_counter() - begin_s

    def best(self, size: str, path: str) -> float:
        """The best known, in a process that goes on and on: unpickle a skeleton, map the file, bind views of it to
        parameters found beforehand."""
        plan = self._plan(size)
        plan.seconds(path)  # imports what unpickling needs
        return plan.seconds(path)

    def best_forked(self, size: str, path: str) -> float:
        """The same in a fork of its own, as every load of a model is: it pays for the first write to each page."""
        plan = self._plan(size)
        plan.seconds(path)
        reads, writes = os.pipe()
        pid = os.fork()
        if not pid:
            os.write(writes, b"%.9f" % plan.seconds(path))
            os._exit(0)
        os.waitpid(pid, 0)
        seconds = float(os.read(reads, 64))
        os.close(reads)
        os.close(writes)
        return seconds

    def _plan(self, size: str) -> Plan:
        if size not in self.plans:
            self.plans[size] = Plan(size)
        return self.plans[size]

    def disk(self, size: str, path: str, threads: int = 1) -> float:
        """A cold file into memory used before, in pieces of 8 MiB."""
        buffer = self._buffer(os.path.getsize(path))
        evict(path)
        begin_s = time.perf_counter()
        _read(path, memoryview(buffer), threads)
        return time.perf_counter() - begin_s

    def disk_by_four(self, size: str, path: str) -> float:
        """The same by four threads."""
        return self.disk(size, path, threads=4)

    def evict(self, size: str, path: str) -> float:
        """Not seconds: the share of the file that is still in the page cache afterwards."""
        evict(path)
        return resident_share(path)

    def copied(self, size: str, path: str) -> float:
        """A copy of so many bytes between two pieces of memory that were used before."""
        source, target = self._pair(path)
        begin_s = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - begin_s

    def copied_alone(self, size: str, path: str) -> float:
        """The same by one thread."""
        source, target = self._pair(path)
        begin_s = time.perf_counter()
        ctypes.memmove(target.data_ptr(), source.data_ptr(), len(source))
        return time.perf_counter() - begin_s

    def staged(self, size: str, path: str) -> float:
        """The host's part of such a copy to a CUDA GPU, by one thread: from its memory to the staging ring."""
        source, target = self._pair(path)
        ring = StagingRing(NoBus())
        begin_s = time.perf_counter()
        ring.copy_in([Copy(target, source)])
        return time.perf_counter() - begin_s

    def _pair(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        source = torch.ones(os.path.getsize(path), dtype=torch.uint8)
        return source, torch.frombuffer(self._buffer(source.numel()), dtype=torch.uint8)

    def _buffer(self, size_bytes: int) -> mmap.mmap:
        buffer = mmap.mmap(-1, size_bytes)
        buffer.madvise(mmap.MADV_HUGEPAGE)
        torch.frombuffer(buffer, dtype=torch.uint8).fill_(1)
        return buffer


class NoBus:
    """A ``CopyStream`` whose copies take no time, because nothing is copied: what is left is the host's part."""

    def pinned(self, size_bytes: int) -> Slab:
        slab = Slab(size_bytes, pinned=False)
        slab.tensor.fill_(1)  # pinned memory is there
        return slab

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        pass

    def event(self) -> NoBus:
        return self

    def synchronize(self) -> None:
        pass

    after_current = before_current = synchronize


def _views(path: str) -> dict[str, torch.Tensor]:
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    mapped.madvise(mmap.MADV_WILLNEED)
    (length,) = struct.unpack("<Q", mapped[:8])
    table: dict[str, Any] = json.loads(mapped[8 : 8 + length])
    table.pop("__metadata__", None)
    views = {}
    for name, entry in table.items():
        first, last = entry["data_offsets"]
        flat = torch.frombuffer(mapped, dtype=torch.float32, count=(last - first) // 4, offset=8 + length + first)
        views[name] = flat.view(entry["shape"])
    return views


def _read(path: str, into: memoryview, threads: int) -> None:
    size = os.path.getsize(path)
    share = -(-size // threads)

    def part(number: int) -> None:
        offset, end = number * share, min(size, (number + 1) * share)
        while offset < end:
            offset += os.preadv(descriptor, [into[offset : min(offset + PIECE, end)]], offset)

    descriptor = os.open(path, os.O_RDONLY)
    try:
        readers = [threading.Thread(target=part, args=(number,)) for number in range(threads)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    finally:
        os.close(descriptor)


def evict(path: str) -> None:
    """Out of this machine's page cache, as far as the system agrees; what lies below (a host, a disk's cache) keeps
    what it has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def resident_share(path: str) -> float:
    """Share of the file's pages that are in the page cache, as ``fincore`` counts them."""
    import ctypes

    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    pages = -(-size // mmap.PAGESIZE)
    held = (ctypes.c_ubyte * pages)()
    address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(mapped)))
    if ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(size), held):
        return 1.0
    return sum(each & 1 for each in held) / pages
