"""One way to open any file of tensors: what it is is read off its content, never off its name.

| kind | what it is | its tensors are |
|---|---|---|
| safetensors | a safetensors file | views of the mapped file; float32 where 8 bits have a scale (`scaled`) |
| pickle | what `torch.save` writes, in a zip archive or in the older form | views; copies from the older form |
| gguf | a GGUF file | views where it is not quantised, else dequantised one by one to float32 |
| sharded | the JSON index of several such files | as in those |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from sfumato.weights.gguf import Quantised, read_gguf
from sfumato.weights.mapped import HEADER_LIMIT, Info, Mapped, Place, parse_json, read_header, release
from sfumato.weights.pickles import LEGACY, Pickled, read_legacy, read_zip, refuse_pickle
from sfumato.weights.scaled import notes_of, scales_of, unscaled

__all__ = ["Info", "Weights", "open_weights"]

HEAD = 4096  # bytes from which the kind is read
# What files that are no weights begin with, and what to call them.
MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself; fetch the file with `git lfs pull`"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"PK\x05\x06", "an empty zip archive; fetch it again"),
    (b"\x89HDF", "an HDF5 file; save its tensors as safetensors"),
    (b"\x93NUMPY", "a NumPy array; save it as safetensors"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
)
ADVICE = "weights are read from safetensors, torch.save's .ckpt, .pt and .bin, and GGUF"


@dataclass(frozen=True)
class Table:
    """What a reader of one kind of file gives: what is there, and how to get it."""

    infos: Mapping[str, Info]
    metadata: Mapping[str, str]
    read: Callable[[str], Tensor]
    mapped: Callable[[str], bool]  # whether `read` gives a view of the mapped file
    again: Callable[[], Table]  # the same with a mapping of its own


class Weights(Mapping[str, Tensor]):
    """Names -> tensors of one file, or of an index and its shards; iterating and `infos` read no tensor.

    path: the file that was opened.
    kind: "safetensors", "pickle", "gguf" or "sharded".
    infos: shape and type of each tensor, as `weights[name]` will return it.
    metadata: texts that came with the file.
    Tensors are private: writing to one never changes the file, but may show in tensors read later.
    Those that were read stay valid after `close`; the memory goes with the last of them.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        table: Table,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.path = path
        self.kind = kind
        self.metadata = table.metadata
        self.infos: Mapping[str, Info] = {name: _converted(info, dtype) for name, info in table.infos.items()}
        self._table: Table | None = table
        self._read = False  # whether tensors of this mapping were given to the caller
        self._lent = False  # whether the mapping was given to a conversion instead
        self._device = torch.device(device)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.infos:
            raise KeyError(name)
        if self._lent:
            self._table, self._lent = self._open().again(), False
        self._read = True
        table = self._open()
        tensor = table.read(name)
        wanted = self.infos[name].dtype
        if tensor.dtype == wanted and tensor.device == self._device:
            return tensor
        fresh = tensor.to(device=self._device, dtype=wanted)
        if table.mapped(name):
            # Or the pages of the file would add up beside what they were converted to. Nobody else has this view, as
            # each conversion has a mapping of its own.
            release(tensor)
        return fresh

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos  # Mapping would read the tensor to know

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Weights:
        """The same weights, each converted when it is read: floating-point tensors to `dtype`, all to `device`.

        Reading all of them takes the memory of the results and of one tensor more.
        """
        table = self._open()
        if self._read or self._lent:
            table = table.again()
        else:
            self._lent = True
        return Weights(self.path, self.kind, table, dtype, device)

    @property
    def converts(self) -> bool:
        """Whether some tensor is stored in another type than it is read in."""
        stored = self._open().infos
        return any(info.dtype != stored[name].dtype for name, info in self.infos.items())

    def close(self) -> None:
        """Let go of the file; tensors that were read stay valid."""
        self._table = None

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _open(self) -> Table:
        if self._table is None:
            raise ValueError(f"{self.path} was closed; open it again to read tensors")
        return self._table


