"""Grids: lists of points from noise to data, by spacing. Each spacing works on every path."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from .path import END, Path, Point
from .registry import find

Spacing = Callable[[Path, int, int, float | None], list[Point]]
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


def make_grid(path: Path, spacing: str, steps: int, steps_offset: int = 0, rho: float | None = None) -> list[Point]:
    """steps + 1 points from noise to data, the last with sigma 0.

    spacing: a name in SPACINGS. steps_offset: added to each index by "leading". rho: curvature of "karras"
    (7 by default) and of "polyexponential" (1).
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


def beta_quantile(share: float, a: float = 0.6, b: float = 0.6) -> float:
    """The quantile of the Beta(a, b) distribution at a share in 0..1, by halving an interval."""
    if share <= 0 or share >= 1:
        return float(share >= 1)
    low, high = 0.0, 1.0
    whole = math.gamma(a) * math.gamma(b) / math.gamma(a + b)
    for _ in range(60):
        middle = (low + high) / 2
        below = beta_mass(middle, a, b) if middle <= 0.5 else whole - beta_mass(1 - middle, b, a)
        low, high = (middle, high) if below < share * whole else (low, middle)
    return (low + high) / 2


def beta_mass(x: float, a: float, b: float) -> float:
    """The integral of t^(a - 1) (1 - t)^(b - 1) from 0 to x, at most 1/2, by the series of its second factor."""
    total, term = 0.0, 1.0
    for k in range(60):  # each term is less than half of the one before
        total += term / (a + k)
        term *= (k + 1 - b) / (k + 1) * x
    return x**a * total


def beta_levels(high: float, low: float, steps: int) -> list[float]:
    """Noise levels at quantiles of Beta(0.6, 0.6) (Lee et al. 2024), as diffusers places them."""
    return [low + (high - low) * beta_quantile(1 - i / max(steps - 1, 1)) for i in range(steps)]


def level_range(path: Path) -> tuple[float, float]:
    """The highest and the lowest noise level of a path's schedule."""
    return path.level(path.place(path.num_train_timesteps - 1)), path.level(path.place(path.last_index))


@spacing("leading")
def leading(path: Path, steps: int, steps_offset: int, rho: float | None) -> list[Point]:
    """Multiples of N // steps plus an offset: never quite starts at pure noise (DDIM, Stable Diffusion 1)."""
    return [path.place(i) for i in leading_indices(steps, path.num_train_timesteps, steps_offset)]


@spacing("trailing")
def trailing(path: Path, steps: int, steps_offset: int, rho: float | None) -> list[Point]:
    """Counted down from the last training step, to start where training ended (Lin et al. 2023)."""
    return [path.place(i) for i in trailing_indices(steps, path.num_train_timesteps)]


@spacing("linspace")
def linspace(path: Path, steps: int, steps_offset: int, rho: float | None) -> list[Point]:
    """Evenly spaced between the first and the last training step, both included."""
    return [path.place(i) for i in linspace_indices(steps, path.num_train_timesteps - 1, path.last_index)]


@spacing("karras")
def karras(path: Path, steps: int, steps_offset: int, rho: float | None) -> list[Point]:
    """Denser near the data, by level ** (1 / rho) (Karras et al. 2022, eq. 5)."""
    return [path.at_level(level) for level in karras_levels(*level_range(path), steps, 7.0 if rho is None else rho)]


@spacing("exponential")
def exponential(path: Path, steps: int, steps_offset: int, rho: float | None) -> list[Point]:
    """Evenly spaced in log level, which on a variance-preserving path is even in log-SNR."""
    return [path.at_level(level) for level in exponential_levels(*level_range(path), steps)]


@spacing("polyexponential")
def polyexponential(path: Path, steps: int, steps_offset: int, rho: float | None) -> list[Point]:
    """Log levels on a curve of power rho, as in k-diffusion; with rho = 1, its default, "exponential"."""
    high, low = (math.log(level) for level in level_range(path))
    shares = [(1 - i / max(steps - 1, 1)) ** (1.0 if rho is None else rho) for i in range(steps)]
    return [path.at_level(math.exp(low + (high - low) * share)) for share in shares]


