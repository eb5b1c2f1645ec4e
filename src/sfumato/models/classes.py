"""The condition of class-conditional latent diffusion: a learned vector for each class (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sfumato.models.config import read_config, write_config


@dataclass(frozen=True)
class ClassEmbedderConfig:
    """The entries of `class_embedder/config.json`.

    num_classes: vectors in the table; of the 1001 of the ImageNet model the last one, 1000, stands for no class.
    embed_dim: width of a vector, the U-Net's `cross_attention_dim`.
    """

    num_classes: int = 1001
    embed_dim: int = 512

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ClassEmbedderConfig:
        """Read the entries of a `config.json`; ValueError on an option that is not implemented."""
        return read_config(cls, raw, fixed={})

    def to_dict(self) -> dict[str, Any]:
        """The entries of a `config.json`."""
        return write_config(self, "ClassEmbedder")


class ClassEmbedder(nn.Module):
    """Class numbers (B,) to a context of one token each, (B, 1, D)."""

    def __init__(self, config: ClassEmbedderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.num_classes, config.embed_dim)

    def forward(self, labels: Tensor) -> Tensor:
        """The context of B classes; ValueError on a number that is not an integer of the table."""
        last = self.config.num_classes - 1
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(f"class labels {labels.dtype} of shape {tuple(labels.shape)}; give integers (B,)")
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high > last:
            raise ValueError(f"class label {low if low < 0 else high}; use 0 to {last}")
        return self.embedding(labels)[:, None]  # (B, 1, D)
