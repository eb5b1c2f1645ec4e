"""Starts: where a task's denoising begins. A task is its start; none has a loop of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sfumato.diffusion.path import Point
from sfumato.diffusion.scheduler import Plan


@dataclass(frozen=True)
class Start:
    """One picture before its first step.

    x:      the noisy latent (1, C, h, w), float32, at grid[0].
    grid:   the points to visit, from noise to data.
    concat: further input channels for the network (1, C', h, w); None where the task has none.
    """

    x: Tensor
    grid: Sequence[Point]
    concat: Tensor | None = None


def text_to_image(eps: Tensor, plan: Plan) -> Start:
    """Begin from nothing but noise: eps (1, C, h, w), standard normal, at the first point of the plan."""
    return Start(eps * plan.init_scale, plan.grid)
