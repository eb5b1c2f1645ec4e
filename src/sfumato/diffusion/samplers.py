"""Samplers: coroutines as long as their pseudocode, and the registry of their names.

A sampler is called with x at the first point of a grid, the grid, and `noise`, which gives fresh standard
noise shaped like its argument. It yields `x, point` ("evaluate me here"), receives x (possibly edited by the
caller) and the predicted clean picture, and returns the final x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from .path import Point
from .registry import find

Steps = Generator[tuple[Tensor, Point], tuple[Tensor, Tensor], Tensor]
Noise = Callable[[Tensor], Tensor]


class Sampler(Protocol):
    """A sampler with its own options bound: from x, grid and noise to a coroutine."""

    def __call__(self, x: Tensor, grid: Sequence[Point], noise: Noise, /) -> Steps:
        """Start the coroutine."""
        ...


@dataclass(frozen=True)
class Entry:
    """A registered sampler: its name, order of convergence, whether it draws noise, and its function.

    The function takes x, grid, noise and its own options as keywords; bind them with functools.partial.
    """

    name: str
    order: int
    stochastic: bool
    run: Callable[..., Steps]

    def __call__(self, x: Tensor, grid: Sequence[Point], noise: Noise, /) -> Steps:
        """Start the coroutine with default options."""
        return self.run(x, grid, noise)


SAMPLERS: dict[str, Entry] = {}


def sampler(
    name: str, order: int, stochastic: bool = False
) -> Callable[[Callable[..., Steps]], Callable[..., Steps]]:
    """Register a coroutine function under a name."""

    def register(run: Callable[..., Steps]) -> Callable[..., Steps]:
        SAMPLERS[name] = Entry(name, order, stochastic, run)
        return run

    return register


def get_sampler(name: str) -> Entry:
    """The sampler called `name`; ValueError with near misses."""
    return find(SAMPLERS, name, "sampler")


def evaluations(sampler: Sampler, grid: Sequence[Point]) -> list[Point]:
    """The points where a sampler would evaluate the network, found by a dry run on a scalar."""
    zero = torch.zeros((), dtype=torch.float64)
    points: list[Point] = []
    coroutine = sampler(zero, grid, torch.zeros_like)
    try:
        x, point = next(coroutine)
        while True:
            points.append(point)
            x, point = coroutine.send((x, zero))
    except StopIteration:
        return points


def move(x: Tensor, x0: Tensor, a: Point, b: Point) -> Tensor:
    """The exact step from a to b if x0 stayed constant: DDIM, Euler and flow Euler are this line."""
    r = b.sigma / a.sigma
    return r * x + (b.alpha - r * a.alpha) * x0


def ancestral(a: Point, b: Point, eta: float = 1.0) -> tuple[Point, float]:
    """Split a step to b into a deterministic part and fresh noise: (lower point to move to, noise to add).

    The noise is eta times the standard deviation of the forward process' posterior (Song et al. 2021,
    eq. 16), so that eta 1 is DDPM and Euler ancestral, and eta 0 adds none.
    """
    shrink = b.sigma * a.alpha / (a.sigma * b.alpha)
    up = min(eta * b.sigma * math.sqrt(max(1 - shrink**2, 0.0)), b.sigma)
    return Point(b.t, b.alpha, math.sqrt(b.sigma**2 - up**2)), up


class Straight:
    """Coordinates in which a path is straight: x / scale over s, of constant slope while x0 stays as it is.

    x / alpha over sigma / alpha in general; x over sigma where alpha + sigma = 1 (flow). A grid from pure
    noise, where the former is infinite, uses x / (alpha + sigma) over sigma / (alpha + sigma).
    """

    def __init__(self, grid: Sequence[Point]) -> None:
        flow = all(abs(p.alpha + p.sigma - 1) < 1e-9 for p in grid)
        self.by_alpha = not flow and all(p.alpha > 0 for p in grid)

    def scale(self, p: Point) -> float:
        """What x is divided by at a point."""
        return p.alpha if self.by_alpha else p.alpha + p.sigma

    def slope(self, x: Tensor, x0: Tensor, a: Point) -> Tensor:
        """The direction at a point where the clean picture is x0: eps, or eps - x0."""
        eps = (x - a.alpha * x0) / a.sigma
        return eps if self.by_alpha else eps - x0

    def advance(self, x: Tensor, slope: Tensor, a: Point, b: Point) -> Tensor:
        """The x at b, from a along a slope."""
        ds = b.sigma / self.scale(b) - a.sigma / self.scale(a)
        return self.scale(b) * (x / self.scale(a) + ds * slope)


class Turning:
    """The same with v for the direction, on a variance-preserving path (Salimans & Ho 2022, appendix D)."""

    def slope(self, x: Tensor, x0: Tensor, a: Point) -> Tensor:
        """v at a point where the clean picture is x0."""
        return (a.alpha * x - x0) / a.sigma

    def advance(self, x: Tensor, slope: Tensor, a: Point, b: Point) -> Tensor:
        """The x at b if v were the given one."""
        return move(x, a.alpha * x - a.sigma * slope, a, b)


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


@sampler("ddpm", order=1, stochastic=True)
def ddpm(
    x: Tensor, grid: Sequence[Point], noise: Noise, variance: Literal["small", "large"] = "small"
) -> Steps:
    """Ancestral sampling (Ho et al. 2020, algorithm 2).

    variance: of the noise: the posterior's ("small"), or on a variance-preserving path beta ("large").
    """
    for a, b in pairwise(grid):
        x, x0 = yield x, a
        down, up = ancestral(a, b)
        x = move(x, x0, a, down)
        if up > 0:
            std = up if variance == "small" else math.sqrt(1 - (a.alpha / b.alpha) ** 2)
            x = x + std * noise(x)
    return x


@sampler("euler_a", order=1, stochastic=True)
def euler_a(x: Tensor, grid: Sequence[Point], noise: Noise, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """Euler with ancestral noise, as in k-diffusion; s_noise scales the noise that is added."""
    for a, b in pairwise(grid):
        x, x0 = yield x, a
        down, up = ancestral(a, b, eta)
        x = move(x, x0, a, down)
        if up > 0:
            x = x + up * s_noise * noise(x)
    return x


@sampler("heun", order=2)
def heun(x: Tensor, grid: Sequence[Point], noise: Noise) -> Steps:
    """Heun's method (Karras et al. 2022, algorithm 1): an Euler step, then the mean of both ends' slopes."""
    line = Straight(grid)
    for a, b in pairwise(grid):
        x, x0 = yield x, a
        if b.sigma == 0:
            x = move(x, x0, a, b)
            continue
        x_b, x0_b = yield move(x, x0, a, b), b
        x = line.advance(x, (line.slope(x, x0, a) + line.slope(x_b, x0_b, b)) / 2, a, b)
    return x


@sampler("lms", order=2)
def lms(x: Tensor, grid: Sequence[Point], noise: Noise, history: int = 4) -> Steps:
    """Linear multistep, as in k-diffusion: Adams-Bashforth on an uneven grid, from up to `history` slopes.

    The first steps have fewer slopes to look back on, which bounds the order of the whole at 2.
    """
    line = Straight(grid)
    where = [p.sigma / line.scale(p) for p in grid]
    past: list[Tensor] = []  # newest first
    for i, (a, b) in enumerate(pairwise(grid)):
        x, x0 = yield x, a
        past = [line.slope(x, x0, a), *past][:history]
        weights = lagrange_means(where[i::-1][: len(past)], where[i], where[i + 1])
        x = line.advance(x, weighted(weights, past), a, b)
    return x


def weighted(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """The weighted sum of slopes."""
    return torch.stack([w * slope for w, slope in zip(weights, slopes, strict=True)]).sum(0)


def lagrange_means(nodes: Sequence[float], low: float, high: float) -> list[float]:
    """The mean of each node's Lagrange polynomial from low to high, exact by Gauss-Legendre quadrature."""
    where, weight = np.polynomial.legendre.leggauss((len(nodes) + 1) // 2)
    tau = (high - low) / 2 * where + (high + low) / 2
    basis = [math.prod((tau - m) / (n - m) for m in nodes if m != n) for n in nodes]
    return [float(np.sum(weight * b) / 2) for b in basis]


@sampler("plms", order=2)
def plms(
    x: Tensor,
    grid: Sequence[Point],
    noise: Noise,
    warmup: Literal["heun", "runge_kutta", "none"] = "heun",
    middle: Sequence[Point] = (),
    mix: Literal["slope", "v"] = "slope",
) -> Steps:
    """Pseudo linear multistep (Liu et al. 2022, PNDM): even-grid Adams-Bashforth weights on slopes.

    warmup: how the history begins: "heun" evaluates the second point twice (S-PNDM), "runge_kutta" makes the
            first steps with four evaluations each and needs `middle`, their midpoints (F-PNDM), "none" starts
            with Euler.
    mix:    what is weighted: slopes (eps on a variance-preserving path), or v, which diffusers does for models
            that say v and which is of first order only.
    """
    line: Straight | Turning = Straight(grid) if mix == "slope" else Turning()
    past: list[Tensor] = []  # newest first
    for i, (a, b) in enumerate(pairwise(grid)):
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


def extrapolated(
    x0: Tensor,
    old: Tensor | None,
    points: tuple[Point, Point, Point],
    h: float,
    rule: Literal["midpoint", "heun"],
) -> Tensor:
    """x0 extrapolated in log-SNR into the coming step, from itself and the one before (Lu et al. 2022).

    points: before, here, next. h: the step in log-SNR, times 1 + eta when noise is added.
    """
    before, a, b = points
    if old is None or math.isinf(h):
        return x0
    last = a.log_snr - before.log_snr  # infinite after a step from pure noise, which extrapolates nothing
    weight = 0.5 if rule == "midpoint" else -1 / math.expm1(-h) - 1 / h
    return x0 + weight * (b.log_snr - a.log_snr) / last * (x0 - old)


@sampler("dpmpp_2m", order=2)
def dpmpp_2m(
    x: Tensor,
    grid: Sequence[Point],
    noise: Noise,
    rule: Literal["midpoint", "heun"] = "midpoint",
    euler_at_final: bool = False,
) -> Steps:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); a step to sigma 0 is first order by nature.

    euler_at_final: make the last step first order also where the grid ends above sigma 0.
    """
    old, before = None, grid[0]
    for i, (a, b) in enumerate(pairwise(grid)):
        x, x0 = yield x, a
        if euler_at_final and i == len(grid) - 2:
            old = None
        x = move(x, extrapolated(x0, old, (before, a, b), b.log_snr - a.log_snr, rule), a, b)
        old, before = x0, a
    return x


@sampler("dpmpp_2m_sde", order=1, stochastic=True)
def dpmpp_2m_sde(
    x: Tensor,
    grid: Sequence[Point],
    noise: Noise,
    eta: float = 1.0,
    s_noise: float = 1.0,
    rule: Literal["midpoint", "heun"] = "midpoint",
    euler_at_final: bool = False,
) -> Steps:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, section 5): dpmpp_2m with fresh noise, scaled by eta."""
    old, before = None, grid[0]
    for i, (a, b) in enumerate(pairwise(grid)):
        x, x0 = yield x, a
        if euler_at_final and i == len(grid) - 2:
            old = None
        h = b.log_snr - a.log_snr
        down = Point(b.t, b.alpha, b.sigma * math.exp(-eta * h) if eta > 0 else b.sigma)
        up = math.sqrt(b.sigma**2 - down.sigma**2)
        x = move(x, extrapolated(x0, old, (before, a, b), (1 + eta) * h, rule), a, down)
        if up > 0:
            x = x + up * s_noise * noise(x)
        old, before = x0, a
    return x
