"""Two models on one way: the first goes along the grid to a noise level, the second goes on from there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from sfumato.diffusion.path import Point
from sfumato.diffusion.samplers import Sampler, evaluations
from sfumato.diffusion.samplers.base import Noise, Steps
from sfumato.diffusion.scheduler import Plan, Scheduler
from sfumato.models.tiny import TinyConfig
from sfumato.presets import Preset


def before(grid: Sequence[Point], share: float, scheduler: Scheduler) -> int:
    """How many steps of a grid begin at a noise level of the first `share` of the model's training levels.

    The levels are counted as diffusers counts them for denoising_end and denoising_start.
    """
    levels = getattr(scheduler, "num_train_timesteps", 1000)
    cutoff = round(levels - share * levels)
    return sum(point.t >= cutoff for point in grid[:-1])


def until(sampler: Sampler, grid: Sequence[Point], steps: int) -> Sampler:
    """The sampler that stops after so many steps of the grid, where it would next begin one, with the noise there.

    Raises ValueError for a sampler that finds its own points, or that does not go by way of the grid's.
    """
    asked = evaluations(sampler, grid)
    last = max((i for i, point in enumerate(asked) if point == grid[steps]), default=None)
    if last is None:
        raise ValueError("this sampler finds its own way between the points, so no refiner can take over; take another")
    return partial(_first, sampler, last)


def _first(sampler: Sampler, count: int, x: Tensor, grid: Sequence[Point], noise: Noise) -> Steps:
    """The first `count` evaluations of a sampler; then where it stands."""
    inner = sampler(x, grid, noise)
    at, point = next(inner)
    for _ in range(count):
        answer = yield at, point
        at, point = inner.send(answer)
    inner.close()
    return at


def rest(plan: Plan, share: float, scheduler: Scheduler) -> tuple[Sampler, Sequence[Point]]:
    """The sampler and the points of the second model; ValueError where nothing is left to it."""
    done = before(plan.grid, share, scheduler)
    if done == len(plan.grid) - 1:
        raise ValueError(f"refiner_start = {share:g} leaves no step to the refiner; give less, or more steps")
    return plan.sampler if done == 0 else plan.midway or plan.sampler, plan.grid[done:]


def check_share(grid: Sequence[Point], share: float, scheduler: Scheduler) -> int:
    """The steps of the first model; ValueError where there are none, or none for the second."""
    steps = before(grid, share, scheduler)
    if not 0 < steps < len(grid) - 1:
        who = "to the model" if steps == 0 else "to the refiner"
        raise ValueError(f"refiner_start = {share:g} of {len(grid) - 1} steps leaves none {who}; give another share")
    return steps


def check_pair(first: Preset, second: Preset, name: str) -> None:
    """ValueError unless the second model goes on with the first one's latents."""
    # A tiny autoencoder says nothing of the scale: its latents are scaled.
    scaled = not any(isinstance(p.vae, TinyConfig) for p in (first, second))
    kinds = [(p.vae.latent_channels, p.vae.factor, p.vae.scaling_factor * scaled) for p in (first, second)]
    if kinds[0] != kinds[1] or second.task != "text":
        raise ValueError(
            f"refiner = {name} is {second.title}, which does not go on with the latents of {first.title}; "
            "name a model of the same family"
        )
