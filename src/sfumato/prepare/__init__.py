"""A loaded network made ready to denoise on a CPU: the same numbers to rounding, in less time.

`prepare(net)` puts faster ways to compute in the place of some modules' `forward` and returns what takes them away
again. Parameters stay where and what they are, so files, adapters and training see nothing of it. What is kept
(packed kernels, joined weights, keys and values of a context) knows the weights that it was made from and is made anew
when they are others. With gradients on, under torch.compile, on other devices, and where hooks listen to a part, the
modules compute as they always do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from sfumato.models.layers import (
    GEGLU,
    Attention,
    BasicTransformerBlock,
    GroupNorm,
    ResnetBlock2D,
    Transformer2DModel,
    Upsample2D,
)
from sfumato.models.unet import UNet
from sfumato.prepare.pictures import Convolution, Doubled, Normed, Residual, Time
from sfumato.prepare.tokens import Block, Gated, Joined, Tokens
from sfumato.prepare.way import Way

__all__ = ["VARIABLE", "WAYS", "Way", "prepare"]

VARIABLE = "SFUMATO_PREPARE"
# Name -> the module's class, the attribute in whose place the way stands, the way.
WAYS: dict[str, tuple[type[nn.Module], str, type[Way[Any]]]] = {
    "convolutions": (nn.Conv2d, "forward", Convolution),
    "residuals": (ResnetBlock2D, "forward", Residual),
    "doublings": (Upsample2D, "forward", Doubled),
    "time": (UNet, "_time", Time),
    "attention": (Attention, "forward", Joined),
    "geglu": (GEGLU, "forward", Gated),
    "blocks": (BasicTransformerBlock, "forward", Block),
    "tokens": (Transformer2DModel, "forward", Tokens),
    "norms": (GroupNorm, "forward", Normed),
}


def prepare(net: nn.Module, only: Sequence[str] | None = None) -> Callable[[], None]:
    """Let a network's modules compute in faster ways; returns the function that undoes it.

    only: names of `WAYS`; all by default. Nothing is done where it was done before, and none with SFUMATO_PREPARE=off.
    Raises ValueError for an unknown name.
    """
    names = tuple(WAYS) if only is None else tuple(only)
    unknown = [name for name in names if name not in WAYS]
    if unknown:
        raise ValueError(f"unknown preparation {unknown[0]!r}; known: {', '.join(WAYS)}")
    if os.environ.get(VARIABLE) == "off":
        return lambda: None
    changed: list[tuple[nn.Module, str]] = []
    for module in list(net.modules()):
        for name in names:
            kind, attribute, way = WAYS[name]
            if type(module) is kind and attribute not in module.__dict__ and way.fits(module):
                object.__setattr__(module, attribute, way(module))
                changed.append((module, attribute))

    def undo() -> None:
        for module, attribute in changed:
            module.__dict__.pop(attribute, None)

    return undo
