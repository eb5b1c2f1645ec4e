"""Tensors that are views of a file mapped into memory, and the safetensors header that says where they lie.

A safetensors file is 8 bytes of length, that much JSON, then the tensors' bytes without a gap
(https://github.com/huggingface/safetensors, "Format"). The header is checked in full before a byte of data is used.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PAGE_OUT = 21  # MADV_PAGEOUT of Linux 5.4, which the mmap module does not name
NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which older versions of the mmap module do not name
HEADER_LIMIT = 16 * 2**20  # bytes of JSON; a full Stable Diffusion file has 0.2 MiB, the longest adapters' about 5
BRACKETS_LIMIT = 500_000  # each list or table of JSON takes 30 times its two characters in memory
DIM_LIMIT = 2**40  # of one side, which matters only where another side is 0
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Info:
    """Shape and type of a tensor, as reading it will give it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The bytes that the tensor takes in memory."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie: [begin, end) of the file."""

    info: Info
    begin: int
    end: int

    @property
    def aligned(self) -> bool:
        """Whether an element begins at a multiple of its size, as processors may demand of what they read."""
        return self.begin % self.info.dtype.itemsize == 0


class Mapped:
    """A file mapped privately: writing to its tensors changes memory, never the file.

    The mapping goes when this object and the last tensor made from it are gone.
    """

    def __init__(self, path: Path) -> None:
        self.size = path.stat().st_size
        with open(path, "rb") as file:
            content = _private(file.fileno(), self.size)
        self._storage = torch.frombuffer(content, dtype=torch.uint8).untyped_storage()

    def tensor(self, place: Place) -> Tensor:
        """A view of the file; a copy where the bytes do not lie on a multiple of the element's size."""
        info = place.info
        if place.begin == place.end:
            return torch.empty(info.shape, dtype=info.dtype)
        raw = torch.empty(0, dtype=torch.uint8).set_(self._storage[place.begin : place.end])
        return (raw if place.aligned else raw.clone()).view(info.dtype).view(info.shape)


def _private(descriptor: int, size: int) -> mmap.mmap:
    """The mapping of a file; Linux sets no memory aside for it, so that it may be larger than what there is."""
    if sys.platform == "linux":
        flags, allowed = mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(descriptor, size, flags=flags, prot=allowed)
    return mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)


def release(tensor: Tensor) -> None:
    """Hand the pages of a mapped, never written tensor back to the system; touched again, they are read again.

    Only for tensors that are views of a private mapping: what was written to them would be lost.
    """
    _advise(tensor, mmap.MADV_DONTNEED)


def release_unwritten(tensor: Tensor) -> bool:
    """As `release`, unless something was written to the tensor; whether it was done.

    For views of private mappings that nobody is writing to meanwhile. The system keeps what was read in its cache as
    long as it has room, so that touching the tensor again costs little.
    """
    written = _written(tensor)
    if not written:
        release(tensor)
    return not written


def page_out(tensor: Tensor) -> None:
    """Ask the system to take the memory of a tensor that will not be needed soon; nothing in it is lost.

    Pages of a mapped file go at once, all others stay or are swapped. Does nothing where the system cannot.
    """
    _advise(tensor, PAGE_OUT)


