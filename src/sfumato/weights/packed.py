"""Weights that are unpacked each time they are needed, since their file has them in fewer bits than a tensor can."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sfumato.weights.mapped import Info


class Packed(nn.Parameter):
    """A parameter without memory, in the shape of the numbers that it knows how to make."""

    _make: Callable[[], Tensor]

    @staticmethod
    def of(info: Info, make: Callable[[], Tensor]) -> Packed:
        """What `make` gives is a new tensor each time, of the shape and type in `info`."""
        empty = torch.empty(info.shape, dtype=info.dtype, device="meta")
        packed = torch.Tensor._make_subclass(Packed, empty, False)
        packed._make = make
        return packed

    def unpack(self) -> Tensor:
        """The numbers."""
        return self._make()
