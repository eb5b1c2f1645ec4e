"""Scaled dot-product attention by the compiled kernel where it is faster, else by PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.kernels.library import STRIDES, AttentionArguments, library, usable

FORMATS = {torch.float32: 0, torch.bfloat16: 1}
NO_MASK, BOOLEAN, ADDITIVE = 0, 1, 2
FEWEST_QUERIES, WIDEST_HEAD = 72, 192  # where the kernel is ahead of PyTorch


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """softmax(scale * q k^T + mask) v with the meaning of `F.scaled_dot_product_attention`, of any strides.

    q: (B, N, L, D), k: (B, N, K, D), v: (B, N, K, E), on the CPU in float32; returns (B, N, L, E), laid out as
    (B, L, N, E), so that joining the heads copies nothing. mask: broadcasts to (B, N, L, K), true where a query sees
    a key, or numbers to add, of which those below -1e30 hide a key. A query that sees no key gets 0.
    scale: D**-0.5 by default. Everything that the kernel does not take, or not faster, goes to PyTorch.
    """
    if not (q.ndim == k.ndim == v.ndim == 4 and usable(q, k, v) and attention_pays(q, k, v, mask)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
    return fused(q, k, v, mask, is_causal, scale)


def attention_pays(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> bool:
    """Whether the kernel takes these shapes and is the faster one there (benchmarks/attention.py).

    Measured on AVX2: ahead from about 72 queries on, because keys and values are packed first, and for heads of up to
    192 numbers; PyTorch's matrix products are as good for the autoencoder's 512. Not for bfloat16, for which a
    processor may have units that the kernel does not use.
    """
    return (
        q.dtype == k.dtype == v.dtype == torch.float32
        and (mask is None or mask.dtype in (torch.bool, torch.float32))
        and not (mask is not None and mask.requires_grad)
        and q.shape[2] >= FEWEST_QUERIES
        and max(q.shape[3], v.shape[3]) <= WIDEST_HEAD
    )


def fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """`attention` by the kernel whatever the shape, float32 or bfloat16; ValueError for what it cannot take."""
    found = library()
    if found is None:
        raise ValueError("no compiled kernels here; sfumato.kernels.library_reason() says why")
    (B, N, L, D), K, E = q.shape, k.shape[2], v.shape[3]
    if k.shape != (B, N, K, D) or v.shape != (B, N, K, E):
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"attention of {shapes}; give (B, N, L, D), (B, N, K, D), (B, N, K, E)")
    if q.dtype not in FORMATS or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention of {q.dtype}, {k.dtype}, {v.dtype}; use float32 or bfloat16 for all three")
    if mask is not None and (is_causal or mask.dtype not in (torch.bool, torch.float32)):
        raise ValueError(f"attention mask of {mask.dtype} with is_causal={is_causal}; use bool or float32, not both")
    out = q.new_empty(B, L, N, E).transpose(1, 2)  # (B, N, L, E)
    if out.numel() == 0 or K == 0:
        return out.zero_()
    kind = NO_MASK if mask is None else BOOLEAN if mask.dtype == torch.bool else ADDITIVE
    seen = None if mask is None else mask.expand(B, N, L, K)
    arguments = AttentionArguments(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), None if seen is None else seen.data_ptr(), out.data_ptr(),
        B, N, L, K, D, E,
        STRIDES(*q.stride()), STRIDES(*k.stride()), STRIDES(*v.stride()),
        STRIDES() if seen is None else STRIDES(*seen.stride()), STRIDES(*out.stride()),
        D**-0.5 if scale is None else scale, FORMATS[q.dtype], kind, is_causal,
    )  # fmt: skip
    found.call("attention", arguments)
    return out
