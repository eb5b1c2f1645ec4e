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


def shifted(count: int, generator: torch.Generator, s: float = 2.0) -> Tensor:
    """Even, then moved towards noise: s u / (1 + (s - 1) u) (Esser et al. 2024, eq. 23).

    Near the data the text says nothing that the noisy picture does not show; what a word looks like is learned
    where the picture is mostly noise.
    """
    u = uniform(count, generator)
    return (s * u / (1 + (s - 1) * u)).clamp(max=1 - 1e-6)


DENSITIES: Mapping[str, Density] = MappingProxyType(
    {"uniform": uniform, "logit_normal": logit_normal, "mode": mode, "shifted": shifted}
)


def flat(points: Points) -> Tensor:
    """All times weigh the same in the prediction's own units."""
    return torch.ones_like(points.alpha)


def min_snr_v(points: Points, gamma: float = 5.0) -> Tensor:
    """Min-SNR for v prediction: min(snr, gamma) / (snr + 1) (Hang et al. 2023, section 3.4)."""
    snr = (points.alpha / points.sigma).square()
    return snr.clamp(max=gamma) / (snr + 1)


def x0_v(points: Points) -> Tensor:
    """Sigma², which makes the squared error of v that of the clean picture (Salimans & Ho 2022, section 4)."""
    return points.sigma.square()


def half_x0_v(points: Points) -> Tensor:
    """Sigma, half way (on a log scale) between `flat` and `x0_v`: the last, fine steps keep some weight."""
    return points.sigma


WEIGHTINGS: Mapping[str, Weighting] = MappingProxyType(
    {"flat": flat, "min_snr_v": min_snr_v, "x0_v": x0_v, "half_x0_v": half_x0_v}
)
