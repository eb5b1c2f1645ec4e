"""Inpainting as a guidance around another: what is known of the picture is put back at each evaluation."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .guidance import Guidance, Query, anchor_of
from .path import Point, add_noise


@dataclass(eq=False)
class Keep:
    """Known pixels stay: their x is the picture under its own noise, their clean picture the picture.

    So any model repaints a part of a picture (Lugmayr et al. 2022, without resampling). It works with every sampler,
    also where fresh noise comes in between. It remembers its last picture, so each run needs its own.

    z, eps:     the known picture and its noise, (B, C, h, w).
    strength:   (B or 1, 1, h, w) in [0, 1]: in how much of the way, counted from its end, a pixel may change. 0 keeps
                it, 1 repaints it (Levin & Fried 2023, differential diffusion).
    grid:       the points that the sampler is given, from noise to data.
    from_noise: the way begins with nothing but noise, also where the picture is known.
    """

    inner: Guidance
    z: Tensor
    eps: Tensor
    strength: Tensor
    grid: Sequence[Point]
    from_noise: bool = False
    x0: Tensor | None = field(default=None, init=False, repr=False)
    levels: list[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.levels = [-point.ratio for point in self.grid]  # rising, for bisection

    def free(self, point: Point) -> Tensor:
        """Where pixels may change at a point, like `strength`; between two points of the grid as at the first."""
        steps = len(self.grid) - 1
        done = min(max(bisect_right(self.levels, -point.ratio) - 1, 0), steps - 1)
        return self.strength >= (steps - done) / steps - 1e-6

    def seen(self, x: Tensor, point: Point) -> Tensor:
        """x with the known part put back."""
        if self.from_noise and point == self.grid[0]:
            return x
        return torch.where(self.free(point), x, add_noise(self.z, self.eps, point))

    def ended(self, x: Tensor) -> Tensor:
        """The result with the known part put back, for samplers and grids that end beside the clean picture."""
        return torch.where(self.free(self.grid[-1]), x, self.z)

    def ask(self, x: Tensor, point: Point) -> list[Query]:
        """The questions of `inner` on the x with the known part put back."""
        return self.inner.ask(self.seen(x, point), point)

    def combine(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor:
        """The picture of `inner`, with the known part put back."""
        x0 = self.inner.combine(self.seen(x, point), point, answers)
        self.x0 = torch.where(self.free(point), x0, self.z)
        return self.x0

    def anchor(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor | None:
        """The clean picture that leaves, beside x, the noise seen: so the sampler goes on from the x that was seen."""
        seen = self.seen(x, point)
        inner = anchor_of(self.inner, seen, point, answers)
        inner = self.x0 if inner is None else torch.where(self.free(point), inner, self.z)
        if inner is None or point.alpha == 0:
            return None
        return inner - (seen - x) / point.alpha
