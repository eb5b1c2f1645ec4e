"""Guidance whose network need not compute everything at each step: what is kept, and when it is made anew."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..cond import Cond, Memo
from .guidance import Guidance, Query, anchor_of
from .path import Point


@dataclass(eq=False)
class Recalling:
    """The questions of `inner`, each with a memo in which the network may keep what it made of it.

    What is kept belongs to one question under one condition of one run; a condition that changes along the way begins
    anew. A network that knows nothing of memos computes everything.

    grid:  the points that the sampler is given, from noise to data; they tell steps apart, whatever else it evaluates.
    every: the network is told to compute all anew in one step of so many. All evaluations in such a step are anew, and
           those after a way back to more noise; so 1 keeps nothing.
    limit: for networks that see for themselves how much has changed: the share below which it is nothing; 0 keeps
           nothing. Where it is above 0, `every` does not count.
    """

    inner: Guidance
    grid: Sequence[Point]
    every: int = 1
    limit: float = 0.0
    levels: list[float] = field(init=False, repr=False)
    last: int | None = field(default=None, init=False)
    known: list[tuple[Cond, str | None, Cond]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        self.levels = [-point.ratio for point in self.grid]  # rising, for bisection

    def ask(self, x: Tensor, point: Point) -> list[Query]:
        """The questions of `inner`, with their memos."""
        step = max(bisect_right(self.levels, -point.ratio), 1)
        fresh = self.limit == 0 and (self.last is None or not 0 < step - self.last < self.every)
        if fresh:
            self.last = step
        return [replace(query, cond=self._noted(query, fresh)) for query in self.inner.ask(x, point)]

    def _noted(self, query: Query, fresh: bool) -> Cond:
        """The condition with its memos: the same object each time, so that what is made of it can be kept."""
        for cond, perturb, noted in self.known:
            if cond is query.cond and perturb == query.perturb:
                for memo in noted.memo or ():
                    memo.fresh = fresh or (memo.kept is None and not memo.parts)
                return noted
        noted = replace(query.cond, memo=tuple(Memo(self, self.limit) for _ in range(len(query.x))))
        self.known.append((query.cond, query.perturb, noted))
        return noted

    def combine(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor:
        """The picture of `inner`."""
        return self.inner.combine(x, point, answers)

    def anchor(self, x: Tensor, point: Point, answers: Sequence[Tensor]) -> Tensor | None:
        """That of `inner`."""
        return anchor_of(self.inner, x, point, answers)
