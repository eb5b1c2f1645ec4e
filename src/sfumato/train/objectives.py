"""What the denoiser is trained for: densities of time and weightings of the loss, one function each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from sfumato.diffusion.path import Points

Density = Callable[[int, torch.Generator], Tensor]
Weighting = Callable[[Points], Tensor]


def uniform(count: int, generator: torch.Generator) -> Tensor:
    """Every time alike (Ho et al. 2020, algorithm 1); fractions in [0, 1), one in each of `count` equal strata."""
    return (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count


def logit_normal(count: int, generator: torch.Generator) -> Tensor:
    """More of the middle: sigmoid of a standard normal (Esser et al. 2024, section 3.1)."""
    return torch.randn(count, generator=generator).sigmoid()


def mode(count: int, generator: torch.Generator, s: float = 0.8) -> Tensor:
    """The middle favoured without thinning out the ends (Esser et al. 2024, eq. 20)."""
    u = uniform(count, generator)
    return (1 - u - s * (torch.cos(torch.pi / 2 * u).square() - 1 + u)).clamp(0, 1 - 1e-6)


DENSITIES: Mapping[str, Density] = MappingProxyType(
    {"uniform": uniform, "logit_normal": logit_normal, "mode": mode}
)


def flat(points: Points) -> Tensor:
    """All times weigh the same in the prediction's own units."""
    return torch.ones_like(points.alpha)


def min_snr_v(points: Points, gamma: float = 5.0) -> Tensor:
    """Min-SNR for v prediction: min(snr, gamma) / (snr + 1) (Hang et al. 2023, section 3.4)."""
    snr = (points.alpha / points.sigma).square()
    return snr.clamp(max=gamma) / (snr + 1)


WEIGHTINGS: Mapping[str, Weighting] = MappingProxyType({"flat": flat, "min_snr_v": min_snr_v})
