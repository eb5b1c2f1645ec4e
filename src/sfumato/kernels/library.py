"""The compiled library: whether there is one for this processor, and its functions."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VERSION = 3  # of the structs below; csrc/library.cpp says the same
ISAS = ("avx2", "avx512", "avx512bf16", "amx")
PAIRS, TILES = 3, 4  # of those: AVX512 with products of bfloat16 numbers, and with AMX tiles
WITH = {PAIRS: ", attention in bfloat16 by its pairwise products", TILES: ", attention in bfloat16 on its tiles"}
CHOICES = ("off", *ISAS)
VARIABLE = "SFUMATO_KERNELS"
PATH = Path(__file__).with_name("_native.so")
STRIDES = ctypes.c_int64 * 4


class AttentionArguments(ctypes.Structure):
    """`Attention` of csrc/sfumato.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "mask", "out")),
        *((name, ctypes.c_int64) for name in ("B", "H", "L", "K", "D", "E")),
        *((f"{name}_stride", STRIDES) for name in ("q", "k", "v", "mask", "out")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("format", "mask_kind", "causal")),
    )


class GroupNormArguments(ctypes.Structure):
    """`GroupNorm` of csrc/sfumato.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("B", "pixels", "C", "groups")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("silu", "format")),
    )


class GegluArguments(ctypes.Structure):
    """`Geglu` of csrc/sfumato.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "stride")),
        ("format", ctypes.c_int32),
    )


class LayerNormArguments(ctypes.Structure):
    """`LayerNorm` of csrc/sfumato.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "width")),
        ("eps", ctypes.c_float),
    )


class ProductArguments(ctypes.Structure):
    """`Product` of csrc/sfumato.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "add", "y")),
        *((name, ctypes.c_int64) for name in ("B", "H", "W", "C", "out_H", "out_W", "N")),
        *((name, ctypes.c_int64) for name in ("kernel", "stride", "padding", "x_stride", "add_stride", "y_stride")),
        *((name, ctypes.c_int32) for name in ("packed", "doubled")),
    )


FORMATS = {torch.float32: 0, torch.bfloat16: 1}
ENTRIES = {
    "attention": AttentionArguments,
    "group_norm": GroupNormArguments,
    "geglu": GegluArguments,
    "layer_norm": LayerNormArguments,
    "product": ProductArguments,
}


@dataclass(frozen=True)
class Library:
    """The loaded library with the instruction set to use, counted from 1 in the order of ISAS."""

    handle: ctypes.CDLL
    isa: int
    parallel: int | None  # the address of GOMP_parallel in PyTorch's OpenMP
    asked: bool = False  # for this instruction set, by the environment

    @property
    def panel(self) -> int:
        """Columns of a panel of packed weights."""
        return int(self.handle.sfumato_panel(self.isa))

    def call(self, entry: str, arguments: ctypes.Structure) -> None:
        """Run one kernel with as many threads as PyTorch uses; MemoryError when its scratch does not fit."""
        function = getattr(self.handle, f"sfumato_{entry}")
        status = function(ctypes.byref(arguments), self.isa, torch.get_num_threads(), self.parallel)
        if status:
            raise MemoryError(f"no memory for the {entry} kernel; set {VARIABLE}=off to go through PyTorch")


def available() -> str | None:
    """The instruction set whose kernels are used, one of ISAS, or None; `library_reason` says why."""
    found, _ = _open()
    return None if found is None else ISAS[found.isa - 1]


def library_reason() -> str:
    """One line that says which kernels are used, or why none are."""
    return _open()[1]


def library() -> Library | None:
    """The library, opened on the first call, or None."""
    return _open()[0]


def usable(*tensors: Tensor) -> bool:
    """Whether a kernel may take these: on the CPU, no gradient wanted, not being traced by torch.compile."""
    for t in tensors:
        if not t.is_cpu:
            return False
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not wanted and not torch.compiler.is_compiling() and library() is not None


@functools.cache
def _open() -> tuple[Library | None, str]:
    asked = os.environ.get(VARIABLE, "")
    if asked and asked not in CHOICES:
        raise ValueError(f"{VARIABLE} = {asked!r}; use one of {', '.join(CHOICES)}, or leave it unset")
    if asked == "off":
        return None, f"kernels off by {VARIABLE}=off"
    if not PATH.is_file():
        return None, "kernels not built: reinstall with a C++ compiler on an x86-64 Linux machine"
    try:
        handle = ctypes.CDLL(str(PATH))
    except OSError as error:
        return None, f"kernels do not load: {error}"
    if handle.sfumato_version() != VERSION:
        return None, f"kernels are of version {handle.sfumato_version()}, not {VERSION}: reinstall"
    best = handle.sfumato_isa()
    isa = ISAS.index(asked) + 1 if asked else best
    if isa > best or isa == 0:
        return None, f"kernels off: this {platform.machine()} processor has no {asked or 'AVX2 with FMA'}"
    found = Library(declared(handle), isa, _parallel(), bool(asked))
    return found, f"kernels for {ISAS[isa - 1]}{WITH.get(isa, '')}" + (f", as {VARIABLE} asks" if asked else "")


def declared(handle: ctypes.CDLL) -> ctypes.CDLL:
    """The library with its entries' argument types."""
    for entry, arguments in ENTRIES.items():
        function = getattr(handle, f"sfumato_{entry}")
        function.argtypes = [ctypes.POINTER(arguments), ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    return handle


def _parallel() -> int | None:
    """GOMP_parallel of the OpenMP that PyTorch has loaded; None when it uses another kind of threads."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value
