"""What samplers are made of: the registry, the exact step, the split into a step and noise, and coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..path import Point
from ..registry import find

Steps = Generator[tuple[Tensor, Point], tuple[Tensor, Tensor], Tensor]
Noise = Callable[[Tensor], Tensor]


@runtime_checkable
class BrownianNoise(Protocol):
    """Noise that also knows a Brownian path."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """Fresh standard noise like x."""
        ...

    def between(self, x: Tensor, a: Point, b: Point, /) -> Tensor:
        """The path's increment from a to b, like x and in standard deviations."""
        ...


class Sampler(Protocol):
    """A sampler with its own options bound: from x, grid and noise to a coroutine."""

    def __call__(self, x: Tensor, grid: Sequence[Point], noise: Noise, /) -> Steps:
        """Start the coroutine."""
        ...


@dataclass(frozen=True)
class Entry:
    """A registered sampler.

    name:       what people call it.
    order:      of convergence on smooth grids, without noise.
    stochastic: it draws noise.
    run:        the function: takes x, grid, noise and its own options as keywords; bind them with
                functools.partial.
    adaptive:   it finds its own points while it runs, so nobody can list or count them before.
    ends:       of a grid it takes the ends, and lays its own points in between.
    """

    name: str
    order: int
    stochastic: bool
    run: Callable[..., Steps]
    adaptive: bool = False
    ends: bool = False

    def __call__(self, x: Tensor, grid: Sequence[Point], noise: Noise, /) -> Steps:
        """Start the coroutine with default options."""
        return self.run(x, grid, noise)


SAMPLERS: dict[str, Entry] = {}


def sampler(
    name: str, order: int, stochastic: bool = False, adaptive: bool = False, ends: bool = False
) -> Callable[[Callable[..., Steps]], Callable[..., Steps]]:
    """Register a coroutine function under a name."""

    def register(run: Callable[..., Steps]) -> Callable[..., Steps]:
        SAMPLERS[name] = Entry(name, order, stochastic, run, adaptive, ends)
        return run

    return register


def get_sampler(name: str) -> Entry:
    """The sampler called `name`; ValueError with near misses."""
    return find(SAMPLERS, name, "sampler")


def evaluations(sampler: Sampler, grid: Sequence[Point]) -> list[Point]:
    """The points where a sampler would evaluate the network, found by a dry run on a scalar.

    Empty for a sampler that finds its points while it runs: how many is then unknown.
    """
    run: object = sampler
    while isinstance(run, partial):
        run = run.func
    if any(entry.adaptive and run in (entry, entry.run) for entry in SAMPLERS.values()):
        return []
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


def between(a: Point, b: Point, share: float = 0.5) -> Point:
    """The point of a's path that lies a share of the way from a to b in log-SNR, which must be finite there."""
    if a.path is None:
        raise ValueError(f"no path is known for {a}, so nothing in between; take points from a path, not by hand")
    return a.path.at_ratio(math.exp(-(1 - share) * a.log_snr - share * b.log_snr))


def ancestral(a: Point, b: Point, eta: float = 1.0) -> tuple[Point, float]:
    """Split a step to b into a deterministic part and fresh noise: (lower point to move to, noise to add).

    The noise is eta times the standard deviation of the forward process' posterior (Song et al. 2021,
    eq. 16), so that eta 1 is DDPM and Euler ancestral, and eta 0 adds none.
    """
    shrink = b.sigma * a.alpha / (a.sigma * b.alpha)
    up = min(eta * b.sigma * math.sqrt(max(1 - shrink**2, 0.0)), b.sigma)
    return replace(b, sigma=math.sqrt(b.sigma**2 - up**2)), up


def renoise(x: Tensor, a: Point, b: Point, noise: Noise) -> Tensor:
    """The forward process from a to b, which has more noise: x shrinks with alpha, and noise fills up."""
    shrink = b.alpha / a.alpha
    std = math.sqrt(max(b.sigma**2 - (shrink * a.sigma) ** 2, 0.0))
    return shrink * x + std * noise(x) if std > 0 else shrink * x


def increment(noise: Noise, x: Tensor, a: Point, b: Point) -> Tensor:
    """What a Brownian path adds from a to b, like x and in standard deviations.

    Where the noise knows a path, the same stretch gives the same increment in every grid. Else it is fresh
    noise, which is a path's as long as a sampler asks for stretches that follow one another.
    """
    return noise.between(x, a, b) if isinstance(noise, BrownianNoise) else noise(x)


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


class Noisy:
    """The same with eps for the direction on every path; where it advances from, alpha counts as 1e-8 at least."""

    def slope(self, x: Tensor, x0: Tensor, a: Point) -> Tensor:
        """eps at a point where the clean picture is x0."""
        return (x - a.alpha * x0) / a.sigma

    def advance(self, x: Tensor, slope: Tensor, a: Point, b: Point) -> Tensor:
        """The x at b if eps were the given one."""
        return move(x, (x - a.sigma * slope) / max(a.alpha, 1e-8), a, b)


def weighted(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """The weighted sum of slopes."""
    return torch.stack([w * slope for w, slope in zip(weights, slopes, strict=True)]).sum(0)


def lagrange(nodes: Sequence[float], where: np.ndarray) -> list[np.ndarray]:
    """Each node's Lagrange polynomial at some places."""
    one = np.ones_like(where)
    return [math.prod(((where - m) / (n - m) for m in nodes if m != n), start=one) for n in nodes]


def quadrature(low: float, high: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre places and weights for the integral from low to high; exact up to degree 2 count - 1."""
    where, weight = np.polynomial.legendre.leggauss(count)
    return (high - low) / 2 * where + (high + low) / 2, (high - low) / 2 * weight


def lagrange_means(nodes: Sequence[float], low: float, high: float) -> list[float]:
    """The mean of each node's Lagrange polynomial from low to high, exact by Gauss-Legendre quadrature."""
    where, weight = np.polynomial.legendre.leggauss((len(nodes) + 1) // 2)
    tau = (high - low) / 2 * where + (high + low) / 2
    return [float(np.sum(weight * b) / 2) for b in lagrange(nodes, tau)]
