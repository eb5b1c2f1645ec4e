"""Samplers of the probability-flow ODE in straight coordinates: one-step, Runge-Kutta and linear multistep."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor

from ..path import Point
from .base import (
    Noise,
    Noisy,
    Steps,
    Straight,
    Turning,
    ancestral,
    between,
    lagrange_means,
    move,
    sampler,
    weighted,
)

Part = Generator[tuple[Tensor, Point], tuple[Tensor, Tensor], Tensor]
"""A part of a sampler that returns its x."""


@sampler("euler", order=1)
def euler(x: Tensor, grid: Sequence[Point], noise: Noise) -> Steps:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 1 without the corrector)."""
    for a, b in pairwise(grid):
        x, x0 = yield x, a
        x = move(x, x0, a, b)
    return x


@sampler("ddim", order=1)
def ddim(x: Tensor, grid: Sequence[Point], noise: Noise, eta: float = 0.0) -> Steps:
    """DDIM (Song et al. 2021, eq. 12); eta scales the fresh noise, and 1 gives DDPM."""
    for a, b in pairwise(grid):
        x, x0 = yield x, a
        down, up = ancestral(a, b, eta)
        x = move(x, x0, a, down)
        if up > 0:
            x = x + up * noise(x)
    return x


@sampler("heun", order=2)
def heun(x: Tensor, grid: Sequence[Point], noise: Noise) -> Steps:
    """Heun's method (Karras et al. 2022, algorithm 1): an Euler step, then the mean of both ends' slopes.

    What the clean picture changes from one end to the other counts (r - 1) / 2 times, where sigma / alpha falls to
    1 / r in a step. So steps must not be few: 6 times in the first of three steps on Stable Diffusion's schedule.
    """
    line = Straight(grid)
    for a, b in pairwise(grid):
        x = yield from heun_step(x, a, b, line)
    return x


def heun_step(x: Tensor, a: Point, b: Point, line: Straight) -> Part:
    """One step of Heun's method; Euler's where nothing can be evaluated at the end."""
    x, x0 = yield x, a
    if b.sigma == 0:
        return move(x, x0, a, b)
    x_b, x0_b = yield move(x, x0, a, b), b
    return line.advance(x, (line.slope(x, x0, a) + line.slope(x_b, x0_b, b)) / 2, a, b)


@sampler("dpm2", order=2)
def dpm2(x: Tensor, grid: Sequence[Point], noise: Noise) -> Steps:
    """DPM-Solver-2 as in k-diffusion (Karras et al. 2022, algorithm 2 without churn): the slope half way in log-SNR."""
    line = Straight(grid)
    for a, b in pairwise(grid):
        x, x0 = yield x, a
        if b.sigma == 0 or a.alpha == 0:
            x = move(x, x0, a, b)
            continue
        m = between(a, b)
        x_m, x0_m = yield move(x, x0, a, m), m
        x = line.advance(x, line.slope(x_m, x0_m, m), a, b)
    return x


@sampler("lms", order=2)
def lms(x: Tensor, grid: Sequence[Point], noise: Noise, history: int = 4, before: Sequence[Point] = ()) -> Steps:
    """Linear multistep, as in k-diffusion: Adams-Bashforth on an uneven grid, from up to `history` slopes.

    The first steps have fewer slopes to look back on, which bounds the order of the whole at 2.
    before: points of a grid that was entered midway; the slopes there count as zero, which is what diffusers makes of
            such a run. Without them the slopes that there are have all the weight.
    """
    line = Straight(grid)
    where = [p.sigma / line.scale(p) for p in (*before, *grid)]
    past: list[Tensor] = []  # newest first
    for i, (a, b) in enumerate(pairwise(grid), len(before)):
        x, x0 = yield x, a
        past = [line.slope(x, x0, a), *past][:history]
        weights = lagrange_means(where[i::-1][:history], where[i], where[i + 1])
        x = line.advance(x, weighted(weights[: len(past)], past), a, b)
    return x


@sampler("plms", order=2)
def plms(
    x: Tensor,
    grid: Sequence[Point],
    noise: Noise,
    warmup: Literal["heun", "runge_kutta", "none"] = "heun",
    middle: Sequence[Point] = (),
    mix: Literal["slope", "v"] = "slope",
    slip: bool = False,
) -> Steps:
    """Pseudo linear multistep (Liu et al. 2022, PNDM): even-grid Adams-Bashforth weights on slopes.

    warmup: how the history begins: "heun" evaluates the second point twice (S-PNDM), "runge_kutta" makes the
            first steps with four evaluations each and needs `middle`, their midpoints (F-PNDM), "none" starts
            with Euler.
    mix:    what is weighted: slopes (eps on a variance-preserving path), or v, which diffusers does for models
            that say v and which is of first order only.
    slip:   the second step is left out and its sample taken for one at its end, which is what diffusers makes of a
            run that enters a grid midway: its warm-up expects the second point twice and gets it once.
    """
    line: Straight | Turning = Straight(grid) if mix == "slope" else Turning()
    past: list[Tensor] = []  # newest first
    for i, (a, b) in enumerate(pairwise(grid)):
        if slip and i == 1:
            continue
        if warmup == "runge_kutta" and i < len(middle):
            x, slope = yield from runge_kutta(x, (a, middle[i], b), line)
            past.insert(0, slope)
            continue
        x, x0 = yield x, a
        past = [line.slope(x, x0, a), *past][:4]
        mixed = weighted(ADAMS_BASHFORTH[len(past) - 1], past)
        if i == 0 and warmup == "heun" and b.sigma > 0:
            x_b, x0_b = yield line.advance(x, mixed, a, b), b
            mixed = (mixed + line.slope(x_b, x0_b, b)) / 2
        x = line.advance(x, mixed, a, b)
    return x


ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@sampler("ipndm", order=2)
def ipndm(
    x: Tensor,
    grid: Sequence[Point],
    noise: Noise,
    mix: Literal["slope", "eps"] = "slope",
    past: list[Tensor] | None = None,
) -> Steps:
    """Improved PNDM (Zhang & Chen 2022): even-grid Adams-Bashforth weights from the first step on.

    mix:  what is weighted; eps says nothing of the clean picture in pure noise, where it then counts as 0.
    past: what was weighted before, newest first, which this run goes on with and adds to.
    """
    line: Straight | Noisy = Straight(grid) if mix == "slope" else Noisy()
    past = [] if past is None else past
    for a, b in pairwise(grid):
        x, x0 = yield x, a
        past.insert(0, line.slope(x, x0, a))
        del past[4:]
        x = line.advance(x, weighted(ADAMS_BASHFORTH[len(past) - 1], past), a, b)
    return x


def runge_kutta(
    x: Tensor, points: tuple[Point, Point, Point], line: Straight | Turning
) -> Generator[tuple[Tensor, Point], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A pseudo Runge-Kutta step from start over middle to end (Liu et al. 2022, eq. 13).

    Returns the x at the end and the slope at the start.
    """
    a, middle, b = points
    x, x0 = yield x, a
    slopes = [line.slope(x, x0, a)]
    for p in (middle, middle, b):
        x_p, x0_p = yield line.advance(x, slopes[-1], a, p), p
        slopes.append(line.slope(x_p, x0_p, p))
    return line.advance(x, weighted((1 / 6, 1 / 3, 1 / 3, 1 / 6), slopes), a, b), slopes[0]
