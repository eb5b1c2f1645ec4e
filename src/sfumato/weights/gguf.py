"""GGUF files, whose tensors may be quantised (https://github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3).

The header is gone through here, with each count and length held against the file's size, because the reader of the
`gguf` package trusts it. Block sizes and the arithmetic of the quantised types come from that package.

Quantised tensors come out in float32: a block's float16 scale times its integers needs more bits than float16 has.
One tensor at a time is unpacked, so that the width costs little; `Weights.to` rounds once to what is wanted.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.weights.mapped import Info, Mapped, Place, release

HEADER_LIMIT = 64 * 2**20  # bytes before the data; those of U-Nets have 0.1 MiB, of language models up to 20
NAME_LIMIT = 4096
DIMS = 4  # what ggml has
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # where tensors that were reshaped to be quantised say what they were
# Types of values by their numbers: struct's letters, except for text (8) and list (9).
SCALARS: Mapping[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
# What needs no unpacking, by ggml's numbers.
PLAIN: Mapping[int, torch.dtype] = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}


@dataclass(frozen=True)
class Block:
    """A type of tensor: `count` numbers in `size` bytes."""

    kind: int
    count: int
    size: int


@dataclass(frozen=True)
class Quantised:
    """What a GGUF file holds; `plain` are the names of tensors that are not quantised."""

    path: Path
    infos: Mapping[str, Info]
    metadata: Mapping[str, str]
    plain: frozenset[str]
    blocks: Mapping[str, Block]
    places: Mapping[str, Place]

    def tensor(self, name: str, file: Mapped) -> Tensor:
        """One tensor: a view of the file, or unpacked to float32."""
        raw = file.tensor(self.places[name])
        if name in self.plain:
            return raw
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        with np.errstate(all="ignore"):  # a damaged scale gives infinities, which whoever fills a module looks for
            numbers = dequantize(raw.numpy(), GGMLQuantizationType(self.blocks[name].kind))
        release(raw)
        return torch.from_numpy(numbers).reshape(self.infos[name].shape)


def read_gguf(path: Path) -> Quantised:
    """The header of a GGUF file. Shapes are in PyTorch's order, the last axis varying fastest.

    Raises ValueError when the header lies, a type is unknown, or the package `gguf` is not installed.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        header = _Header(path, content)
        values = header.values()
        infos, blocks, places = header.tensors(values)
    metadata = {name: str(value) for name, value in values.items() if not isinstance(value, tuple)}
    plain = frozenset(name for name in infos if blocks[name].kind in PLAIN)
    return Quantised(path, infos, metadata, plain, blocks, places)


