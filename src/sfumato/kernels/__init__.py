"""Kernels in C++ for CPUs where PyTorch's are far from what the machine can do.

They are an optional part: without the compiled library, on another processor, or with SFUMATO_KERNELS=off everything
goes through PyTorch, and every function here gives the same numbers to rounding. SFUMATO_KERNELS=avx2, avx512,
avx512bf16 or amx asks for one instruction set. Nothing here has a gradient: with gradients on, PyTorch answers.
"""

from __future__ import annotations

from sfumato.kernels.attention import attention, attention_pays, fused
from sfumato.kernels.library import available, library_reason
from sfumato.kernels.pointwise import geglu, group_norm, layer_norm
from sfumato.kernels.product import Product

__all__ = [
    "Product",
    "attention",
    "attention_pays",
    "available",
    "fused",
    "geglu",
    "group_norm",
    "layer_norm",
    "library_reason",
]
