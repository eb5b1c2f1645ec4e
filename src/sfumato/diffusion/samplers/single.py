"""Single-step DPM-Solvers that choose points of their own, and DDIM inversion."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..path import Point
from .base import Noise, Noisy, Steps, between, move, sampler

Solved = Generator[tuple[Tensor, Point], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""A part of a sampler that returns its x, and the x of one order less."""


def solve(x: Tensor, x0: Tensor, a: Point, b: Point, order: int) -> Solved:
    """A step of DPM-Solver-1, 2 or 3 from x and x0 at a (Lu et al. 2022, algorithms 1 and 2)."""
    line, h = Noisy(), b.log_snr - a.log_snr
    eps = line.slope(x, x0, a)
    low = line.advance(x, eps, a, b)
    if order == 1:
        return low, low
    r = 1 / 2 if order == 2 else 1 / 3
    m = between(a, b, r)
    x_m, x0_m = yield line.advance(x, eps, a, m), m
    bend = line.slope(x_m, x0_m, m) - eps
    middle = line.advance(x, eps + bend / (2 * r), a, b)
    if order == 2:
        return middle, low
    n = between(a, b, 2 / 3)
    x_n, x0_n = yield line.advance(x, eps + 2 * mean_growth(2 * h / 3) * bend, a, n), n
    bend = line.slope(x_n, x0_n, n) - eps
    return line.advance(x, eps + 3 / 2 * mean_growth(h) * bend, a, b), middle


def mean_growth(h: float) -> float:
    """((e^h - 1) / h - 1) / (e^h - 1): the mean place in a step of h, weighted by how eps counts there."""
    return 1 / h - 1 / math.expm1(h)


def finite(grid: Sequence[Point]) -> tuple[int, int]:
    """The first and the last place in a grid where log-SNR is finite."""
    inside = [i for i, p in enumerate(grid) if p.alpha > 0 and p.sigma > 0]
    return (inside[0], inside[-1]) if inside else (0, 0)


@sampler("dpm_fast", order=2, ends=True)
def dpm_fast(x: Tensor, grid: Sequence[Point], noise: Noise) -> Steps:
    """DPM-Solver-fast (Lu et al. 2022, section 3.4): n evaluations in even steps of log-SNR, three in most of them.

    The grid gives the ends and n; a step from pure noise or to the data is one of first order.
    """
    first, last = finite(grid)
    for a, b in pairwise(grid[: first + 1]):
        x, x0 = yield x, a
        x = move(x, x0, a, b)
    thirds, left = divmod(last - first, 3)
    orders = [3] * (thirds - 1) + [2, 1] if left == 0 else [3] * thirds + [left]
    a = grid[first]
    for i, order in enumerate(orders if last > first else [], start=1):
        b = between(grid[first], grid[last], i / len(orders)) if i < len(orders) else grid[last]
        x, x0 = yield x, a
        x, _ = yield from solve(x, x0, a, b, order)
        a = b
    for a, b in pairwise(grid[last:]):
        x, x0 = yield x, a
        x = move(x, x0, a, b)
    return x


@sampler("dpm_adaptive", order=3, adaptive=True, ends=True)
def dpm_adaptive(
    x: Tensor, grid: Sequence[Point], noise: Noise, rtol: float = 0.05, atol: float = 0.0078, h_init: float = 0.05
) -> Steps:
    """DPM-Solver-23 with adaptive steps (Lu et al. 2022, appendix C), with the step control of k-diffusion.

    The grid gives the ends only: how many evaluations it takes follows from the tolerances, relative and
    absolute, on what orders 2 and 3 make different in x / alpha. h_init: the first step in log-SNR.
    """
    first, last = finite(grid)
    for a, b in pairwise(grid[: first + 1]):
        x, x0 = yield x, a
        x = move(x, x0, a, b)
    a, end, h = grid[first], grid[last], h_init
    before = x / max(a.alpha, 1e-12)
    while a.log_snr < end.log_snr - 1e-5:
        share = h / (end.log_snr - a.log_snr)
        b = between(a, end, share) if share < 1 else end
        edited, x0 = yield x, a  # kept only with the step, which may be tried again
        new, old = yield from solve(edited, x0, a, b, 3)
        y, y_low = new / b.alpha, old / b.alpha
        allowed = torch.maximum(y_low.abs(), before.abs()).mul(rtol).clamp(min=atol)
        error = ((y_low - y) / allowed).square().mean().sqrt().item()
        factor = 1 + math.atan((error + 1e-8) ** (-1 / 3) - 1)
        if factor >= 0.81:
            x, before, a = new, y_low, b
        h *= factor
    for a, b in pairwise(grid[last:]):
        x, x0 = yield x, a
        x = move(x, x0, a, b)
    return x


def invert(x: Tensor, grid: Sequence[Point], noise: Noise, clip: float | None = None) -> Steps:
    """DDIM inversion (Dhariwal & Nichol 2021, appendix F): from the data along a grid in reverse, to its noise.

    grid: points from data to noise. Each question shows x at one point as if it stood at the next, since
    there is no noise to be seen at the data. clip: the largest value of the clean picture in between.
    """
    for a, b in pairwise(grid):
        x, x0 = yield x, b
        eps = (x - b.alpha * x0) / b.sigma
        x0 = (x - a.sigma * eps) / a.alpha
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        x = b.alpha * x0 + b.sigma * eps
    return x
