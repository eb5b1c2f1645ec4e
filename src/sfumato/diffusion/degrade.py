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
SMOOTHINGS = 30  # of the flattened picture that is the guess under noise
FLATTENING = 1.5  # its weight over the noise's deviation, as measured best
FEW = 8  # smoothings in each round of other guesses
FLAT: Mapping[str, tuple[float, float, int]] = MappingProxyType(
    {"missing": (0.1, 0.02, 10), "blur": (0.3, 0.03, 16), "lowres": (0.2, 0.03, 10)}
)
"""Of guesses for pictures in [-1, 1]: the weight of flatness in the first round and the last, and how many rounds."""


class Degradation(Protocol):
    """A linear operator on pictures."""

    def forward(self, x: Tensor) -> Tensor:
        """What is seen of x (B, C, H, W)."""
        ...

    def adjoint(self, y: Tensor) -> Tensor:
        """The transposed operator."""
        ...

    def solve(self, residual: Tensor, weight: float | Tensor) -> Tensor:
        """A' (A A' + weight I)⁻¹ residual."""
        ...

    def guess(self, y: Tensor, noise: float | Tensor) -> Tensor:
        """A first picture (B, C, H, W) from what is seen, made without a model.

        noise: its deviation in y, a number or one for each picture, (B, 1, 1, 1).
        """
        ...

    def shown(self, y: Tensor) -> Tensor:
        """What is seen, as a picture (B, C, H, W) of the full size."""
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

    def solve(self, residual: Tensor, weight: float | Tensor) -> Tensor:
        """The residual's share."""
        return residual / (1 + weight)

    def guess(self, y: Tensor, noise: float | Tensor) -> Tensor:
        """The flattened picture."""
        return flattened(y, FLATTENING * noise)

    def shown(self, y: Tensor) -> Tensor:
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

    def solve(self, residual: Tensor, weight: float | Tensor) -> Tensor:
        """The known pixels' share; nothing for the others."""
        return residual * self.known / (1 + weight)

    def guess(self, y: Tensor, noise: float | Tensor) -> Tensor:
        """The gaps filled from coarse to fine, then bent as little as goes, as a thin plate is (biharmonic); refined.

        The plate stays between the least and the greatest known value of each channel.
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
        x = x.maximum(low.amin((2, 3), keepdim=True)).minimum(high.amax((2, 3), keepdim=True))
        return refined(self, y, noise, x, *FLAT["missing"])

    def shown(self, y: Tensor) -> Tensor:
        """The known pixels, and zero elsewhere."""
        return y * self.known

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

    def solve(self, residual: Tensor, weight: float | Tensor) -> Tensor:
        """A A' = I / f², and so each mean goes to its block whole where there is no noise."""
        return self._spread(residual) / (1 + weight * self.factor**2)

    def guess(self, y: Tensor, noise: float | Tensor) -> Tensor:
        """Enlarged along cubics, with the blocks' means put right; refined."""
        x = F.interpolate(y, scale_factor=self.factor, mode="bicubic")
        return refined(self, y, noise, x + self.solve(y - self.forward(x), noise**2), *FLAT["lowres"])

    def shown(self, y: Tensor) -> Tensor:
        """The blocks."""
        return self._spread(y)

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

    def solve(self, residual: Tensor, weight: float | Tensor) -> Tensor:
        """gain / (gain² + weight) for each wave, Tikhonov's filter; waves below SMALLEST_GAIN do not come back."""
        gain = self._gain(residual)
        weight = torch.as_tensor(weight, dtype=gain.dtype, device=gain.device).clamp(min=SMALLEST_GAIN**2)
        return self._filtered(residual, gain / (gain * gain + weight))

    def guess(self, y: Tensor, noise: float | Tensor) -> Tensor:
        """Tikhonov's filter, for a picture whose fine waves have a deviation of about 0.2; refined."""
        x = self.solve(y, torch.as_tensor(30 * noise**2).clamp(min=1e-3))
        return refined(self, y, noise, x, *FLAT["blur"])

    def shown(self, y: Tensor) -> Tensor:
        """y."""
        return y

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


def refined(
    degradation: Degradation, y: Tensor, noise: float | Tensor, x: Tensor, first: float, last: float, rounds: int
) -> Tensor:
    """A picture that explains y and is flat between its edges, from a guess x (B, C, H, W).

    In each round the picture is flattened and what was seen put into it again: half-quadratic splitting (Geman & Yang
    1995) with total variation as what is known of pictures. The weight falls from `first` to `last`, or to the noise.
    """
    noise = torch.as_tensor(noise, dtype=y.dtype, device=y.device)
    flat = x
    for i in range(rounds):
        weight = (first * (last / first) ** (i / (rounds - 1)) * torch.ones_like(noise)).maximum(noise)
        flat = flattened(x, weight, FEW)
        x = flat + degradation.solve(y - degradation.forward(flat), (noise / weight).square() / 2)
    return torch.where(noise > 0, flat, x)


def flattened(y: Tensor, weight: float | Tensor, smoothings: int = SMOOTHINGS) -> Tensor:
    """The x nearest y by |x - y|² / 2 + weight * total variation, (B, C, H, W) (Rudin, Osher & Fatemi 1992).

    The variation is the length of each pixel's differences over both directions and all channels. Found by
    accelerated projections of the dual field (Beck & Teboulle 2009, section 4).
    weight: a number or (B, 1, 1, 1); where it is 0, y comes back.
    """
    scale = torch.as_tensor(weight, dtype=y.dtype, device=y.device).clamp(min=1e-9)
    down = torch.zeros_like(y)
    across, before_d, before_a, speed = down, down, down, 1.0
    for _ in range(smoothings):
        x = y - scale * _gathered(down, across)
        new_d = down + F.pad(x.diff(dim=2), (0, 0, 0, 1)) / (8 * scale)
        new_a = across + F.pad(x.diff(dim=3), (0, 1)) / (8 * scale)
        length = (new_d.square() + new_a.square()).sum(1, keepdim=True).sqrt().clamp(min=1.0)
        new_d, new_a = new_d / length, new_a / length
        faster = (1 + math.sqrt(1 + 4 * speed**2)) / 2
        down, across = (new + (speed - 1) / faster * (new - old) for new, old in ((new_d, before_d), (new_a, before_a)))
        before_d, before_a, speed = new_d, new_a, faster
    return y - scale * _gathered(before_d, before_a)


def _gathered(down: Tensor, across: Tensor) -> Tensor:
    """The transposed operator of the differences to the next row and column; the last ones of both are zero."""
    return F.pad(down[..., :-1, :], (0, 0, 1, 0)) - down + F.pad(across[..., :-1], (1, 0)) - across


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
