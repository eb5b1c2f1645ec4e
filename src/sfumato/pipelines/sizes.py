"""The numbers that Stable Diffusion XL is told beside the text: sizes, the crop, a score (Podell et al. 2023, 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sfumato.cond import Cond
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.unet import UNetConfig
from sfumato.pipelines.request import Request
from sfumato.presets import DenoiserConfig, Preset, TextConfig

AESTHETIC, UNAESTHETIC = 6.0, 2.5  # what a refiner is told unless somebody says other numbers
SIZES = ("original_size", "crops_coords_top_left", "target_size")
SCORES: Mapping[str, float] = MappingProxyType({"aesthetic_score": AESTHETIC, "negative_aesthetic_score": UNAESTHETIC})
SAID = (*SIZES, *(f"negative_{name}" for name in SIZES), *SCORES)
"""All fields of a request that are about them."""


def told(denoiser: DenoiserConfig, texts: Sequence[TextConfig]) -> int:
    """How many numbers a network is told: 6 are sizes and the crop, 5 have a score for the last two, 0 is none.

    Raises ValueError for another count, or a text tower without the vector that goes with them.
    """
    if not isinstance(denoiser, UNetConfig) or denoiser.addition_embed_type is None:
        return 0
    tower = texts[-1] if texts else None
    if not isinstance(tower, CLIPTextConfig) or not tower.projected:
        raise ValueError("this U-Net is told of sizes beside a text's vector, but its text encoder has no projection")
    wide, each = denoiser.projection_class_embeddings_input_dim, denoiser.addition_time_embed_dim
    assert wide is not None and each is not None
    count, rest = divmod(wide - tower.projection_dim, each)
    if rest or count not in (5, 6):
        raise ValueError(
            f"projection_class_embeddings_input_dim = {wide} leaves {wide - tower.projection_dim} beside the text's "
            f"{tower.projection_dim}; this U-Net is told 5 or 6 numbers, each {each} wide"
        )
    return count


def fields(preset: Preset) -> dict[str, Any]:
    """The fields of a request that a model is told of, with their defaults; None is the picture's own."""
    count = told(preset.denoiser, preset.texts)
    names = SIZES[: {0: 0, 5: 2, 6: 3}[count]]
    sizes = dict.fromkeys((*names, *(f"negative_{name}" for name in names)))
    return {**sizes, **SCORES} if count == 5 else sizes


def numbers(request: Request, count: int, size: tuple[int, int], negative: bool) -> Tensor:
    """The numbers for one picture, (1, count); size: height and width in pixels; negative: for the negative prompt."""

    def said(name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        other = getattr(request, f"negative_{name}") if negative else None
        return other or getattr(request, name) or default

    rows = [*said("original_size", size), *said("crops_coords_top_left", (0, 0))]
    if count == 6:
        return torch.tensor([[*rows, *said("target_size", size)]], dtype=torch.float32)
    name = "negative_aesthetic_score" if negative else "aesthetic_score"
    score = getattr(request, name)
    return torch.tensor([[*rows, SCORES[name] if score is None else score]], dtype=torch.float32)


def with_numbers(cond: Cond, row: Tensor) -> Cond:
    """A condition whose pooled text (B, P) is followed by some numbers (1, n)."""
    assert cond.pooled is not None
    rows = row.to(cond.pooled.device).expand(len(cond.pooled), -1)
    return Cond(cond.context, torch.cat([cond.pooled.float(), rows], dim=1), cond.concat)
