"""What all faster ways have in common: when they are for something, and what they keep of the weights."""

from __future__ import annotations

import functools
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from sfumato.kernels import available
from sfumato.kernels.product import PACKED_UP_TO, Product

M = TypeVar("M", bound=nn.Module)
Stamp = tuple[tuple[int, int, int], ...]
PLAIN = (nn.Linear, nn.Conv2d, nn.LayerNorm)
# Rows, of all pictures, up to which our products are ahead: of weights that are kept packed, and of larger ones.
MANY_ROWS, FEW_ROWS = 8192, 256


class Way(Generic[M]):
    """A faster way to compute a module. Copies and pickles of it start anew, with nothing kept."""

    def __init__(self, module: M) -> None:
        self.module = module
        self._products: dict[str, tuple[Stamp, Product, tuple[Tensor, ...]]] = {}

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the module is of the kind that this way is for."""
        return True

    def plain(self, *args: Any) -> Any:
        """What the module's own class computes."""
        return type(self.module).forward(self.module, *args)

    def product(self, name: str, *weights: Tensor, stride: int = 1, padding: int = 0, doubled: bool = False) -> Product:
        """The product with some weights, one below the other; made anew when these are others."""
        now, kept = stamp(*weights), self._products.get(name)
        if kept is None or kept[0] != now:
            whole = weights[0] if len(weights) == 1 else torch.cat(weights)
            kept = self._products[name] = now, Product(whole, stride, padding, doubled), weights
        return kept[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module,)


def multiplies(rows: int, numbers: int, x: Tensor) -> bool:
    """Whether our product is for so many rows and weights of so many numbers, in the dtype of x."""
    most = MANY_ROWS if numbers <= PACKED_UP_TO else FEW_ROWS
    return rows <= most and x.dtype == torch.float32 and available() is not None


def quick(x: Tensor, weight: Tensor) -> bool:
    """Whether the faster ways are for these: on a CPU, of one dtype, with no gradients and no tracing."""
    return (
        x.is_cpu
        and weight.is_cpu
        and x.dtype == weight.dtype
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def unwatched(*modules: nn.Module) -> bool:
    """Whether modules are PyTorch's own and nobody listens to them, so that another may compute what they would."""
    for module in modules:
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or type(module) not in PLAIN:
            return False
        if "forward" in own and not isinstance(own["forward"], Way):
            return False
    return True


def unheard(*modules: nn.Module) -> bool:
    """Whether nobody listens to some modules, or computes in their place but a faster way of ours."""
    return unhooked(*modules) and all(
        isinstance(m.__dict__["forward"], Way) for m in modules if "forward" in m.__dict__
    )


def unhooked(*modules: nn.Module) -> bool:
    """Whether nobody listens to some modules."""
    return not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def stamp(*tensors: Tensor) -> Stamp:
    """What tells whether tensors are what they were: which, where their numbers lie, how often they were changed."""
    return tuple([(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors])


@functools.cache
def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN has packed weights of this dtype on this processor."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def has_onednn() -> bool:
    """Whether this PyTorch has oneDNN with packed weights."""
    names = "_reorder_convolution_weight", "_convolution_pointwise", "_reorder_linear_weight", "_linear_pointwise"
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
