"""Loads of torch models whose tensors get to the GPU through the staging ring (``staging.py``).

A function's ``load`` does not know of the ring. While it runs, what torch copies from the CPU's memory to the GPU takes
that way: ``to`` and ``cuda`` of tensors and modules, and ``copy_`` into tensors that are on the GPU already, which is
what ``load_state_dict`` does with them. The copies are the same to the bit, and what the caller may expect of them too:
whoever did not ask for ``non_blocking`` finds the values there, on any stream. Whatever is more than plain memory, or
happens in a mode that changes what an operation means, goes the way it always did.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec

from hotset.node.worker.fast_load import prepare
from hotset.node.worker.replaced import replaced
from hotset.node.worker.staging import Copy, StagingRing, dense, is_gpu, process_ring, why_not_plain
from hotset.node.worker.tensor_files import MappedFile

LEAST_BYTES = 64 << 10
"""What is smaller, and moved by itself, is left to the driver, which takes so little at once."""
_Way = Callable[..., Any]


@contextlib.contextmanager
def staged_load(ring: Callable[[], StagingRing] = process_ring) -> Iterator[None]:
    """While the context is open, torch copies as described above, if it is imported. ``ring``: asked for the ring when
    there is something to copy."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    prepare()  # what it replaces stays when this is over
    moves, tensor, module = _Moves(ring), torch.Tensor, torch.nn.Module
    with contextlib.ExitStack() as patches:
        for owner, name, way in (
            (tensor, "to", moves.tensor_to),
            (tensor, "cuda", moves.tensor_cuda),
            (tensor, "copy_", moves.copy_into),
            (module, "to", moves.module_to),
            (module, "cuda", moves.module_cuda),
            (module, "load_state_dict", moves.many),
            (torch, "load", moves.many),
            (MappedFile, "get_tensors", moves.tensors_of_file),
        ):
            patches.enter_context(replaced(owner, name, way(getattr(owner, name))))
        yield


class _Wish(msgspec.Struct, frozen=True):
    """A move to the GPU."""

    dtype: Any = None
    non_blocking: bool = False


class _Here(threading.local):
    """What one thread is at."""

    def __init__(self) -> None:
        self.copying = False
        """These are the ring's own copies."""
        self.depth = 0
        """Of calls that move many tensors, and wait for the last."""
        self.unfinished = False
        self.ahead: dict[int, tuple[Any, Any]] = {}
        """Tensors of a module that is being moved, by their ids, each with its copy on the GPU."""


