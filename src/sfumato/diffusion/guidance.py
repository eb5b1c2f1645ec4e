"""Guidance: what to ask the network at a point, and what to make of the answers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..cond import Cond
from .path import Point


@dataclass(frozen=True, eq=False)
class Query:
    """One question to the network: x (B, C, H, W) at a point under a condition.

    perturb: name of a change to the network's insides (a perturbed-attention pass, say); None asks it as it
    is.
    """

    x: Tensor
    point: Point
    cond: Cond
    perturb: str | None = None


@dataclass(frozen=True, eq=False)
class Turns:
    """A condition that changes along a grid: `Plain`, `CFG` and `InstructCFG` take one wherever they take a Cond.

    conds: (last step, Cond) in order, steps counted from 1; the last one holds to the end of the grid.
    grid:  the points that the sampler is given, from noise to data; step i leads from grid[i - 1] to grid[i].

    A point belongs to the step in which its noise level lies, a point of the grid to the step that begins there. So
    the second evaluation of a midpoint rule counts to its own step. Heun's, at the end of a step, counts to the next
    step: the slope there is the one that the next step begins with.
    Raises ValueError for steps that do not rise or do not reach the end of the grid.
    """

    conds: Sequence[tuple[int, Cond]]
    grid: Sequence[Point]
    levels: list[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ends = [end for end, _ in self.conds]
        steps = len(self.grid) - 1
        if not ends or ends[0] < 1 or ends != sorted(set(ends)) or ends[-1] < steps:
            raise ValueError(f"conditions up to the steps {ends}; give rising ones, the last at least {steps}")
        object.__setattr__(self, "levels", [-point.ratio for point in self.grid])  # rising, for bisection

    def at(self, point: Point) -> Cond:
        """The condition at a point; before the grid the first, behind it the last."""
        step = max(bisect_right(self.levels, -point.ratio), 1)
        return next((cond for end, cond in self.conds if step <= end), self.conds[-1][1])


def condition_at(cond: Cond | Turns, point: Point) -> Cond:
    """The condition at a point, of one that changes or one that does not."""
    return cond.at(point) if isinstance(cond, Turns) else cond


class Guidance(Protocol):
    """A pair of functions that the driver calls around the network."""

    def ask(self, x: Tensor, point: Point) -> list[Query]:
        """The questions to put at this point, one or more."""
        ...

    def combine(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor:
        """The clean picture to go on with, from the clean pictures that answer the questions in order."""
        ...


@dataclass(frozen=True, eq=False)
class Plain:
    """No guidance: one question, its answer taken as it is."""

    cond: Cond | Turns

    def ask(self, x: Tensor, point: Point) -> list[Query]:
        """One question."""
        return [Query(x, point, condition_at(self.cond, point))]

    def combine(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor:
        """The only answer."""
        return answers[0]


@dataclass(frozen=True, eq=False)
class CFG:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, written so that scale 1 means none).

    cond, uncond: what is wanted, and what to move away from; they may differ in length and change apart.
    scale:        uncond + scale * (cond - uncond); 1 asks only once.
    interval:     (low, high) of sigma / alpha inside which to guide, both included; None guides everywhere,
                  and outside only `cond` is asked (Kynkäänniemi et al. 2024).
    """

    cond: Cond | Turns
    uncond: Cond | Turns
    scale: float
    interval: tuple[float, float] | None = None

    def active(self, point: Point) -> bool:
        """Whether two questions are asked here."""
        inside = self.interval is None or self.interval[0] <= point.ratio <= self.interval[1]
        return self.scale != 1 and inside

    def ask(self, x: Tensor, point: Point) -> list[Query]:
        """One question, and the unconditional one after it where guidance acts."""
        conds = [self.cond, self.uncond] if self.active(point) else [self.cond]
        return [Query(x, point, condition_at(cond, point)) for cond in conds]

    def combine(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor:
        """uncond + scale * (cond - uncond), or the only answer."""
        if len(answers) == 1:
            return answers[0]
        cond, uncond = answers
        return uncond + self.scale * (cond - uncond)


@dataclass(frozen=True, eq=False)
class InstructCFG:
    """Guidance by an instruction and by a picture to keep (InstructPix2Pix; Brooks et al. 2023, eq. 3).

    cond, image_only, uncond: instruction and picture, the picture alone, neither of the two.
    scale:                    weight of the instruction; 1 means none.
    image_scale:              weight of the picture; 1 means none.

    x0 = uncond + scale * (cond - image_only) + image_scale * (image_only - uncond). A question whose answer has no
    weight in it is not asked: `uncond` at image_scale 1, `image_only` at equal scales, `cond` at scale 0.
    """

    cond: Cond | Turns
    image_only: Cond | Turns
    uncond: Cond | Turns
    scale: float
    image_scale: float

    def weights(self) -> tuple[float, float, float]:
        """The shares of the three answers in the clean picture; their sum is 1."""
        return self.scale, self.image_scale - self.scale, 1 - self.image_scale

    def ask(self, x: Tensor, point: Point) -> list[Query]:
        """One to three questions."""
        conds = zip((self.cond, self.image_only, self.uncond), self.weights(), strict=True)
        return [Query(x, point, condition_at(cond, point)) for cond, weight in conds if weight != 0]

    def combine(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor:
        """The weighted sum, written around the last answer so that equal answers give themselves."""
        weights = [weight for weight in self.weights() if weight != 0]
        *others, base = answers
        total = base
        for weight, answer in zip(weights, others, strict=False):
            total = total + weight * (answer - base)
        return total
