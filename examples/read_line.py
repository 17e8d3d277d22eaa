"""Reads one line of printed text from an image (PP-OCRv6, the recognition half of an OCR system)."""

from dataclasses import dataclass
from importlib.metadata import distribution

import numpy as np
import onnxruntime
from PIL import Image

import hotset

HEIGHT = 48  # pixels: the network reads lines of this height and any width
BLANK = 0  # the class that means "no new letter here"


@dataclass
class Line:
    """The text and the lowest probability of its letters, 0 to 1."""

    text: str
    confidence: float


@hotset.function(gpu_memory="60MiB", timeout="30s")
class ReadLine:
    """The text in an image of a single line."""

    def load(self, device: str) -> None:
        weights = distribution("rapidocr").locate_file("rapidocr/models/PP-OCRv6_rec_small.onnx")
        provider = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
        self.session = onnxruntime.InferenceSession(str(weights), providers=[provider])
        letters = self.session.get_modelmeta().custom_metadata_map["character"].splitlines()
        self.letters = ["", *letters, " "]

    def predict(self, image: Image.Image) -> Line:
        width = max(HEIGHT, round(image.width * HEIGHT / image.height))
        rgb = np.asarray(image.convert("RGB").resize((width, HEIGHT)), dtype=np.float32)
        x = (rgb[..., ::-1] / 127.5 - 1).transpose(2, 0, 1)[None]  # trained on BGR
        steps = self.session.run(None, {self.session.get_inputs()[0].name: x})[0][0]  # position x letter
        best = steps.argmax(axis=1)
        # CTC: of a run of equal letters keep the first, then drop the blanks.
        keep = (best != BLANK) & (best != np.concatenate([[BLANK], best[:-1]]))
        text = "".join(self.letters[i] for i in best[keep])
        return Line(text, float(steps.max(axis=1)[keep].min(initial=1.0)))
