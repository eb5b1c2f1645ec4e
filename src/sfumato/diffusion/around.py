"""Guidances around another guidance: they add a question, bound where it acts, or change its clean picture.

Each takes any guidance for `inner`, and so they nest. Those that compare with the conditional answer need it to be
the first that `inner` asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..cond import Cond
from .guidance import Guidance, Query, Turns, anchor_of, condition_at
from .path import Point
from .prediction import Prediction


@dataclass(frozen=True, eq=False)
class PAG:
    """Perturbed-attention guidance (Ahn et al. 2024, eq. 15): away from what the network says with its insides changed.

    cond:    what `inner` asks for first.
    scale:   weight of the difference, added to what `inner` makes; 0 asks nothing more.
    perturb: the name of the change; the network is handed it.
    """

    inner: Guidance
    cond: Cond | Turns
    scale: float
    perturb: str = "identity_attention:mid"

    def ask(self, x: Tensor, point: Point) -> list[Query]:
        """The questions of `inner`, and the perturbed one after them."""
        asked = self.inner.ask(x, point)
        return asked if self.scale == 0 else [*asked, Query(x, point, condition_at(self.cond, point), self.perturb)]

    def combine(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor:
        """inner + scale * (cond - perturbed)."""
        if self.scale == 0:
            return self.inner.combine(x, point, answers)
        *others, perturbed = answers
        return self.inner.combine(x, point, others) + self.scale * (others[0] - perturbed)

    def anchor(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor | None:
        """That of `inner`."""
        return anchor_of(self.inner, x, point, answers if self.scale == 0 else answers[:-1])


def skipping(
    inner: Guidance, cond: Cond | Turns, scale: float, layers: str, shares: Sequence[float], grid: Sequence[Point]
) -> Guidance:
    """Skip-layer guidance in the steps that lie between two shares of a grid's, `inner` in the others.

    cond, scale: see `PAG`; layers: numbers of a transformer's blocks, such as "7,8,9".
    """
    levels = levels_inside(grid, shares)
    return inner if levels is None else Within(PAG(inner, cond, scale, f"skip_layers:{layers}"), inner, levels)


@dataclass(frozen=True, eq=False)
class Rescale:
    """What `inner` makes, brought back to the deviation of the conditional answer (Lin et al. 2023, section 3.4).

    amount:     0 leaves it as it is, 1 is all the way; the paper's phi.
    prediction: what the network says: the deviations are those of its output, as in diffusers.
    """

    inner: Guidance
    amount: float
    prediction: Prediction

    def ask(self, x: Tensor, point: Point) -> list[Query]:
        """The questions of `inner`."""
        return self.inner.ask(x, point)

    def combine(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor:
        """The rescaled picture; where one question was asked, its answer."""
        x0 = self.inner.combine(x, point, answers)
        if len(answers) == 1 or self.amount == 0:
            return x0
        cond, guided = (self.output(x, y, point) for y in (answers[0], x0))
        axes = tuple(range(1, x.ndim))
        ratio = cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True)  # (B, 1, 1, 1)
        return self.prediction.x0(x, (self.amount * ratio + 1 - self.amount) * guided, point)

    def output(self, x: Tensor, x0: Tensor, point: Point) -> Tensor:
        """What the network would have said for a clean picture."""
        return self.prediction.target(x0, (x - point.alpha * x0) / point.sigma, point)

    def anchor(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor | None:
        """That of `inner`."""
        return anchor_of(self.inner, x, point, answers)


@dataclass(frozen=True, eq=False)
class Within:
    """Guidance in an interval of noise levels (Kynkäänniemi et al. 2024).

    inner, outside: inside and outside of it; `Plain` outside asks only once there.
    interval:       (low, high) of sigma / alpha, both included.
    """

    inner: Guidance
    outside: Guidance
    interval: tuple[float, float]

    def at(self, point: Point) -> Guidance:
        """The one of the two that acts at a point."""
        low, high = self.interval
        return self.inner if low <= point.ratio <= high else self.outside

    def ask(self, x: Tensor, point: Point) -> list[Query]:
        """The questions of the one that acts here."""
        return self.at(point).ask(x, point)

    def combine(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor:
        """The picture of the one that acts here."""
        return self.at(point).combine(x, point, answers)

    def anchor(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor | None:
        """That of the one that acts here."""
        return anchor_of(self.at(point), x, point, answers)


def levels_of(grid: Sequence[Point], shares: Sequence[float]) -> tuple[float, float]:
    """The interval of sigma / alpha that the steps between two shares of a grid's steps fill.

    shares: (0.2, 0.8) leaves out the first and the last fifth of the steps; step i is in it from
            low * steps <= i < high * steps, both rounded down, counted from 0. An evaluation between two points of
            the grid belongs to the step that it lies in.
    Raises ValueError where no step is left.
    """
    steps = len(grid) - 1
    first, stop = (int(share * steps + 1e-9) for share in shares)
    if first >= stop:
        raise ValueError(
            f"guidance_interval = {shares[0]:g},{shares[1]:g} holds none of {steps} steps; "
            f"give a wider one, or more steps"
        )
    return levels_between(grid, first, stop)


def levels_inside(grid: Sequence[Point], shares: Sequence[float]) -> tuple[float, float] | None:
    """The same as `levels_of` for the steps i that lie between both shares, low * steps < i < high * steps.

    So diffusers counts the steps of skip-layer guidance: from 0.01 on leaves out the first step alone. None where no
    step lies there.
    """
    steps = len(grid) - 1
    first, stop = math.floor(shares[0] * steps + 1e-9) + 1, math.ceil(shares[1] * steps - 1e-9)
    return levels_between(grid, first, stop) if first < stop else None


def levels_between(grid: Sequence[Point], first: int, stop: int) -> tuple[float, float]:
    """The interval of sigma / alpha that the steps from `first` to before `stop` fill."""
    high = math.inf if first == 0 else grid[first].ratio
    return (0.0 if stop == len(grid) - 1 else math.nextafter(grid[stop].ratio, math.inf)), high


@dataclass(eq=False)
class Limited:
    """What `inner` makes, brought into a range. It remembers the picture before that for the anchor.

    limit:     the clean picture (B, C, H, W) brought into its range, e.g. `thresholded`, or a scheduler's `limit`.
    keeps_eps: whether the noise stays the one seen beside the picture that was not limited, as in DDIM.
    """

    inner: Guidance
    limit: Callable[[Tensor], Tensor]
    keeps_eps: bool = False
    free: Tensor | None = field(default=None, init=False, repr=False)

    def ask(self, x: Tensor, point: Point) -> list[Query]:
        """The questions of `inner`."""
        return self.inner.ask(x, point)

    def combine(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor:
        """The picture of `inner` in its range."""
        self.free = self.inner.combine(x, point, answers)
        return self.limit(self.free)

    def anchor(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor | None:
        """That of `inner`, or the picture that was not limited."""
        inner = anchor_of(self.inner, x, point, answers)
        return self.free if inner is None and self.keeps_eps else inner


def thresholded(x0: Tensor, quantile: float, limit: float = 1.0) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): (B, C, H, W) to the same within -limit..limit.

    quantile: of the absolute values of each picture; where it exceeds the limit, it is what clips, and the
              picture is shrunk so that it becomes the limit.
    """
    s = x0.flatten(1).abs().quantile(quantile, dim=1).clamp(min=limit)  # (B,)
    s = s.view(-1, *[1] * (x0.ndim - 1))
    return torch.minimum(torch.maximum(x0, -s), s) * (limit / s)
