"""Noise of one picture: fresh draws in turn, and a Brownian path that is the same whatever grid is laid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .path import Point

DEPTH = 20


class Brownian:
    """A Brownian path that a seed fixes everywhere (virtual Brownian tree, Li et al. 2020, section 4).

    Its time is a share of the way from the data to pure noise, finite at both, found by halving that way
    DEPTH times. Halves are drawn in float32 on the CPU from the seed and their place, so that neither the
    order of questions nor the device matters. All questions must have one shape.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed % 2**64
        self._way: list[tuple[int, int, Tensor, Tensor]] = []  # low, high and the path there, halved again and again

    def between(self, x: Tensor, a: Point, b: Point) -> Tensor:
        """The increment from a to b like x, divided by its standard deviation."""
        i, j = time(a), time(b)
        if i == j:  # closer than the tree is fine
            i, j = (i, j - 1) if j > 0 else (i + 1, j)
        change = self._at(j, x.shape) - self._at(i, x.shape)
        return (change / math.sqrt(abs(i - j) / 2**DEPTH)).to(x)

    def _at(self, k: int, shape: Sequence[int]) -> Tensor:
        """The path at k / 2**DEPTH."""
        while self._way and not self._way[-1][0] <= k <= self._way[-1][1]:
            self._way.pop()
        if not self._way:
            self._way = [(0, 2**DEPTH, torch.zeros(tuple(shape)), self._draw(0, shape))]
        while True:
            low, high, at_low, at_high = self._way[-1]
            if k in (low, high):
                return at_low if k == low else at_high
            middle = (low + high) // 2
            spread = math.sqrt((high - low) / 2**DEPTH) / 2
            at_middle = (at_low + at_high) / 2 + spread * self._draw(middle, shape)
            half = (low, middle, at_low, at_middle) if k <= middle else (middle, high, at_middle, at_high)
            self._way.append(half)

    def _draw(self, place: int, shape: Sequence[int]) -> Tensor:
        """Standard noise of a place's own."""
        state = np.random.SeedSequence(self.seed, spawn_key=(place,)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]) >> 1)
        return torch.randn(tuple(shape), generator=generator)


def time(p: Point) -> int:
    """How far a point is from the data, in parts of 2**DEPTH: 0 there, 2**DEPTH at pure noise."""
    share = 1 / (1 + math.exp(min(p.log_snr / 4, 700))) if p.alpha > 0 else 1.0
    return round(share * 2**DEPTH)


class PictureNoise:
    """A sampler's noise for the picture that owns a generator: fresh noise is drawn from it in float32.

    The Brownian path follows from the seed that the generator began with.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.path = Brownian(generator.initial_seed())

    def __call__(self, x: Tensor, /) -> Tensor:
        """Fresh standard noise like x."""
        device = self.generator.device
        return torch.randn(x.shape, generator=self.generator, device=device).to(x)

    def between(self, x: Tensor, a: Point, b: Point, /) -> Tensor:
        """The Brownian path's increment from a to b, like x and in standard deviations."""
        return self.path.between(x, a, b)