def trim() -> None:
    """Let the allocator give back to the system what is free; does nothing where it is not glibc's."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


class FileRanges:
    """Where files are mapped privately in this process, as of now: `tensor in ranges` says whether it is a view of one.

    Empty where the system does not say, as on others than Linux.
    """

    def __init__(self) -> None:
        maps = Path("/proc/self/maps")
        rows = [line.split(None, 5) for line in maps.read_text().splitlines()] if maps.exists() else []
        mapped = [row[0].split("-") for row in rows if len(row) == 6 and row[5][0] == "/" and row[1][3] == "p"]
        spans = sorted((int(begin, 16), int(end, 16)) for begin, end in mapped)
        self._begins = [begin for begin, _ in spans]
        self._ends = [end for _, end in spans]

    def __contains__(self, tensor: Tensor) -> bool:
        if tensor.device.type != "cpu" or not tensor.numel():
            return False
        begin = tensor.data_ptr()
        i = bisect_right(self._begins, begin) - 1
        return i >= 0 and begin + tensor.numel() * tensor.element_size() <= self._ends[i]


def _pages(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the whole pages of a tensor: the first one's begin and the last one's end."""
    page = mmap.PAGESIZE
    begin = -(-tensor.data_ptr() // page) * page
    return begin, (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page


def _written(tensor: Tensor) -> bool:
    """Whether a page of a private mapping is no longer the file's; True where the system does not say."""
    begin, end = _pages(tensor)
    maps = Path("/proc/self/pagemap")
    if end <= begin:
        return False
    if not maps.exists():
        return True
    with open(maps, "rb", buffering=0) as file:
        file.seek(begin // mmap.PAGESIZE * 8)
        rows = bytearray(file.read((end - begin) // mmap.PAGESIZE * 8))
    if len(rows) * mmap.PAGESIZE != (end - begin) * 8:
        return True
    states = torch.frombuffer(rows, dtype=torch.int64) >> 61  # a row's highest bits: -4 there, 2 swapped, 1 the file's
    return bool(((states & 6 != 0) & (states & 1 == 0)).any())


def _advise(tensor: Tensor, advice: int) -> None:
    begin, end = _pages(tensor)
    if sys.platform == "linux" and end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)


def read_header(path: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """The places of all tensors of a safetensors file, and its metadata.

    Raises ValueError when the file is cut short, or its header is not one, lies or is beyond all measure.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise broken(path, f"the header is said to have {length} bytes and the file has {size}")
        if length > HEADER_LIMIT:
            raise broken(path, f"the header has {length} bytes and at most {HEADER_LIMIT} are read")
        header = _parsed(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise broken(path, "__metadata__ is not a table of texts")
    places = {name: _place(path, name, row, 8 + length) for name, row in header.items()}
    position = 8 + length
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != position:
            what = "overlaps another" if place.begin < position else "leaves a gap before it"
            raise broken(path, f"tensor {name!r} {what} at byte {place.begin}")
        position = place.end
    if position != size:
        raise broken(path, f"its tensors end at byte {position} and the file at {size}")
    return places, metadata


def broken(path: Path, why: str) -> ValueError:
    """The error for a safetensors file that cannot be trusted."""
    size = os.path.getsize(path)
    return ValueError(f"{path} ({size} bytes) is not a complete safetensors file: {why}; fetch or save it again")


def parse_json(text: bytes) -> dict[str, Any]:
    """The object in a JSON text from anywhere; ValueError unless it is one, of sensible size, each name once."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a name comes twice")
        return table

    if len(text) > HEADER_LIMIT or text.count(b"[") + text.count(b"{") > BRACKETS_LIMIT:
        raise ValueError(f"{len(text)} bytes with {text.count(b'[') + text.count(b'{')} brackets are too much")
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"it is a {type(content).__name__}")
    for name in content:
        name.encode("utf-8")  # half of a surrogate pair can be in JSON and cannot be printed
    return content


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        return parse_json(text)
    except ValueError as error:
        why = " ".join(str(error).split())[:160]
        raise broken(path, f"the header is not the expected JSON ({why})") from None


def _place(path: Path, name: str, row: Any, start: int) -> Place:
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise broken(path, f"the row of {name!r} is not dtype, shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise broken(path, f"tensor {name!r} has the type {dtype!r:.40}; known: {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > 64 or any(side > DIM_LIMIT for side in shape):
        raise broken(path, f"tensor {name!r} has the shape {shape!r:.80}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise broken(path, f"tensor {name!r} has the offsets {offsets!r:.80}")
    info = Info(tuple(shape), DTYPES[dtype])
    if info.nbytes != offsets[1] - offsets[0]:
        raise broken(path, f"tensor {name!r}, {dtype} {info.shape}, cannot lie in bytes {offsets!r:.80}")
    if 0 in shape and prod(side or 1 for side in shape) > DIM_LIMIT:
        raise broken(path, f"tensor {name!r} has the shape {shape!r:.80}")
    return Place(info, start + offsets[0], start + offsets[1])


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
