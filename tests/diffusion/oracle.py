"""Gaussian data, for which the ideal denoiser and the sampling ODE's end point are closed forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sfumato.diffusion import FlowPath, Point, VEPath, VPPath, betas
from sfumato.diffusion.grid import exponential_levels, linspace_indices
from sfumato.diffusion.samplers import Noise, Sampler

MEAN, DEVIATION = 0.7, 0.4
VP = VPPath(betas("scaled_linear", 1000, 0.00085, 0.012))
VE = VEPath()
FLOW = FlowPath()


def denoise(x: Tensor, a: Point) -> Tensor:
    """E[x0 | x] for data N(MEAN, DEVIATION²)."""
    gain = a.alpha * DEVIATION**2 / (a.alpha**2 * DEVIATION**2 + a.sigma**2)
    return MEAN + gain * (x - a.alpha * MEAN)


def spread(a: Point) -> float:
    """The standard deviation of noisy data at a point."""
    return (a.alpha**2 * DEVIATION**2 + a.sigma**2) ** 0.5


def end_point(x: Tensor, a: Point, b: Point) -> Tensor:
    """Where the probability-flow ODE carries x from a to b: it keeps the distance to the mean in deviations."""
    return b.alpha * MEAN + spread(b) / spread(a) * (x - a.alpha * MEAN)


def consistent(x: Tensor, a: Point) -> Tensor:
    """Where the ODE ends at the data, which is what distilled networks are to foresee."""
    return end_point(x, a, Point(0.0, 1.0, 0.0))


def run(
    sampler: Sampler,
    x: Tensor,
    grid: Sequence[Point],
    noise: Noise = torch.zeros_like,
    foresee: Callable[[Tensor, Point], Tensor] = denoise,
) -> Tensor:
    """A sampler with the ideal denoiser, or another."""
    steps = sampler(x, grid, noise)
    try:
        x, point = next(steps)
        while True:
            x, point = steps.send((x, foresee(x, point)))
    except StopIteration as stop:
        return stop.value


def smooth_grid(path: VPPath | VEPath | FlowPath, steps: int) -> list[Point]:
    """A grid that halves cleanly and keeps away from the ends, where steps are singular."""
    if isinstance(path, FlowPath):
        return [path.at_level(s) for s in linspace_indices(steps + 1, 0.9, 0.1)]
    return [path.at_level(s) for s in exponential_levels(5.0, 0.2, steps + 1)]
