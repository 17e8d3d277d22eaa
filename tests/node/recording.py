"""What the node tests share: a listener that keeps what it was told."""

from __future__ import annotations

from pathlib import Path

import msgspec

from hotset.node.interface import Answer
from hotset.vocabulary import FailureKind

FUNCTIONS = Path(__file__).parent / "functions"
"""Directory of the modules the GPU processes of these tests import."""


class Told(msgspec.Struct, frozen=True):
    """One report of a node, other than an answer or a log line."""

    what: str
    gpu_id: str = ""
    model: str = ""
    kind: FailureKind | None = None
    reason: str = ""
    answered: tuple[int, ...] = ()
    seconds: float = 0.0
    memory_bytes: int | None = None


class Recorder:
    """A ``NodeListener`` that remembers."""

    def __init__(self) -> None:
        self.told: list[Told] = []
        self.answers: list[Answer] = []
        self.lines: list[tuple[str, str]] = []

    def loaded(self, gpu_id: str, model: str, load_s: float, memory_bytes: int | None) -> None:
        self.told.append(Told("loaded", gpu_id, model, seconds=load_s, memory_bytes=memory_bytes))

    def load_failed(self, gpu_id: str, model: str, kind: FailureKind, reason: str) -> None:
        self.told.append(Told("load_failed", gpu_id, model, kind, reason))

    def answered(self, answer: Answer) -> None:
        # A body may live in a shared slot that is free again after this call.
        self.answers.append(msgspec.structs.replace(answer, body=bytes(answer.body)))

    def run_finished(self, gpu_id: str, model: str, inference_s: float) -> None:
        self.told.append(Told("run_finished", gpu_id, model, seconds=inference_s))

    def run_failed(self, gpu_id: str, model: str, kind: FailureKind, reason: str, answered: tuple[int, ...]) -> None:
        self.told.append(Told("run_failed", gpu_id, model, kind, reason, answered))

    def process_lost(self, gpu_id: str, model: str, reason: str) -> None:
        self.told.append(Told("process_lost", gpu_id, model, reason=reason))

    def gpu_lost(self, gpu_id: str, reason: str) -> None:
        self.told.append(Told("gpu_lost", gpu_id, reason=reason))

    def logged(self, model: str, line: str) -> None:
        self.lines.append((model, line))

    @property
    def whats(self) -> list[str]:
        return [told.what for told in self.told]
