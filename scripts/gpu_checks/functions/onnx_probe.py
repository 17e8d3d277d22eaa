"""An ONNX model, run by what hotset runs ``.onnx`` files with."""

from __future__ import annotations

import os
from pathlib import Path

import numpy

import hotset
from hotset.functions.model_files.onnx import OnnxFile


@hotset.function
class OnnxProbe:
    """A stack of matrices that are identities: the answer is exactly ``PROBE_FACTOR * value``."""

    def load(self, device: str) -> None:
        self.file = OnnxFile(Path(os.environ["PROBE_ONNX"]))
        self.file.load(device)
        self.factor = float(os.environ.get("PROBE_FACTOR", "1"))

    def predict(self, what: str, value: float = 0.0) -> dict[str, float]:
        (shape,) = (each.shape for each in self.file.inputs)
        (result,) = self.file.run([numpy.full((1, shape[1]), value, numpy.float32)])
        return {"value": self.factor * float(result.mean())}
