"""Modules without memory, to be filled from files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Module = TypeVar("Module", bound=nn.Module)
INITIALISERS = ("normal_", "uniform_", "constant_", "kaiming_uniform_", "ones_", "zeros_")
# Initialisers, and what they call on a parameter. Those of torch.nn.init come first by themselves, as functions.
DRAWING = frozenset(
    [
        *(getattr(Tensor, name) for name in ("normal_", "uniform_", "fill_", "zero_")),
        *(
            getattr(nn.init, name)
            for name in ("normal_", "uniform_", "constant_", "kaiming_uniform_", "ones_", "zeros_")
        ),
    ]
)


class Undrawn(TorchFunctionMode):
    """Initial numbers are not drawn.

    On the `meta` device there is nothing to write them to, and the first draw there makes PyTorch import hundreds of
    modules, for longer than a whole model takes to be read.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The call itself, or its first argument where it would write initial numbers."""
        given = kwargs or {}
        if func in DRAWING:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def on_meta(build: Callable[[], Module]) -> Module:
    """The module that `build` makes, its parameters without memory and without numbers."""
    with torch.device("meta"), Undrawn():
        return build()
