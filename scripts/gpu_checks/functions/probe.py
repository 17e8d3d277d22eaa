"""The functions that the checks run in GPU processes. They import torch at once, as most users' modules do."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import hotset
from hotset.node.worker.fast_load import fast_load
from hotset.node.worker.replaced import replaced
from hotset.node.worker.residency import Weights
from hotset.node.worker.slab import Slab, forget_last_error
from hotset.node.worker.staged_load import staged_load
from hotset.node.worker.staging import CudaStream, StagingRing, process_ring

MIB = 1 << 20
WIDTH = 1024
LAYER_BYTES = 4 * WIDTH * WIDTH
REPETITIONS = 7
SQUARE = 4096

Figures = dict[str, float | str]


@hotset.function
class Probe:
    """A stack of linear layers, loaded from a safetensors file, that answers questions about its process."""

    def load(self, device: str) -> None:
        weights = load_file(os.environ["PROBE_WEIGHTS"])
        self.device = device
        self.model = _stack(weights).eval().to(device)
        self.factor = float(os.environ.get("PROBE_FACTOR", "1"))
        self.kept: list[torch.Tensor] = []

    def predict(self, what: str, value: float = 0.0) -> Figures:
        questions: dict[str, Callable[[float], Figures]] = {
            "scale": self.scale,
            "device": self.describe_device,
            "workspace": self.workspace,
            "release": self.release,
            "hoard": self.hoard,
            "fault": self.fault,
        }
        return questions[what](value)

    def scale(self, value: float) -> Figures:
        """The layers are identities: the answer is exactly ``factor * value``, on any device."""
        with torch.inference_mode():
            result = self.model(torch.full((1, WIDTH), value, device=self.device))
        return {"value": self.factor * float(result.mean()), "parent": float(os.getppid()), "pid": float(os.getpid())}

    def describe_device(self, _: float) -> Figures:
        properties = torch.cuda.get_device_properties(0)
        free_bytes, total_bytes = torch.cuda.mem_get_info(0)
        return {
            "name": properties.name,
            "uuid": str(getattr(properties, "uuid", os.environ.get("CUDA_VISIBLE_DEVICES", ""))),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
            "torch": torch.__version__,
            "cuda": str(torch.version.cuda),
            "visible": float(torch.cuda.device_count()),
            "free_bytes": float(free_bytes),
            "total_bytes": float(total_bytes),
            **self._allocated(),
        }

    def workspace(self, mib: float) -> Figures:
        """Take so much, as a large batch would, and let go of it."""
        torch.cuda.reset_peak_memory_stats()
        temporary = torch.ones(int(mib) * MIB, dtype=torch.uint8, device=self.device)
        torch.cuda.synchronize()
        del temporary
        return {"peak_bytes": float(torch.cuda.max_memory_allocated()), **self._allocated()}

    def release(self, _: float) -> Figures:
        torch.cuda.empty_cache()
        return self._allocated()

    def hoard(self, mib: float) -> Figures:
        """Take more than there is."""
        self.kept.append(torch.ones(int(mib) * MIB, dtype=torch.uint8, device=self.device))
        return {}

    def fault(self, _: float) -> Figures:
        """Poison the CUDA context: an index out of range stops a kernel with a device-side assert."""
        if self.device == "cpu":
            raise RuntimeError("CUDA error: device-side assert triggered (raised by hand: there is no CUDA here)")
        table = torch.zeros(4, 8, device=self.device)
        index = torch.tensor([1 << 20], device=self.device)
        return {"value": float(torch.nn.functional.embedding(index, table).sum())}

    def _allocated(self) -> Figures:
        return {
            "allocated_bytes": float(torch.cuda.memory_allocated()),
            "reserved_bytes": float(torch.cuda.memory_reserved()),
        }


@hotset.function
class Keeper:
    """Holds tensors in the ways that functions do, and tells whether they are still what they were."""

    def load(self, device: str) -> None:
        self.device = device
        self.linear = torch.nn.Linear(8, 8, bias=False, device=device)
        self.tied = self.linear.weight
        self.norm = torch.nn.BatchNorm1d(8, device=device).eval()
        self.half = torch.arange(64, device=device).half()
        self.row = self.half[8:16]
        self.turned = torch.arange(12, device=device).view(3, 4).t()
        with torch.inference_mode():
            self.cache = torch.zeros(4, device=device)
        self.graph: Any = None
        self.known = self._state()

    def predict(self, what: str, value: float = 0.0) -> Figures:
        if what == "capture":
            return self.capture()
        if what == "refused":
            return self.refused()
        with torch.inference_mode():
            self.cache.add_(1)
            counted = float(self.cache.sum()) / 4
        same = all(map(torch.equal, self.known, self._state()))
        shared = self.tied is self.linear.weight and self.row.data_ptr() == self.half[8:].data_ptr()
        return {"calls": counted, "same": float(same), "shared": float(shared)}

    def capture(self) -> Figures:
        """Capture a CUDA graph, as ``torch.compile`` does with ``mode="reduce-overhead"``."""
        self.graph = torch.cuda.CUDAGraph()
        numbers = torch.ones(8, device=self.device)
        with torch.cuda.graph(self.graph):
            self.kept = numbers * 2
        self.graph.replay()
        torch.cuda.synchronize()
        return {"value": float(self.kept.sum())}

    def refused(self) -> Figures:
        """Memory that is pinned already is refused; no later kernel may be told of it."""
        runtime, slab = torch.cuda.cudart(), Slab(MIB, pinned=True)
        address = slab.tensor.data_ptr()
        code = int(runtime.cudaHostRegister(address, MIB, 0))  # type: ignore[attr-defined]
        forget_last_error()
        value = float(torch.ones(8, device=self.device).sum())
        slab.close()
        return {"code": float(code), "value": value}

    def _state(self) -> list[torch.Tensor]:
        held = (self.linear.weight, self.norm.running_var, self.half, self.row, self.turned)
        return [each.detach().cpu().clone() for each in held if each is not None]


@hotset.function
class Greedy:
    """Wants ``GREEDY_BYTES`` of its device when it loads."""

    def load(self, device: str) -> None:
        self.weights = torch.ones(int(os.environ["GREEDY_BYTES"]), dtype=torch.uint8, device=device)

    def predict(self) -> int:
        return self.weights.numel()


@hotset.function
class Copies:
    """Measures copies between host and device; rates are medians."""

    def load(self, device: str) -> None:
        self.device = device

    def predict(self, what: str, value: float = 0.0) -> Figures:
        questions = {"bandwidth": self.bandwidth, "staging": self.staging, "overlap": self.overlap}
        return questions[what](int(value))

    def bandwidth(self, mib: int) -> Figures:
        """Plain copies, and what parking does: storage by storage to host memory and back, device memory given back."""
        size_bytes = mib * MIB
        rates = self._plain_rates(size_bytes)
        weights = Weights([torch.ones(WIDTH, WIDTH, device=self.device) for _ in range(size_bytes // LAYER_BYTES)])
        ring = process_ring()
        taken_s: dict[str, list[float]] = {"offload": [], "restore": []}
        for _ in range(REPETITIONS):
            slab = Slab(weights.size_bytes, pinned=False)
            taken_s["offload"].append(_once(lambda slab=slab: weights.leave(slab.tensor, ring)))
            taken_s["restore"].append(_once(lambda slab=slab: weights.come_back(slab.tensor, ring)))
            slab.close()
        rates["pinned_bytes"] = float(ring.pinned_bytes)
        return rates | {f"{name}_gb_per_s": size_bytes / median(taken) / 1e9 for name, taken in taken_s.items()}

    def staging(self, mib: int) -> Figures:
        """A module whose weights are a file's mapped pages gets to the device: through the ring, without it, by one of
        another shape; then it is parked and restored. What is pinned for that counts from the second time on."""
        rates = self._plain_rates(mib * MIB)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights.safetensors"
            known = [torch.randn(WIDTH, WIDTH) for _ in range(mib * MIB // LAYER_BYTES)]
            save_file({f"{number}.weight": each for number, each in enumerate(known)}, path)
            large = StagingRing(CudaStream(), threads=torch.get_num_threads(), buffers=2, buffer_bytes=64 * MIB)
            ways = {
                "load": staged_load,
                "mapped": contextlib.nullcontext,
                "load_2x64": lambda: staged_load(lambda: large),
            }
            taken_s: dict[str, list[float]] = {name: [] for name in ways}
            equal = True
            pinned: list[int] = []
            with _pins() as pins:
                for number in range(REPETITIONS + 1):
                    if number == 1:
                        pins.clear()
                    for name, way in ways.items():
                        with fast_load(), way():
                            model = _stack(load_file(path))
                            taken_s[name].append(_once(lambda model=model: model.to(self.device)))
                        equal = equal and all(map(torch.equal, [each.cpu() for each in model.parameters()], known))
                    weights = Weights(list(model.parameters()))
                    slab = Slab(weights.size_bytes, pinned=False)
                    weights.leave(slab.tensor, process_ring())
                    weights.come_back(slab.tensor, process_ring())
                    slab.close()
                    equal = equal and all(map(torch.equal, [each.cpu() for each in model.parameters()], known))
                    pinned.append(process_ring().pinned_bytes)
        rates |= {f"{name}_gb_per_s": mib * MIB / median(taken[1:]) / 1e9 for name, taken in taken_s.items()}
        changed_bytes = max(pinned) - min(pinned)
        figures = {"equal": equal, "pins": len(pins), "pinned_bytes": pinned[0], "pinned_changed_bytes": changed_bytes}
        return rates | {name: float(value) for name, value in figures.items()}

    def _plain_rates(self, size_bytes: int) -> Figures:
        """On the bus, and of memcpy on the host: between memory that was used before, and to what was not."""
        pageable = torch.ones(size_bytes, dtype=torch.uint8)
        pinned = torch.ones(size_bytes, dtype=torch.uint8).pin_memory()
        on_device = torch.empty(size_bytes, dtype=torch.uint8, device=self.device)

        def to_fresh() -> None:
            slab = Slab(size_bytes, pinned=False)
            slab.tensor.copy_(pinned)
            slab.close()

        return {
            "pageable_gb_per_s": _rate(size_bytes, lambda: on_device.copy_(pageable)),
            "pinned_gb_per_s": _rate(size_bytes, lambda: on_device.copy_(pinned, non_blocking=True)),
            "to_pinned_gb_per_s": _rate(size_bytes, lambda: pinned.copy_(on_device, non_blocking=True)),
            "memcpy_gb_per_s": _rate(size_bytes, lambda: pinned.copy_(pageable)),
            "to_fresh_gb_per_s": _rate(size_bytes, to_fresh),
        }

    def overlap(self, mib: int) -> Figures:
        """A copy on a stream of its own while the default stream computes about as long."""
        pinned = torch.ones(mib * MIB, dtype=torch.uint8).pin_memory()
        on_device = torch.empty(mib * MIB, dtype=torch.uint8, device=self.device)
        square = torch.ones(SQUARE, SQUARE, device=self.device)
        product = torch.empty_like(square)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]

        def copy() -> None:
            with torch.cuda.stream(side):
                on_device.copy_(pinned, non_blocking=True)

        def compute(times: int) -> None:
            for _ in range(times):
                torch.matmul(square, square, out=product)

        copy_s, once_s = _seconds(copy), _seconds(lambda: compute(1))
        times = max(1, round(copy_s / once_s))
        compute_s = _seconds(lambda: compute(times))

        def both() -> None:
            copy()
            compute(times)

        overlapped_s = _seconds(both)
        return {
            "copy_s": copy_s,
            "compute_s": compute_s,
            "overlapped_s": overlapped_s,
            "ratio": (copy_s + compute_s) / overlapped_s,
        }


def _stack(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in weights))
    model.load_state_dict(weights)
    return model


@contextlib.contextmanager
def _pins() -> Iterator[list[int]]:
    """The sizes of what is pinned while the context is open."""
    sizes: list[int] = []
    original = Slab.__init__

    def init(slab: Slab, size_bytes: int, *, pinned: bool) -> None:
        if pinned:
            sizes.append(size_bytes)
        original(slab, size_bytes, pinned=pinned)

    with replaced(Slab, "__init__", init):
        yield sizes


def _rate(size_bytes: int, action: Callable[[], Any]) -> float:
    return size_bytes / _seconds(action) / 1e9


def _seconds(action: Callable[[], Any]) -> float:
    """Median time until the device is done; the first time, which also warms up, is not counted."""
    return median([_once(action) for _ in range(REPETITIONS + 1)][1:])


def _once(action: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    begin_s = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - begin_s