def open_weights(path: Path | str) -> Weights:
    """Open a file of tensors, or the index of several.

    Raises FileNotFoundError, or ValueError in one line: what the file looks like instead, or what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name one file of weights in it")
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    kind = _kind(path)
    table = _sharded(path) if kind == "sharded" else _single(path, kind)
    return Weights(path, "pickle" if kind in ("archive", "legacy") else kind, table)


def _single(path: Path, kind: str) -> Table:
    if kind == "safetensors":
        return _placed(path, *read_header(path))
    if kind == "gguf":
        return _dequantised(read_gguf(path))
    return _unpickled(read_zip(path) if kind == "archive" else read_legacy(path))


def _placed(path: Path, places: Mapping[str, Place], metadata: Mapping[str, str]) -> Table:
    file = Mapped(path)
    stored = {name: place.info for name, place in places.items()}
    scales = scales_of(stored)
    hidden = notes_of(stored, scales)
    infos = {name: Info(i.shape, torch.float32) if name in scales else i for name, i in stored.items()}

    def read(name: str) -> Tensor:
        tensor = file.tensor(places[name])
        if name not in scales:
            return tensor
        return unscaled(tensor, file.tensor(places[scales[name]]), places[name].aligned)

    return Table(
        infos={name: info for name, info in infos.items() if name not in hidden},
        metadata=metadata,
        read=read,
        mapped=lambda name: places[name].aligned and name not in scales,
        again=lambda: _placed(path, places, metadata),
    )


def _unpickled(contents: Pickled) -> Table:
    tensors = contents.tensors
    return Table(
        infos={name: Info(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()},
        metadata=contents.metadata,
        read=tensors.__getitem__,
        mapped=contents.mapped.__contains__,
        again=lambda: _unpickled(contents.again()),
    )


def _dequantised(contents: Quantised) -> Table:
    file = Mapped(contents.path)
    return Table(
        infos=contents.infos,
        metadata=contents.metadata,
        read=lambda name: contents.tensor(name, file),
        mapped=contents.plain.__contains__,
        again=lambda: _dequantised(contents),
    )


def _sharded(path: Path) -> Table:
    homes = _weight_map(path)
    tables: dict[str, Table] = {}
    for home in sorted(set(homes.values())):
        shard = path.parent / home
        if not shard.is_file():
            raise FileNotFoundError(f"{path} names the shard {home!r}, which is not beside it; fetch it too")
        kind = _kind(shard)
        if kind == "sharded":
            raise ValueError(f"{path} names {home!r} as a shard, which is an index itself")
        tables[home] = _single(shard, kind)
        listed = {name for name in homes if homes[name] == home}
        if stray := sorted(listed ^ tables[home].infos.keys()):
            where = "only the index" if stray[0] in listed else "only the shard"
            raise ValueError(f"{path} and its shard {home!r} do not belong together: {where} has {stray[0]!r:.200}")
    return _joined(homes, tables)


def _joined(homes: Mapping[str, str], tables: Mapping[str, Table]) -> Table:
    return Table(
        infos={name: tables[home].infos[name] for name, home in homes.items()},
        metadata={},
        read=lambda name: tables[homes[name]].read(name),
        mapped=lambda name: tables[homes[name]].mapped(name),
        again=lambda: _joined(homes, {home: table.again() for home, table in tables.items()}),
    )


def _weight_map(path: Path) -> dict[str, str]:
    with open(path, "rb") as file:
        text = file.read(HEADER_LIMIT + 1)
    try:
        content = parse_json(text.removeprefix(b"\xef\xbb\xbf"))
    except ValueError:
        raise ValueError(f"{path} looks like JSON, and is not an index of shards; {ADVICE}") from None
    homes = content.get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise ValueError(f"{path} is JSON without a weight_map, so no index of shards; {ADVICE}")
    for name, home in homes.items():
        if not isinstance(home, str) or home != Path(home).name or "\\" in home or "\0" in home:
            raise ValueError(f"{path} puts {name!r:.200} into {home!r:.200}, which is no file name")
    return homes


def _kind(path: Path) -> str:
    """What the content is, as a word for `_single`; ValueError says what it looks like instead."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEAD)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    length = int.from_bytes(head[:8], "little")
    for magic, kind in ((b"PK\x03\x04", "archive"), (b"GGUF", "gguf"), (LEGACY, "legacy")):
        if head.startswith(magic):
            return kind
    if head[8:9] == b"{" and (length <= max(size, HEADER_LIMIT) or text[:1] != b"{"):
        return "safetensors"
    if text[:1] == b"{":
        return "sharded"
    refuse_pickle(path, head)
    raise ValueError(f"{path} ({size} bytes) is {_looks(head, text)}; {ADVICE}")


def _looks(head: bytes, text: bytes) -> str:
    for magic, what in MAGIC:
        if head.startswith(magic):
            return what
    if not head:
        return "empty; fetch it again"
    if not head.strip(b"\0"):
        return "all zeros at its beginning, as an unfinished download is; fetch it again"
    if text[:1] == b"<":
        return "a web page or an XML answer, not weights; fetch the file itself (some downloads need a login)"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it, or save what PyTorch before 0.4 wrote again with a newer one"
    if len(head) < 16:
        return "too short to be weights; fetch it again"
    return f"no weights file that is known; it begins with {head[:12]!r}"


def _converted(info: Info, dtype: torch.dtype | None) -> Info:
    return replace(info, dtype=dtype) if dtype is not None and info.dtype.is_floating_point else info
