"""Posterior sampling: guidance towards the pictures that explain a degraded one.

A model knows p(x0). What was seen of the picture is y = A x0 + noise * eps, and sampling from p(x0 | y) takes
nothing but another clean picture at each point: E[x0 | x, y] in place of E[x0 | x]. Both guidances here wrap one that
makes the latter, with any sampler. They take p(x0 | x) for a normal distribution around it:

    `Projected`  of one variance in all directions. Then E[x0 | x, y] is a closed form, and without noise it is the
                 projection of DDNM (Wang et al. 2023, eq. 10 and 17): what is seen is put in, the network does the
                 rest. For pixel models, whose clean picture *is* the picture.
    `Descended`  whose directions the network's and the decoder's gradients tell (Chung et al. 2023, DPS, algorithm 1,
                 with the step size of Song et al. 2023, eq. 7). For latent models.

All deviations are in the units of pictures in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .degrade import Degradation
from .guidance import Guidance, Query
from .path import Point


def uncertainty(point: Point, spread: float) -> float:
    """The variance of x0 given x at a point, for data of deviation `spread` in each direction."""
    noise, data = point.sigma**2, (point.alpha * spread) ** 2
    return spread**2 * noise / (noise + data)


def unchanged(x: Tensor) -> Tensor:
    """x: how a picture becomes itself."""
    return x


@dataclass(frozen=True, eq=False)
class Projected:
    """What `inner` makes, brought into agreement with what was seen.

    seen:           y, as `degradation.forward` makes it of a picture.
    noise:          deviation of the noise in it.
    decode, encode: from x0 to pixels and back, exact inverses of one another that keep distances.
    spread:         deviation of what is not known of a clean picture at pure noise; larger ones trust `seen` sooner.
    limit:          the largest absolute value of a clean picture's pixels.
    """

    inner: Guidance
    degradation: Degradation
    seen: Tensor
    noise: float = 0.0
    decode: Callable[[Tensor], Tensor] = unchanged
    encode: Callable[[Tensor], Tensor] = unchanged
    spread: float = 0.5
    limit: float = 1.0

    def ask(self, x: Tensor, point: Point) -> list[Query]:
        """The questions of `inner`."""
        return self.inner.ask(x, point)

    def combine(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor:
        """x0 + A' (A A' + noise² / variance)⁻¹ (y - A x0)."""
        picture = self.decode(self.inner.combine(x, point, answers)).clamp(-self.limit, self.limit)
        weight = self.noise**2 / max(uncertainty(point, self.spread), 1e-12)
        residual = self.seen - self.degradation.forward(picture)
        return self.encode(picture + self.degradation.solve(residual, weight))


@dataclass(frozen=True, eq=False)
class Descended:
    """What `inner` makes, moved down the gradient of the misfit between what it shows and what was seen.

    seen, noise: as for `Projected`.
    decode:      from x0 to pixels; gradients go through it and through the network.
    spread:      deviation of what is not known of a clean picture's pixels at pure noise.
    scale:       of the step; 1 is exact where the network is that of normally distributed data.

    x0 - scale * sigma² / alpha * gradient of |y - A decode(x0)|² / (2 (noise² + variance)), shortened where it would
    overshoot: a decoder stretches distances by amounts that the formula does not know.
    """

    gradients: ClassVar[bool] = True

    inner: Guidance
    degradation: Degradation
    seen: Tensor
    noise: float = 0.0
    decode: Callable[[Tensor], Tensor] = unchanged
    spread: float = 0.5
    scale: float = 1.0

    def ask(self, x: Tensor, point: Point) -> list[Query]:
        """The questions of `inner`."""
        return self.inner.ask(x, point)

    def combine(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor:
        """The moved picture; x is to be a leaf that the answers were computed from with gradients on."""
        x0 = self.inner.combine(x, point, answers)
        residual = self.seen - self.degradation.forward(self.decode(x0))
        variance = self.noise**2 + uncertainty(point, self.spread)
        (gradient,) = torch.autograd.grad(residual.square().sum() / (2 * variance), x)
        x0, before = x0.detach(), residual.detach()
        move = -self.scale * point.sigma**2 / point.alpha * gradient
        with torch.no_grad():
            change = before - (self.seen - self.degradation.forward(self.decode(x0 + move)))
        return x0 + shorter(before, change) * move


def shorter(residual: Tensor, change: Tensor) -> Tensor:
    """How much of a move, 0 to 1, to make: no more than brings the residual to its least along it, (B, 1, 1, 1).

    change: by how much the residual shrinks with the whole move.
    """
    least = (residual * change).flatten(1).sum(1) / change.flatten(1).square().sum(1).clamp(min=1e-20)
    return least.clamp(0, 1).view(-1, 1, 1, 1)