class _Moves:
    """What torch's functions do meanwhile; each method is given the original, and gives what takes its place."""

    def __init__(self, ring: Callable[[], StagingRing]) -> None:
        self._ring = ring
        self._here = _Here()

    def tensor_to(self, original: _Way) -> _Way:
        def to(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            wish = None if self._here.copying else _wish(*args, **kwargs)
            if wish is None or not _is_staged(tensor) or not self._worthwhile(tensor):
                return _as_ever(original, tensor, *args, **kwargs)
            return self._moved(tensor, wish)

        return to

    def tensor_cuda(self, original: _Way) -> _Way:
        def cuda(tensor: Any, device: Any = None, non_blocking: bool = False, **others: Any) -> Any:
            wish = _wish("cuda" if device is None else device, None, non_blocking, **others)
            if wish is None or not _is_staged(tensor) or not self._worthwhile(tensor):
                return _as_ever(original, tensor, device, non_blocking, **others)
            return self._moved(tensor, wish)

        return cuda

    def copy_into(self, original: _Way) -> _Way:
        torch = sys.modules["torch"]

        def copy_(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            source = args[0] if len(args) == 1 and kwargs.keys() <= {"non_blocking"} else None
            ours = not self._here.copying and isinstance(source, torch.Tensor) and _takes(tensor, source)
            if not ours or not self._worthwhile(source):
                return _as_ever(original, tensor, *args, **kwargs)
            self._copy([Copy(dense(tensor), dense(source))], kwargs.get("non_blocking", False))
            return tensor

        return copy_

    def module_to(self, original: _Way) -> _Way:
        def to(module: Any, *args: Any, **kwargs: Any) -> Any:
            with self._ahead(_of(module), _wish(*args, **kwargs)):
                return original(module, *args, **kwargs)

        return to

    def module_cuda(self, original: _Way) -> _Way:
        def cuda(module: Any, device: Any = None) -> Any:
            with self._ahead(_of(module), _wish("cuda" if device is None else device)):
                return original(module, device)

        return cuda

    def tensors_of_file(self, original: _Way) -> _Way:
        def get_tensors(file: MappedFile) -> Any:
            with self._ahead(file.tensors.values(), _wish(file.device)):
                return original(file)

        return get_tensors

    def many(self, original: _Way) -> _Way:
        def move(*args: Any, **kwargs: Any) -> Any:
            with self._together():
                return original(*args, **kwargs)

        return move

    @contextlib.contextmanager
    def _ahead(self, tensors: Iterable[Any], wish: _Wish | None) -> Iterator[None]:
        """Copy all of these at once; whoever then moves them one by one finds the copies. Those whose dtype changes are
        left to that: converted all at once, they would take their memory all at once."""
        torch = sys.modules["torch"]
        if wish is None:
            yield
            return
        with self._together():
            before = self._here.ahead
            with torch.no_grad():
                copied = {id(each): each for each in tensors if _is_staged(each) and not _converts(each, wish)}
                self._here.ahead = dict(zip(copied, self._copied(list(copied.values()), wish), strict=True))
            try:
                yield
            finally:
                self._here.ahead = before

    def _worthwhile(self, tensor: Any) -> bool:
        """Among many, a small one must not wait for the ring's copies, as torch's own copy would."""
        return self._here.depth > 0 or tensor.numel() * tensor.itemsize >= LEAST_BYTES

    def _moved(self, tensor: Any, wish: _Wish) -> Any:
        _, there = self._here.ahead.pop(id(tensor), (None, None))
        if there is None or _converts(tensor, wish):
            ((_, there),) = self._copied([tensor], wish)
        return there

    def _copied(self, tensors: Sequence[Any], wish: _Wish) -> list[tuple[Any, Any]]:
        """The tensors, each with its copy on the GPU. Raises what the device's allocator raises when there is no room,
        before anything is copied."""
        torch = sys.modules["torch"]
        if not tensors:
            return []
        with self._ours():
            sources = [each.detach().to(wish.dtype or each.dtype) for each in tensors]  # as torch does: on the CPU
            there = [self._ring().like(each) for each in sources]
            for index, (source, copy) in enumerate(zip(sources, there, strict=True)):
                if source.stride() != copy.stride():  # a part of something larger, or repeated
                    sources[index] = torch.empty_strided(copy.size(), copy.stride(), dtype=copy.dtype).copy_(source)
            copies = [Copy(dense(to), dense(source)) for to, source in zip(there, sources, strict=True)]
        self._copy(copies, wish.non_blocking)
        return list(zip(tensors, there, strict=True))

    def _copy(self, copies: Sequence[Copy], non_blocking: bool) -> None:
        with self._ours():
            self._ring().copy_in(copies)
        if self._here.depth:
            self._here.unfinished = True
        elif not non_blocking:
            self._ring().synchronize()

    @contextlib.contextmanager
    def _ours(self) -> Iterator[None]:
        self._here.copying = True
        try:
            yield
        finally:
            self._here.copying = False

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        self._here.depth += 1
        try:
            yield
        finally:
            self._here.depth -= 1
            if not self._here.depth and self._here.unfinished:
                self._here.unfinished = False
                self._ring().synchronize()


def _as_ever(original: _Way, *args: Any, **kwargs: Any) -> Any:
    """A mode or a tensor's own class is told of the original, which some compare it with: torch would look it up by its
    name, and find what takes its place."""
    overrides = sys.modules["torch"].overrides
    if overrides.has_torch_function(args):
        return overrides.handle_torch_function(original, args, *args, **kwargs)
    return original(*args, **kwargs)


def _of(module: Any) -> Iterator[Any]:
    yield from module.parameters()
    yield from module.buffers()


def _wish(device: Any = None, dtype: Any = None, non_blocking: bool = False, *more: Any, **others: Any) -> _Wish | None:
    """What ``to`` is asked for; None: more, or something else than to be moved to the GPU."""
    return None if more or others or not is_gpu(device) else _Wish(dtype, non_blocking)


def _converts(tensor: Any, wish: _Wish) -> bool:
    return wish.dtype not in (None, tensor.dtype)


def _is_staged(tensor: Any) -> bool:
    """Whether a tensor can be moved by copying its bytes."""
    torch = sys.modules["torch"]
    if why_not_plain(tensor) is not None or not tensor.is_cpu:
        return False
    if tensor.requires_grad and torch.is_grad_enabled():
        return False  # the move is part of what autograd follows
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def _takes(tensor: Any, source: Any) -> bool:
    """Whether a tensor on the GPU is filled by copying the source's bytes."""
    torch = sys.modules["torch"]
    if why_not_plain(tensor) is not None or not tensor.is_cuda or not _is_staged(source):
        return False
    if tensor.requires_grad and torch.is_grad_enabled():
        return False  # which refuses it
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return False  # torch refuses that too
    alike = tensor.dtype is source.dtype and tensor.shape == source.shape
    return alike and tensor.is_contiguous() and source.is_contiguous()
