"""Scaled dot-product attention by the compiled kernel where it is faster, else by PyTorch."""

from __future__ import annotations

import functools
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.kernels.library import FORMATS, PAIRS, STRIDES, AttentionArguments, library, usable

NO_MASK, BOOLEAN, ADDITIVE = 0, 1, 2
FEWEST_QUERIES, WIDEST_HEAD = 72, 192  # where the kernel is ahead of PyTorch
TRIAL, TRIAL_TURNS = 1024, 3  # most queries and keys that are tried with, and how often


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """softmax(scale * q k^T + mask) v with the meaning of `F.scaled_dot_product_attention`, of any strides.

    q: (B, N, L, D), k: (B, N, K, D), v: (B, N, K, E), on the CPU in float32 or bfloat16; returns (B, N, L, E), laid out
    as (B, L, N, E), so that joining the heads copies nothing. mask: broadcasts to (B, N, L, K), true where a query sees
    a key, or numbers to add, of which those below -1e30 hide a key. A query that sees no key gets 0.
    scale: D**-0.5 by default. Everything that the kernel does not take, or not faster, goes to PyTorch.
    """
    if not (q.ndim == k.ndim == v.ndim == 4 and usable(q, k, v) and attention_pays(q, k, v, mask)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
    return fused(q, k, v, mask, is_causal, scale)


def attention_pays(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> bool:
    """Whether the kernel takes these shapes and is the faster one there.

    In float32 as measured on AVX2 (benchmarks/attention.py): ahead from about 72 queries on, because keys and values
    are packed first, and for heads of up to 192 numbers; PyTorch's products are as good for the autoencoder's 512.
    In bfloat16 only on a processor that multiplies it (AVX512-bf16, AMX), and there `quicker` decides, unless
    SFUMATO_KERNELS asks for that instruction set.
    """
    found = library()
    if (
        found is None
        or not q.dtype == k.dtype == v.dtype
        or q.dtype not in FORMATS
        or not (mask is None or mask.dtype in (torch.bool, torch.float32, q.dtype))
        or (mask is not None and mask.requires_grad)
        or q.shape[2] < FEWEST_QUERIES
        or max(q.shape[3], v.shape[3]) > WIDEST_HEAD
    ):
        return False
    if q.dtype == torch.float32:
        return True
    if found.isa < PAIRS:
        return False
    threads = torch.get_num_threads()
    heads, most = min(q.shape[0] * q.shape[1], threads), TRIAL
    sizes = min(q.shape[2], most), min(k.shape[2], most), q.shape[3], v.shape[3]
    return found.asked or quicker(heads, *sizes, threads)


@functools.cache
def quicker(N: int, L: int, K: int, D: int, E: int, threads: int) -> bool:
    """Whether `fused` is faster than PyTorch here in bfloat16, tried once for each shape: a few milliseconds.

    They take turns on one head a thread, of at most 1024 queries and keys; the best turns count. No random numbers are
    drawn. threads: as many as PyTorch uses, which the answer holds for.
    """
    q, k, v = (torch.full((1, n, N, d), 0.5, dtype=torch.bfloat16).transpose(1, 2) for n, d in ((L, D), (K, D), (K, E)))
    ours, theirs = [], []
    for _ in range(TRIAL_TURNS + 1):  # the first one warms up
        since = time.perf_counter()
        fused(q, k, v)
        between = time.perf_counter()
        F.scaled_dot_product_attention(q, k, v)
        ours.append(between - since)
        theirs.append(time.perf_counter() - between)
    return min(ours[1:]) <= min(theirs[1:])


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
    if mask is not None and (is_causal or mask.dtype not in (torch.bool, torch.float32, q.dtype)):
        raise ValueError(f"attention mask of {mask.dtype} with is_causal={is_causal}; use bool or float32, not both")
    out = q.new_empty(B, L, N, E).transpose(1, 2)  # (B, N, L, E)
    if out.numel() == 0 or K == 0:
        return out.zero_()
    kind = NO_MASK if mask is None else BOOLEAN if mask.dtype == torch.bool else ADDITIVE
    seen = None if mask is None else (mask if kind == BOOLEAN else mask.float()).expand(B, N, L, K)
    arguments = AttentionArguments(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), None if seen is None else seen.data_ptr(), out.data_ptr(),
        B, N, L, K, D, E,
        STRIDES(*q.stride()), STRIDES(*k.stride()), STRIDES(*v.stride()),
        STRIDES() if seen is None else STRIDES(*seen.stride()), STRIDES(*out.stride()),
        D**-0.5 if scale is None else scale, FORMATS[q.dtype], kind, is_causal,
    )  # fmt: skip
    found.call("attention", arguments)
    return out
