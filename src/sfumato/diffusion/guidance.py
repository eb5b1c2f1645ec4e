"""Guidance: what to ask the network at a point, and what to make of the answers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

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


@runtime_checkable
class Anchored(Protocol):
    """A guidance that also says which noise to go on with."""

    def anchor(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor | None:
        """The clean picture under whose noise x goes on; None where it is the one from `combine`.

        Asked once after each `combine`, with the same arguments. The driver hands the sampler
        x + alpha * (x0 - anchor): the noise seen in that beside x0 is the noise seen in x beside the anchor. So a
        sampler needs no variant of itself.
        """
        ...


@runtime_checkable
class Differentiating(Protocol):
    """A guidance whose `combine` follows gradients from the answers back to x; its runs share no network calls.

    The driver hands it an x that requires gradients and answers that were computed from it.
    """

    gradients: ClassVar[bool]


def needs_gradients(guidance: Guidance) -> bool:
    """Whether a guidance says that it follows gradients."""
    return isinstance(guidance, Differentiating) and guidance.gradients


def anchor_of(guidance: Guidance, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor | None:
    """The anchor of a guidance, None where it has none."""
    return guidance.anchor(x, point, answers) if isinstance(guidance, Anchored) else None


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


def sides(x: Tensor, point: Point, conds: Sequence[Cond | Turns]) -> list[Query]:
    """One question for each condition."""
    return [Query(x, point, condition_at(cond, point)) for cond in conds]


@dataclass(frozen=True, eq=False)
class CFG:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, written so that scale 1 means none).

    cond, uncond: what is wanted, and what to move away from; they may differ in length and change apart.
    scale:        uncond + scale * (cond - uncond); 1 asks only once.
    """

    cond: Cond | Turns
    uncond: Cond | Turns
    scale: float

    def ask(self, x: Tensor, point: Point) -> list[Query]:
        """One question, and the unconditional one after it where there is a scale."""
        return sides(x, point, [self.cond] if self.scale == 1 else [self.cond, self.uncond])

    def combine(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor:
        """uncond + scale * (cond - uncond), or the only answer."""
        if len(answers) == 1:
            return answers[0]
        cond, uncond = answers
        return uncond + self.scale * (cond - uncond)


@dataclass(frozen=True, eq=False)
class CFGPP:
    """CFG++ (Chung et al. 2024, algorithm 1): a guided clean picture under the unconditional noise.

    scale: the paper's lambda, 0 to 1: uncond + scale * (cond - uncond). At 1 the noise is still the
           unconditional one, so both questions are always asked.
    """

    cond: Cond | Turns
    uncond: Cond | Turns
    scale: float

    def ask(self, x: Tensor, point: Point) -> list[Query]:
        """Two questions."""
        return sides(x, point, [self.cond, self.uncond])

    def combine(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor:
        """uncond + scale * (cond - uncond)."""
        cond, uncond = answers
        return uncond + self.scale * (cond - uncond)

    def anchor(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor | None:
        """The unconditional answer."""
        return answers[1]


@dataclass(eq=False)
class APG:
    """Adaptive projected guidance (Sadat et al. 2024, algorithm 1). It remembers, so each run needs its own.

    scale:     as in `CFG`; 1 asks only once.
    parallel:  the share kept of the update's part along the conditional picture, which saturates colours; the
               paper's eta. 1 keeps all.
    threshold: the largest norm of the update over a whole picture; 0 sets no limit.
    momentum:  weight of the updates before this one; negative ones lead away from them.

    With parallel 1, threshold 0 and momentum 0 it is `CFG`.
    """

    cond: Cond | Turns
    uncond: Cond | Turns
    scale: float
    parallel: float = 0.0
    threshold: float = 0.0
    momentum: float = 0.0
    running: Tensor | None = field(default=None, init=False, repr=False)

    def ask(self, x: Tensor, point: Point) -> list[Query]:
        """One question, and the unconditional one after it where there is a scale."""
        return sides(x, point, [self.cond] if self.scale == 1 else [self.cond, self.uncond])

    def combine(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor:
        """cond + (scale - 1) * update, or the only answer."""
        if len(answers) == 1:
            return answers[0]
        cond, uncond = answers
        update = cond - uncond
        if self.momentum != 0:
            update = update if self.running is None else update + self.momentum * self.running
            self.running = update
        axes = tuple(range(1, update.ndim))
        if self.threshold > 0:
            norm = update.norm(2, axes, keepdim=True)  # (B, 1, 1, 1)
            update = update * (self.threshold / norm.clamp(min=self.threshold))
        exact, along = update.double(), cond.double()
        along = along / along.norm(2, axes, keepdim=True).clamp(min=1e-12)
        part = (exact * along).sum(axes, keepdim=True) * along
        return cond + (self.scale - 1) * (exact - part + self.parallel * part).to(cond.dtype)


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
