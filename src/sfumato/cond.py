"""The one conditioning value that is passed from text encoders through guidance to networks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Memo:
    """What a network may keep of one row from one evaluation to the next; it belongs to a question of one run.

    run:   whose it is: rows of one run decide together.
    limit: how little of a change is none, for networks that look for themselves.
    fresh: whether all is to be computed anew this time.
    kept:  what the network made of the row; None before the first time.
    """

    run: object
    limit: float = 0.0
    fresh: bool = True
    kept: Any = None
    parts: dict[Hashable, Memo] = field(default_factory=dict)

    def part(self, name: Hashable) -> Memo:
        """The memo of a part of the picture, such as a window, that is evaluated by itself."""
        part = self.parts.setdefault(name, Memo(self.run, self.limit))
        part.fresh = self.fresh
        return part


@dataclass(frozen=True)
class Cond:
    """What a network is told besides the noisy picture and its time; absent parts are None.

    context: token states (B, L, D), read by cross-attention or joint attention.
    pooled:  one vector a picture (B, P): pooled text, size and crop; an integer label (B, 1): class, noise level.
    concat:  extra input channels (B, C, H, W): mask, masked picture, depth, low resolution.
    memo:    for each row, where the network may keep what it need not compute at each step; None: nowhere.
    """

    context: Tensor | None = None
    pooled: Tensor | None = None
    concat: Tensor | None = None
    memo: tuple[Memo, ...] | None = field(default=None, kw_only=True)

    @property
    def parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three that are told, in the order of the constructor."""
        return self.context, self.pooled, self.concat

    def signature(self) -> tuple[Hashable, ...]:
        """Shapes without the batch axis, and what is to be computed anew; equal ones can share a network call."""
        shapes = tuple(None if p is None else tuple(p.shape[1:]) for p in self.parts)
        return shapes if self.memo is None else (*shapes, any(memo.fresh for memo in self.memo))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cond:
        """The same value on another device, context and concat in another dtype.

        pooled keeps its own: labels are integers, and sizes in pixels would be rounded in half precision; networks
        convert what they make of it.
        """
        context, concat = (None if p is None else p.to(device=device, dtype=dtype) for p in (self.context, self.concat))
        return Cond(context, None if self.pooled is None else self.pooled.to(device=device), concat, memo=self.memo)

    def __getitem__(self, rows: slice) -> Cond:
        """The rows `rows` of the batch, as views."""
        memo = None if self.memo is None else self.memo[rows]
        return Cond(*(None if p is None else p[rows] for p in self.parts), memo=memo)

    def part(self, name: Hashable, concat: Tensor | None) -> Cond:
        """What is told of a part of the picture, with that part's further channels."""
        memo = None if self.memo is None else tuple(memo.part(name) for memo in self.memo)
        return replace(self, concat=concat, memo=memo)

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Join along the batch axis; raises ValueError when the signatures differ."""
        if len(conds) == 1:
            return conds[0]
        signatures = {c.signature() for c in conds}
        if len(signatures) > 1:
            raise ValueError(f"conditions of different shapes cannot share a batch: {sorted(map(str, signatures))}")
        columns = zip(*(c.parts for c in conds), strict=True)
        memo = None if conds[0].memo is None else tuple(memo for c in conds for memo in c.memo or ())
        return Cond(*(None if column[0] is None else torch.cat(column) for column in columns), memo=memo)


class Converted:
    """Conditions in another dtype, the same object for the same one: a network may keep what it made of it."""

    KEPT = 4

    def __init__(self) -> None:
        self._known: list[tuple[Cond, torch.dtype, Cond]] = []

    def __call__(self, cond: Cond, dtype: torch.dtype) -> Cond:
        """The condition with its context and concat in the dtype."""
        for given, kind, converted in self._known:
            if given is cond and kind == dtype:
                return converted
        converted = cond.to(dtype=dtype)
        self._known = [*self._known[1 - self.KEPT :], (cond, dtype, converted)]
        return converted
