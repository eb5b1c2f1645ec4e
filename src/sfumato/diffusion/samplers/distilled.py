"""Samplers for networks that were distilled to need few steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from ..path import END, Point
from .base import Noise, Steps, move, renoise, sampler


@sampler("lcm", order=1, stochastic=True)
def lcm(
    x: Tensor, grid: Sequence[Point], noise: Noise, timestep_scaling: float = 0.0, sigma_data: float = 0.5
) -> Steps:
    """Multistep consistency sampling (Luo et al. 2023, LCM, algorithm 3): the clean picture, then noise anew.

    timestep_scaling: how quickly the network's part of the clean picture grows with its time, as in the
    consistency function's boundary condition (their section 4.2); 0 takes the network's word alone.
    """
    for a, b in pairwise(grid):
        x, x0 = yield x, a
        if timestep_scaling:
            scaled = a.t * timestep_scaling
            skip = sigma_data**2 / (scaled**2 + sigma_data**2)
            x0 = scaled / math.hypot(scaled, sigma_data) * x0 + skip * x
        x = renoise(x0, END, b, noise)
    return x


@sampler("tcd", order=1, stochastic=True)
def tcd(x: Tensor, grid: Sequence[Point], noise: Noise, eta: float = 0.3, whole: bool = False) -> Steps:
    """Strategic stochastic sampling (Zheng et al. 2024, TCD, algorithm 4): beyond the next point, and back by noise.

    eta:   how far beyond, as a part of its index (their gamma); 0 is DDIM, 1 noises the clean picture anew.
    whole: that index is rounded down, for networks that know whole times only.
    """
    for a, b in pairwise(grid):
        x, x0 = yield x, a
        s = beyond(b, eta, whole) if b.sigma > 0 and eta > 0 else b
        x = renoise(move(x, x0, a, s), s, b, noise)
    return x


def beyond(b: Point, eta: float, whole: bool) -> Point:
    """The point at 1 - eta of b's index, or b itself at the end of the schedule."""
    if b.path is None:
        raise ValueError(f"no path is known for {b}; take points from a path, not by hand")
    index = float(np.float32(1 - eta) * np.float32(b.path.index(b)))
    index = math.floor(index) if whole else index
    s = b.path.place(max(index, b.path.last_index))
    return s if s.ratio < b.ratio else b
