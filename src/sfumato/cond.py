"""The one conditioning value that is passed from text encoders through guidance to networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cond:
    """What a network is told besides the noisy picture and its time; absent parts are None.

    context: token states (B, L, D), read by cross-attention or joint attention.
    pooled:  one vector a picture (B, P): pooled text, size and crop; an integer label (B, 1): class, noise level.
    concat:  extra input channels (B, C, H, W): mask, masked picture, depth, low resolution.
    """

    context: Tensor | None = None
    pooled: Tensor | None = None
    concat: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three parts in the order of the constructor."""
        return self.context, self.pooled, self.concat

    def signature(self) -> tuple[tuple[int, ...] | None, ...]:
        """Shapes without the batch axis; two values with equal signatures can share a network call."""
        return tuple(None if p is None else tuple(p.shape[1:]) for p in self.parts)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cond:
        """The same value on another device, context and concat in another dtype.

        pooled keeps its own: labels are integers, and sizes in pixels would be rounded in half precision; networks
        convert what they make of it.
        """
        context, concat = (None if p is None else p.to(device=device, dtype=dtype) for p in (self.context, self.concat))
        return Cond(context, None if self.pooled is None else self.pooled.to(device=device), concat)

    def __getitem__(self, rows: slice) -> Cond:
        """The rows `rows` of the batch, as views."""
        return Cond(*(None if p is None else p[rows] for p in self.parts))

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Join along the batch axis; raises ValueError when the signatures differ."""
        if len(conds) == 1:
            return conds[0]
        signatures = {c.signature() for c in conds}
        if len(signatures) > 1:
            raise ValueError(f"conditions of different shapes cannot share a batch: {sorted(map(str, signatures))}")
        columns = zip(*(c.parts for c in conds), strict=True)
        return Cond(*(None if column[0] is None else torch.cat(column) for column in columns))


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
