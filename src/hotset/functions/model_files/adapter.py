"""What serves one kind of model file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from hotset.functions.v2_types import TensorMetadata


class Adapter(ABC):
    """One model file. Made with its path; ``inputs`` and ``outputs`` may be asked for before ``load``.

    A name that the file does not tell is made up (``output_1``), and so is what ``typed`` says it does not tell.
    """

    platform: ClassVar[str]
    """What v2 metadata calls it."""
    torch: ClassVar[bool]
    """Tensors are torch's, not numpy's."""
    typed: ClassVar[bool]
    """The file tells datatypes and shapes; else only names, and any tensor is passed on as it comes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    @abstractmethod
    def inputs(self) -> Sequence[TensorMetadata]: ...

    @property
    @abstractmethod
    def outputs(self) -> Sequence[TensorMetadata]: ...

    def beside(self) -> Sequence[str]:
        """Names of the files that must stand beside this one."""
        return ()

    @abstractmethod
    def load(self, device: str) -> None:
        """Put the model on ``device`` (``cpu``, ``cuda:0``); raises ``FunctionError`` with what is missing."""

    @abstractmethod
    def run(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Inputs, in the order of ``inputs``, to outputs, in the order of ``outputs``.

        Raises ``InputError`` where it is the tensors that do not fit.
        """
