"""Guidance: what to ask the network at a point, and what to make of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

    cond: Cond

    def ask(self, x: Tensor, point: Point) -> list[Query]:
        """One question."""
        return [Query(x, point, self.cond)]

    def combine(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor:
        """The only answer."""
        return answers[0]


@dataclass(frozen=True, eq=False)
class CFG:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, written so that scale 1 means none).

    cond, uncond: what is wanted, and what to move away from.
    scale:        uncond + scale * (cond - uncond); 1 asks only once.
    interval:     (low, high) of sigma / alpha inside which to guide, both included; None guides everywhere,
                  and outside only `cond` is asked (Kynkäänniemi et al. 2024).
    """

    cond: Cond
    uncond: Cond
    scale: float
    interval: tuple[float, float] | None = None

    def active(self, point: Point) -> bool:
        """Whether two questions are asked here."""
        inside = self.interval is None or self.interval[0] <= point.ratio <= self.interval[1]
        return self.scale != 1 and inside

    def ask(self, x: Tensor, point: Point) -> list[Query]:
        """One question, and the unconditional one after it where guidance acts."""
        conds = [self.cond, self.uncond] if self.active(point) else [self.cond]
        return [Query(x, point, cond) for cond in conds]

    def combine(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor:
        """uncond + scale * (cond - uncond), or the only answer."""
        if len(answers) == 1:
            return answers[0]
        cond, uncond = answers
        return uncond + self.scale * (cond - uncond)