@spacing("sgm_uniform")
def sgm_uniform(path: Path, steps: int, steps_offset: int, rho: float | None) -> list[Point]:
    """Evenly spaced training steps that end one step before the first (Stability AI's generative-models)."""
    return [path.place(i) for i in linspace_indices(steps + 1, path.num_train_timesteps - 1, path.last_index)[:-1]]


@spacing("simple")
def simple(path: Path, steps: int, steps_offset: int, rho: float | None) -> list[Point]:
    """Every N / steps-th training step counted down from the last, cut to whole ones (ComfyUI)."""
    n = path.num_train_timesteps
    return [path.place(n - 1 - math.floor(i * n / steps)) for i in range(steps)]


@spacing("normal")
def normal(path: Path, steps: int, steps_offset: int, rho: float | None) -> list[Point]:
    """ComfyUI's name for "linspace"."""
    return linspace(path, steps, steps_offset, rho)


@spacing("ddim_uniform")
def ddim_uniform(path: Path, steps: int, steps_offset: int, rho: float | None) -> list[Point]:
    """Multiples of N // steps plus one, as the first DDIM code has it: "leading" with an offset of 1."""
    return leading(path, steps, 1, rho)


@spacing("beta")
def beta(path: Path, steps: int, steps_offset: int, rho: float | None) -> list[Point]:
    """Denser at both ends: training steps at quantiles of Beta(0.6, 0.6) (Lee et al. 2024)."""
    high, low = path.num_train_timesteps - 1, path.last_index
    return [path.place(low + (high - low) * beta_quantile(1 - i / steps)) for i in range(steps)]


@spacing("kl_optimal")
def kl_optimal(path: Path, steps: int, steps_offset: int, rho: float | None) -> list[Point]:
    """Evenly spaced in the arctangent of the level, best for Gaussian data (Sabour et al. 2024, section 3.1)."""
    top, bottom = level_range(path)
    high, low = math.atan(top), math.atan(bottom)
    angles = [high + (low - high) * i / max(steps - 1, 1) for i in range(steps)]
    return [path.at_level(min(math.tan(angle), top) if i else top) for i, angle in enumerate(angles)]


# The noise levels of 10 steps and their end that Sabour et al. 2024 publish, by model.
ALIGNED = {
    "sd": (
        14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092,
        0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582,
    ),
    "sdxl": (
        14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141,
        0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582,
    ),
    "svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}  # fmt: skip


@spacing("align_your_steps")
def align_your_steps(path: Path, steps: int, steps_offset: int, rho: float | None) -> list[Point]:
    """The levels that were optimised for Stable Diffusion 1 (Sabour et al. 2024, Align Your Steps)."""
    return aligned(path, steps, ALIGNED["sd"])


@spacing("align_your_steps_sdxl")
def align_your_steps_sdxl(path: Path, steps: int, steps_offset: int, rho: float | None) -> list[Point]:
    """The levels that were optimised for SDXL (Sabour et al. 2024, Align Your Steps)."""
    return aligned(path, steps, ALIGNED["sdxl"])


@spacing("align_your_steps_svd")
def align_your_steps_svd(path: Path, steps: int, steps_offset: int, rho: float | None) -> list[Point]:
    """The levels that were optimised for Stable Video Diffusion (Sabour et al. 2024, Align Your Steps)."""
    return aligned(path, steps, ALIGNED["svd"])


def aligned(path: Path, steps: int, table: Sequence[float]) -> list[Point]:
    """A table of sigma / alpha brought to a number of steps, linearly in its logarithm; its end is left out.

    Always from the first point of the schedule. A table that reaches beyond the schedule is shrunk to it.
    """
    first, last = path.place(path.num_train_timesteps - 1), path.place(path.last_index)
    logs = np.log(table)
    high, low = min(math.log(first.ratio), logs[0]), max(math.log(last.ratio), logs[-1])
    logs = low + (logs - logs[-1]) * (high - low) / (logs[0] - logs[-1])
    levels = np.exp(np.interp(np.linspace(0, len(table) - 1, steps + 1), np.arange(len(table)), logs))
    return [first, *(path.at_ratio(float(level)) for level in levels[1:-1])]
