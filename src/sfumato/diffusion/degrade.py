"""Degradations of pictures as linear operators: what they do, their adjoints, and how far each can be undone.

Each has three methods on pixels:

    forward(x)              A x
    adjoint(y)              A' y, so that <A x, y> = <x, A' y>
    solve(residual, weight) A' (A A' + weight I)⁻¹ residual, exactly

With weight 0 the last is the pseudo-inverse, which the null-space projection of Wang et al. 2023 (DDNM) is made of;
with noise it is the gain of the best linear estimate, in which the weight is the variance of the noise over that of
the picture. Each operator here is diagonal in pixels, blocks or cosines, so that neither takes iterations.

B pictures, C channels, H W height and width, f the factor of a smaller picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_GAIN = 1e-3  # of the finest waves that a blur leaves; below it what comes back would be rounding
RELAXATIONS = 40  # of the plate over missing pixels; the coarse filling has done the rest
NORMAL_MEDIAN = 0.6744897501960817  # of the absolute value of a standard normal number


class Degradation(Protocol):
    """A linear operator on pictures."""

    def forward(self, x: Tensor) -> Tensor:
        """What is seen of x (B, C, H, W)."""
        ...

    def adjoint(self, y: Tensor) -> Tensor:
        """The transposed operator."""
        ...

    def solve(self, residual: Tensor, weight: float) -> Tensor:
        """A' (A A' + weight I)⁻¹ residual."""
        ...

    def guess(self, y: Tensor, noise: float) -> Tensor:
        """A first picture (B, C, H, W) from what is seen, made without a model; noise: its deviation in y."""
        ...

    def sharpness(self, x: Tensor) -> Tensor:
        """How well each pixel of a picture like x is seen, (B, 1, H, W): 1 by itself, 1 / f among f along a side."""
        ...


@dataclass(frozen=True)
class Noise:
    """Nothing but noise: every pixel is seen."""

    def forward(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        """y."""
        return y

    def solve(self, residual: Tensor, weight: float) -> Tensor:
        """The residual's share."""
        return residual / (1 + weight)

    def guess(self, y: Tensor, noise: float) -> Tensor:
        """y."""
        return y

    def sharpness(self, x: Tensor) -> Tensor:
        """1 everywhere."""
        return torch.ones_like(x[:, :1])


@dataclass(frozen=True, eq=False)
class Missing:
    """Missing pixels. known: 1 where a pixel is seen and 0 where not, broadcast to (B, C, H, W)."""

    known: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Zero where nothing is seen."""
        return x * self.known

    def adjoint(self, y: Tensor) -> Tensor:
        """The same."""
        return y * self.known

    def solve(self, residual: Tensor, weight: float) -> Tensor:
        """The known pixels' share; nothing for the others."""
        return residual * self.known / (1 + weight)

    def guess(self, y: Tensor, noise: float) -> Tensor:
        """The gaps filled from coarse to fine, then bent as little as goes, as a thin plate is (biharmonic).

        It stays between the least and the greatest known value of each channel.
        """
        known = self.known.expand_as(y)
        x = _filled(y * known, known)
        gap = (known == 0).to(y.dtype)
        residual = -gap * _laplace(_laplace(x))
        step, size = residual, residual.square().sum((2, 3), keepdim=True)
        for _ in range(RELAXATIONS):  # conjugate gradients, each channel for itself
            bent = gap * _laplace(_laplace(step))
            length = size / (step * bent).sum((2, 3), keepdim=True).clamp(min=1e-12)
            x, residual = x + length * step, residual - length * bent
            last, size = size, residual.square().sum((2, 3), keepdim=True)
            step = residual + size / last.clamp(min=1e-12) * step
        low, high = (torch.where(known > 0, y, end) for end in (torch.inf, -torch.inf))
        return x.maximum(low.amin((2, 3), keepdim=True)).minimum(high.amax((2, 3), keepdim=True))

    def sharpness(self, x: Tensor) -> Tensor:
        """1 where a pixel is known, 0 elsewhere."""
        return self.known[:, :1].to(x.dtype).expand(len(x), 1, *x.shape[2:])


@dataclass(frozen=True)
class LowRes:
    """A smaller picture: the means of f x f blocks, (B, C, H, W) to (B, C, H / f, W / f)."""

    factor: int

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise ValueError(f"scale = {self.factor}; a smaller picture needs 2 or more")

    def forward(self, x: Tensor) -> Tensor:
        """The means; ValueError where blocks do not fill the picture."""
        f, (height, width) = self.factor, x.shape[2:]
        if height % f or width % f:
            raise ValueError(f"a picture of {width}x{height} has no whole blocks of {f}; give sides that {f} divides")
        return F.avg_pool2d(x, f)

    def adjoint(self, y: Tensor) -> Tensor:
        """Each mean spread over its block."""
        return self._spread(y) / self.factor**2

    def solve(self, residual: Tensor, weight: float) -> Tensor:
        """A A' = I / f², and so each mean goes to its block whole where there is no noise."""
        return self._spread(residual) / (1 + weight * self.factor**2)

    def guess(self, y: Tensor, noise: float) -> Tensor:
        """Enlarged along cubics, with the blocks' means put right."""
        x = F.interpolate(y, scale_factor=self.factor, mode="bicubic")
        return x + self.solve(y - self.forward(x), noise**2)

    def sharpness(self, x: Tensor) -> Tensor:
        """1 / f everywhere."""
        return torch.full_like(x[:, :1], 1 / self.factor)

    def _spread(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)


