"""Group norm with SiLU, layer norm, and GEGLU, by the compiled kernels where they take the tensors, else by PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.kernels.library import FORMATS, GegluArguments, GroupNormArguments, LayerNormArguments, library, usable


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False) -> Tensor:
    """Group normalisation of x (B, C, H, W), then SiLU if asked, in one pass over memory to read and one to write.

    The kernel takes channels-last pictures in float32 or bfloat16, with weight and bias of the same kind, and rounds to
    bfloat16 once, at the end; the answer has the layout of x.
    """
    found = library() if _alike(x, weight, bias) and usable(x, weight, bias) else None
    if found is None or x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        h = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(h) if silu else h
    B, C, H, W = x.shape
    y = torch.empty_like(x)
    if y.numel():
        pointers = x.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr()
        found.call("group_norm", GroupNormArguments(*pointers, B, H * W, C, groups, eps, silu, FORMATS[x.dtype]))
    return y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalisation of the last dimension of x (..., D) (Ba et al. 2016)."""
    taken = x.dtype == torch.float32 and _alike(x, weight, bias) and x.is_contiguous() and usable(x, weight, bias)
    found = library() if taken else None
    if found is None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    y = torch.empty_like(x)
    if y.numel():
        pointers = x.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr()
        found.call("layer_norm", LayerNormArguments(*pointers, x.numel() // len(weight), len(weight), eps))
    return y


def geglu(x: Tensor) -> Tensor:
    """The first half of the last dimension times the GELU of the second: (..., 2 D) -> (..., D) (Shazeer 2020)."""
    found = library() if _alike(x) and usable(x) and x.is_contiguous() else None
    if found is None:
        h, gate = x.chunk(2, dim=-1)
        return h * F.gelu(gate)
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    if y.numel():
        rows = y.numel() // width
        found.call("geglu", GegluArguments(x.data_ptr(), y.data_ptr(), rows, width, 2 * width, FORMATS[x.dtype]))
    return y


def _alike(first: Tensor, *others: Tensor) -> bool:
    """Whether they are all of one dtype that there are kernels for."""
    return first.dtype in FORMATS and all([t.dtype == first.dtype for t in others])
