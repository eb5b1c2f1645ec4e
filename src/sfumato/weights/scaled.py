"""8-bit weights with a scale beside them, as ComfyUI writes them: the weight is the 8-bit number times the scale.

| name                          | what it is                                                     |
|-------------------------------|----------------------------------------------------------------|
| X.weight                       | float8_e4m3fn or float8_e5m2                                   |
| X.scale_weight, X.weight_scale | its scale, in the older and the newer spelling: one number, or one a row |
| X.scale_input, X.input_scale   | for multiplying in 8 bits, which is not done here              |
| X.comfy_quant                  | the newer files' note on the format                            |
| scaled_fp8                     | the older files' mark, after the prefix of the denoiser        |
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from sfumato.weights.mapped import Info, release

SCALES = (".scale_weight", ".weight_scale")
NOTES = (".scale_input", ".input_scale", ".comfy_quant")
MARK = "scaled_fp8"
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


def scales_of(infos: Mapping[str, Info]) -> dict[str, str]:
    """The names of 8-bit weights and of the scales that belong to them."""
    found = {}
    for name, info in infos.items():
        stem = name.removesuffix(".weight")
        if stem == name or info.dtype not in EIGHT_BITS:
            continue
        for scale in (stem + end for end in SCALES):
            if scale in infos and infos[scale].dtype.is_floating_point and _fits(infos[scale].shape, info.shape):
                found[name] = scale
    return found


def notes_of(infos: Mapping[str, Info], scales: Mapping[str, str]) -> set[str]:
    """The names that mean something only beside scaled weights, and are no weights themselves."""
    stems = {name.removesuffix(".weight") for name in scales}
    notes = {stem + end for stem in stems for end in NOTES}
    marks = {name for name in infos if name.rpartition(".")[2] == MARK}
    return (notes | marks | set(scales.values())) & infos.keys() if scales else set()


def unscaled(weight: Tensor, scale: Tensor, mapped: bool) -> Tensor:
    """The weight in float32; mapped: it is a view of a file, whose pages are given back."""
    numbers = weight.to(torch.float32)
    if mapped:
        release(weight)
    return numbers.mul_(scale.to(torch.float32).reshape(-1, *(1,) * (weight.ndim - 1)))


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    return prod(scale) in (1, weight[0] if weight else 1) and prod(scale) == max(scale, default=1)
