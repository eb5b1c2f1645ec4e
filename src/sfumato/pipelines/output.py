"""What a pipeline gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from sfumato.pipelines.request import Request

OutputType = Literal["pil", "pt", "latent"]
OUTPUT_TYPES = ("pil", "pt", "latent")


@dataclass(frozen=True)
class PipelineOutput:
    """Pictures and what each was made from.

    images:   PIL pictures ("pil"), a tensor (n, 3, H, W) in [0, 1] ("pt") or latents (n, C, h, w) ("latent").
    requests: one resolved request a picture, which makes the same picture again.
    """

    images: list[Image.Image] | Tensor
    requests: list[Request]


def joined(rows: Sequence[Tensor]) -> Tensor:
    """Pictures or latents of one size in one tensor; ValueError where they differ."""
    sizes = {tuple(row.shape[2:]) for row in rows}
    if len(sizes) > 1:
        raise ValueError(f"pictures of the sizes {sorted(sizes)} are no tensor; take output_type='pil', or one size")
    return torch.cat(list(rows))