class _Header:
    """Reads one field after another; every length is checked before it is used."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._at = 4
        self._end = min(len(content), HEADER_LIMIT)
        version = self._number("I")
        if version not in (2, 3):
            swapped = " (that is, of a big-endian machine)" if version & 0xFFFF == 0 else ""
            raise ValueError(f"{path} is a GGUF file of version {version}{swapped}; known: 2, 3; convert it again")
        self._tensors = self._count(24)
        self._values = self._count(13)

    def values(self) -> dict[str, Any]:
        """Numbers and texts by name; lists of numbers as tuples, of texts as empty ones."""
        values: dict[str, Any] = {}
        for _ in range(self._values):
            name = self._text()
            if name in values:
                raise self._broken(f"{name!r:.200} comes twice")
            values[name] = self._value()
        return values

    def tensors(self, values: Mapping[str, Any]) -> tuple[dict[str, Info], dict[str, Block], dict[str, Place]]:
        """Infos, blocks and places by name."""
        rows: dict[str, tuple[tuple[int, ...], Block, int]] = {}
        known: dict[int, Block] = {}
        for _ in range(self._tensors):
            name = self._text()
            dims = self._number("I")
            if name in rows or not 0 < dims <= DIMS:
                raise self._broken(f"tensor {name!r:.200} comes twice or has {dims} axes")
            shape = tuple(self._number("Q") for _ in range(dims))[::-1]
            kind, offset = self._number("I"), self._number("Q")
            if kind not in known:
                known[kind] = self._block(kind)
            if 0 in shape or shape[-1] % known[kind].count:
                raise self._broken(f"tensor {name!r:.200} has the shape {shape} in blocks of {known[kind].count}")
            rows[name] = (shape, known[kind], offset)
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise self._broken(f"its alignment is {alignment!r:.40}")
        start = -(-self._at // alignment) * alignment
        infos, blocks, places = {}, {}, {}
        for name, (shape, block, offset) in rows.items():
            infos[name] = Info(self._original(name, shape, values), PLAIN.get(block.kind, torch.float32))
            blocks[name] = block
            places[name] = self._place(name, infos[name], shape, block, start + offset)
        self._apart(places)
        return infos, blocks, places

    def _place(self, name: str, info: Info, shape: tuple[int, ...], block: Block, begin: int) -> Place:
        rows, size = prod(shape[:-1]), shape[-1] // block.count * block.size
        end = begin + rows * size
        if end > len(self._content):
            raise self._broken(f"tensor {name!r:.200} ends at byte {end} and the file at {len(self._content)}")
        raw = info if block.kind in PLAIN else Info((rows, size), torch.uint8)
        return Place(raw, begin, end)

    def _apart(self, places: Mapping[str, Place]) -> None:
        position = 0
        for name, place in sorted(places.items(), key=lambda item: item[1].begin):
            if place.begin < position:
                raise self._broken(f"tensor {name!r:.200} overlaps another")
            position = place.end

    def _original(self, name: str, shape: tuple[int, ...], values: Mapping[str, Any]) -> tuple[int, ...]:
        wanted = values.get(ORIGINAL_SHAPE + name, shape)
        if not isinstance(wanted, tuple) or not all(type(side) is int and side > 0 for side in wanted):
            raise self._broken(f"the original shape of {name!r:.200} is {wanted!r:.80}")
        if len(wanted) > 8 or prod(wanted) != prod(shape):
            raise self._broken(f"the original shape of {name!r:.200} is {wanted!r:.80} and its shape {shape}")
        return wanted

    def _block(self, kind: int) -> Block:
        try:
            from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
            from gguf.quants import dequantize
        except ImportError:
            raise ValueError(f'{self._path} is a GGUF file: pip install "sfumato[gguf]" to read it') from None
        try:
            count, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            if kind not in PLAIN:
                dequantize(np.zeros((1, size), np.uint8), GGMLQuantizationType(kind))
        except (ValueError, KeyError, NotImplementedError):
            raise ValueError(
                f"{self._path} has tensors of ggml's type {kind}, which the installed gguf package cannot unpack; "
                "update it with `pip install -U gguf`, or quantise the model to Q8_0"
            ) from None
        return Block(kind, count, size)

    def _value(self) -> Any:
        kind = self._number("I")
        if kind == TEXT:
            return self._text(HEADER_LIMIT)
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind != LIST:
            raise self._broken(f"a value has the type {kind}")
        kind = self._number("I")
        if kind == TEXT:
            for _ in range(self._count(8)):
                self._text(HEADER_LIMIT)
            return ()
        if kind not in SCALARS:
            raise self._broken(f"a list has values of type {kind}")
        size = struct.calcsize(f"<{SCALARS[kind]}")
        count = self._count(size)
        if count <= 8:  # a shape
            return tuple(self._number(SCALARS[kind]) for _ in range(count))
        self._take(count * size)
        return ()

    def _text(self, limit: int = NAME_LIMIT) -> str:
        count = self._count(1)
        if count > limit:
            raise self._broken(f"a name has {count} bytes")
        at = self._take(count)
        try:
            return self._content[at : at + count].decode("utf-8")
        except UnicodeDecodeError:
            raise self._broken("a text in it is not UTF-8") from None

    def _count(self, size: int) -> int:
        """A number of things that take at least `size` bytes each."""
        count = self._number("Q")
        if count > (self._end - self._at) // size:
            raise self._broken(f"its header counts {count} things where {self._end - self._at} bytes are left")
        return int(count)

    def _number(self, letter: str) -> Any:
        at = self._take(struct.calcsize(f"<{letter}"))
        return struct.unpack_from(f"<{letter}", self._content, at)[0]

    def _take(self, count: int) -> int:
        at = self._at
        if at + count > self._end:
            raise self._broken(f"its header goes on past byte {self._end}")
        self._at += count
        return at

    def _broken(self, why: str) -> ValueError:
        size = len(self._content)
        return ValueError(f"{self._path} ({size} bytes) is not a complete GGUF file: {why}; fetch or convert it again")