@dataclass(frozen=True)
class Blur:
    """A Gaussian blur of deviation sigma pixels; beyond its edges the picture goes on mirrored.

    Then cosines are its eigenvectors: each is damped by exp(-sigma² w² / 2), where w is its frequency. The operator
    is its own adjoint.
    """

    sigma: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma < 1000:
            raise ValueError(f"blur = {self.sigma:g}; give a deviation in pixels, above 0")

    def forward(self, x: Tensor) -> Tensor:
        """The blurred picture."""
        return self._filtered(x, self._gain(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """The same."""
        return self.forward(y)

    def solve(self, residual: Tensor, weight: float) -> Tensor:
        """gain / (gain² + weight) for each wave, Tikhonov's filter; waves below SMALLEST_GAIN do not come back."""
        gain = self._gain(residual)
        return self._filtered(residual, gain / (gain * gain + max(weight, SMALLEST_GAIN**2)))

    def guess(self, y: Tensor, noise: float) -> Tensor:
        """Tikhonov's filter, for a picture whose fine waves have a deviation of about 0.2."""
        return self.solve(y, max(30 * noise**2, 1e-3))

    def sharpness(self, x: Tensor) -> Tensor:
        """The blur's height at its centre, along one side: 1 / (sigma sqrt(2 pi)), at most 1."""
        return torch.full_like(x[:, :1], min(1.0, 1 / (self.sigma * math.sqrt(2 * math.pi))))

    def _gain(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        down = torch.arange(2 * height, dtype=torch.float64).minimum(2 * height - torch.arange(2 * height))
        across = torch.arange(width + 1, dtype=torch.float64)
        w = (torch.pi * down / height)[:, None].square() + (torch.pi * across / width).square()  # (2 H, W + 1)
        return torch.exp(-0.5 * self.sigma**2 * w).to(x.device, x.dtype)

    def _filtered(self, x: Tensor, gain: Tensor) -> Tensor:
        height, width = x.shape[2:]
        wide = torch.cat([x, x.flip(3)], dim=3)  # (B, C, H, 2 W)
        mirrored = torch.cat([wide, wide.flip(2)], dim=2)  # (B, C, 2 H, 2 W), without a seam
        waves = torch.fft.rfft2(mirrored) * gain  # (B, C, 2 H, W + 1)
        return torch.fft.irfft2(waves, s=mirrored.shape[2:])[:, :, :height, :width]


DEGRADATIONS: Mapping[str, str] = MappingProxyType(
    {
        "noise": "noise alone",
        "missing": "missing pixels",
        "blur": "a Gaussian blur",
        "lowres": "low resolution",
    }
)
"""The degradations by name, each in words."""


def _laplace(x: Tensor) -> Tensor:
    """The sum of the four neighbours' differences; beyond the edge lies the edge's own pixel."""
    p = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return p[..., 1:-1, :-2] + p[..., 1:-1, 2:] + p[..., :-2, 1:-1] + p[..., 2:, 1:-1] - 4 * x


def _filled(total: Tensor, known: Tensor) -> Tensor:
    """Known pixels as they are, others from a picture of half the size that is filled likewise (pull and push).

    total, known: sums and shares of known pixels, (B, C, H, W).
    """
    mean = total / known.clamp(min=1e-9)
    if min(total.shape[2:]) < 2 or bool((known > 0).all()):
        return mean
    half = [F.avg_pool2d(v, 2, ceil_mode=True) for v in (total, known)]
    coarse = F.interpolate(_filled(*half), size=total.shape[2:], mode="bilinear")
    return torch.where(known > 0, mean, coarse)


def noise_level(picture: Tensor, known: Tensor | None = None) -> float:
    """The deviation of white noise in a picture (B, C, H, W), in the picture's own units.

    The median absolute value of the finest diagonal Haar detail over that of a standard normal number (Donoho &
    Johnstone 1994, section 4.2): shapes fill few of its numbers, and smooth grounds none. Fine texture all over the
    picture is taken for noise.
    known: 1 where a pixel is known, broadcast to the picture; only blocks of four known ones count.
    Raises ValueError where there is no such block.
    """
    height, width = (side // 2 * 2 for side in picture.shape[2:])
    detail = _diagonal(picture[..., :height, :width])
    if known is not None:
        blocks = F.avg_pool2d(known.expand_as(picture)[..., :height, :width].float(), 2) == 1
        detail = detail[blocks]
    if detail.numel() == 0:
        raise ValueError("no 2x2 block of known pixels to estimate the noise from; give the noise level")
    return float(detail.abs().median()) / NORMAL_MEDIAN


def _diagonal(x: Tensor) -> Tensor:
    """(a - b - c + d) / 2 of each block of four, (B, C, H / 2, W / 2); of white noise it has the deviation."""
    a, b, c, d = (x[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    return (a - b - c + d) / 2
