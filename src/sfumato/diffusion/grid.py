"""Grids: lists of points from noise to data, by spacing. Each spacing works on every path."""

from __future__ import annotations

import math
from collections.abc import Callable

from .path import END, Path, Point
from .registry import find

Spacing = Callable[[Path, int, int, float], list[Point]]
SPACINGS: dict[str, Spacing] = {}


def spacing(name: str) -> Callable[[Spacing], Spacing]:
    """Register a function (path, steps, steps_offset, rho) -> points, without the end, under a name."""

    def register(function: Spacing) -> Spacing:
        SPACINGS[name] = function
        return function

    return register


def get_spacing(name: str) -> Spacing:
    """The spacing called `name`; ValueError with near misses."""
    return find(SPACINGS, name, "spacing")


def make_grid(path: Path, spacing: str, steps: int, steps_offset: int = 0, rho: float = 7.0) -> list[Point]:
    """steps + 1 points from noise to data, the last with sigma 0.

    spacing: a name in SPACINGS. steps_offset: added to each index by "leading". rho: curvature of "karras".
    ValueError for an unknown spacing or a number of steps outside 1..N.
    """
    if not 1 <= steps <= path.num_train_timesteps:
        raise ValueError(f"steps must be between 1 and {path.num_train_timesteps}, got {steps}")
    return [*get_spacing(spacing)(path, steps, steps_offset, rho), END]


def leading_indices(steps: int, n: int, offset: int = 0) -> list[float]:
    """Multiples of n // steps from 0 up, plus an offset where there is room for it, in falling order."""
    ratio = n // steps
    offset = min(offset, n - 1 - (steps - 1) * ratio)
    return [float(i * ratio + offset) for i in reversed(range(steps))]


def trailing_indices(steps: int, n: int) -> list[float]:
    """Every n / steps-th index counted down from n - 1, rounded."""
    return [float(round(n - i * (n / steps)) - 1) for i in range(steps)]


def linspace_indices(steps: int, high: float, low: float = 0.0) -> list[float]:
    """Evenly spaced indices from high to low, both included; fractional."""
    return [high + (low - high) * i / (steps - 1) for i in range(steps)] if steps > 1 else [high]


def karras_levels(high: float, low: float, steps: int, rho: float = 7.0) -> list[float]:
    """Noise levels evenly spaced in level ** (1 / rho) (Karras et al. 2022, eq. 5)."""
    a, b = high ** (1 / rho), low ** (1 / rho)
    return [(a + (b - a) * i / max(steps - 1, 1)) ** rho for i in range(steps)]


def exponential_levels(high: float, low: float, steps: int) -> list[float]:
    """Noise levels evenly spaced in their logarithm."""
    a, b = math.log(high), math.log(low)
    return [math.exp(a + (b - a) * i / max(steps - 1, 1)) for i in range(steps)]


def level_range(path: Path) -> tuple[float, float]:
    """The highest and the lowest noise level of a path's schedule."""
    return path.level(path.place(path.num_train_timesteps - 1)), path.level(path.place(path.last_index))


@spacing("leading")
def leading(path: Path, steps: int, steps_offset: int, rho: float) -> list[Point]:
    """Multiples of N // steps plus an offset: never quite starts at pure noise (DDIM, Stable Diffusion 1)."""
    return [path.place(i) for i in leading_indices(steps, path.num_train_timesteps, steps_offset)]


@spacing("trailing")
def trailing(path: Path, steps: int, steps_offset: int, rho: float) -> list[Point]:
    """Counted down from the last training step, to start where training ended (Lin et al. 2023)."""
    return [path.place(i) for i in trailing_indices(steps, path.num_train_timesteps)]


@spacing("linspace")
def linspace(path: Path, steps: int, steps_offset: int, rho: float) -> list[Point]:
    """Evenly spaced between the first and the last training step, both included."""
    return [path.place(i) for i in linspace_indices(steps, path.num_train_timesteps - 1, path.last_index)]


@spacing("karras")
def karras(path: Path, steps: int, steps_offset: int, rho: float) -> list[Point]:
    """Denser near the data, by level ** (1 / rho) (Karras et al. 2022, eq. 5)."""
    return [path.at_level(level) for level in karras_levels(*level_range(path), steps, rho)]


@spacing("exponential")
def exponential(path: Path, steps: int, steps_offset: int, rho: float) -> list[Point]:
    """Evenly spaced in log level, which on a variance-preserving path is even in log-SNR."""
    return [path.at_level(level) for level in exponential_levels(*level_range(path), steps)]
