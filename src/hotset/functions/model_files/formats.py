"""Which kind of model a file is, told by its content; its name only chooses among those that look alike."""

from __future__ import annotations

import zipfile
from pathlib import Path

from hotset.errors import FunctionError
from hotset.functions.model_files.adapter import Adapter
from hotset.functions.model_files.onnx import OnnxFile
from hotset.functions.model_files.torch_files import (
    ExportedFile,
    PickledFile,
    SafetensorsFile,
    TorchScriptFile,
    pickle_refusal,
)

SUFFIXES = (".onnx", ".pt", ".pt2", ".pth", ".pkl", ".ts", ".safetensors")
"""Files that ``hotset deploy`` takes for models."""


def open_file(path: Path, *, module: str | None = None, trust_pickle: bool = False) -> Adapter:
    """The adapter for a model file; the file is looked at, not loaded.

    ``module``: ``FILE.py:CLASS``, the class of safetensors. ``trust_pickle``: pickles are allowed to run their code.
    Raises ``FunctionError``: not there, not a model, or a pickle that nobody said to trust.
    """
    if not path.is_file():
        raise FunctionError(f"{path.name} is not there: give the path of a model file")
    if path.suffix == ".safetensors":
        if module is None:
            raise FunctionError(
                f"{path.name} holds weights alone: name the class they belong to (--module FILE.py:CLASS)"
            )
        return SafetensorsFile(path, module=module)
    if module is not None:
        raise FunctionError(f"{path.name} brings its own code: leave out --module, which is for .safetensors")
    if path.suffix == ".onnx":
        return OnnxFile(path)
    if path.suffix not in SUFFIXES:
        raise FunctionError(f"{path.name} is no model file: the kinds are {', '.join(SUFFIXES)}")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inside = {name.partition("/")[2] for name in archive.namelist()}
        if "archive_format" in inside and any(name.startswith("models/") for name in inside):
            return ExportedFile(path, trust_pickle=trust_pickle)
        if "constants.pkl" in inside and any(name.startswith("code/") for name in inside):
            return TorchScriptFile(path)
    if path.suffix == ".pt2":
        raise FunctionError(
            f"{path.name} was not saved by torch.export.save, or by one that is too old: export it again"
        )
    if not trust_pickle:
        raise pickle_refusal(path)
    return PickledFile(path)
