"""Files that `torch.save` wrote, read without trusting a byte of them.

Such a file is a program for a small stack machine, which may call anything. Before PyTorch reads it
(`torch.load(weights_only=True)`), the program is gone through here instruction by instruction on a stack of
descriptions. Nothing is imported, called or allocated by that. It is refused unless it only

* makes plain values, lists, tuples and tables,
* names storages that the file has room for, and
* calls what `REBUILDERS` lists, which describe a tensor of a size that its storage has.

`INERT` lists things that training leaves in checkpoints and that hold no weights; PyTorch is given a placeholder for
each, so that they are neither imported nor made.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.weights.archive import read_archive
from sfumato.weights.opcodes import INERT, Machine, Stream

PICKLE_LIMIT = 32 * 2**20  # bytes of the program; those of full checkpoints with optimiser states have about 2 MiB
# The first of the pickles that make up the older form: a number that stands for "PyTorch".
LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e"
# A pickle in the oldest form, which is text, names what it will call in its first lines.
TEXT_PICKLE = re.compile(rb"(?:c|[(\]}]+(?:[SVIFL][^\n]*\n)*[ci])[\w.]+\n[\w.]+\n")
DEPTH = 8  # of tables within tables
# What training keeps beside the weights, by the names that are in use.
TRAINING = {"callbacks", "loops", "optimizer", "optimizer_state_dict", "optimizer_states", "optimizers"}
TRAINING |= {"lr_scheduler", "lr_schedulers", "scheduler", "scaler", "amp", "native_amp_scaling_state"}
LOADING_ERRORS: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
LOADING_ERRORS += (AssertionError, EOFError, OSError, ArithmeticError, pickle.UnpicklingError)


@dataclass(frozen=True)
class Pickled:
    """Tensors by name; plain values as texts; the names of the tensors that are views of the mapped file.

    again: the same with a mapping of its own.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    mapped: frozenset[str]
    again: Callable[[], Pickled]


class Placeholder:
    """Stands for what is in a checkpoint and holds no weights; whatever is done to it does nothing."""

    def __new__(cls, *args: object) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_zip(path: Path) -> Pickled:
    """What today's `torch.save` writes: a zip archive of a pickle and the storages, mapped into memory.

    Raises ValueError naming what is wrong, or what the file would call.
    """
    archive = read_archive(path)
    if "constants.pkl" in archive.members:
        raise ValueError(f"{path} is a TorchScript program, not weights; save its state_dict() instead")
    if archive.members.keys() & {"byteorder"} and archive.read("byteorder", 16) != b"little":
        raise ValueError(f"{path} was written on a big-endian machine; save it as safetensors there")
    machine = Machine(path)
    machine.run(Stream(io.BytesIO(archive.read("data.pkl", PICKLE_LIMIT)), PICKLE_LIMIT))
    for storage in machine.storages.values():
        member = archive.members.get(f"data/{storage.key}")
        if member is None or member.size != storage.nbytes:
            held = "is missing" if member is None else f"has {member.size} bytes"
            raise ValueError(
                f"{path} is damaged: storage {storage.key!r:.80} of {storage.nbytes} bytes {held}; fetch it again"
            )
    # PyTorch itself goes by the extension here, and would take the file for what it is not.
    return _pickled(path, machine.named & INERT, path.suffix != ".safetensors")


def read_legacy(path: Path) -> Pickled:
    """What `torch.save` wrote before PyTorch 1.6: five pickles, then the storages; read into memory.

    Raises ValueError naming what is wrong, or what the file would call.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        machine = Machine(path)
        stream = Stream(file, PICKLE_LIMIT)
        for _ in range(4):  # the number, the version, the machine's sizes, the tensors
            machine.run(stream)
        keys = machine.run(stream)
        texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if not texts or sorted(keys) != sorted(machine.storages):
            raise ValueError(f"{path} is damaged: its list of storages is not that of its tensors; fetch it again")
        for key in keys:
            storage = machine.storages[key]
            count = int.from_bytes(file.read(8), "little", signed=True)
            end = file.tell() + storage.nbytes
            if end > size:
                raise ValueError(f"{path} is cut short: {end} bytes would hold its tensors and it has {size}")
            if count * storage.dtype.itemsize != storage.nbytes:
                raise ValueError(f"{path} is damaged: the size of storage {key!r:.80} is wrong; fetch it again")
            file.seek(end)
    return _pickled(path, machine.named & INERT, False)


def refuse_pickle(path: Path, head: bytes) -> None:
    """Raise ValueError if the file is a pickle that torch.save did not write, naming what it would call."""
    if head.startswith(b"\x80") or TEXT_PICKLE.match(head):
        with open(path, "rb") as file:
            Machine(path).run(Stream(file, PICKLE_LIMIT))
        raise ValueError(f"{path} is a pickle that torch.save did not write; save its tensors as safetensors")


def _loaded(path: Path, inert: Set[str], mapped: bool) -> Any:
    stand_ins: list[Any] = [(Placeholder, name) for name in sorted(inert)]
    try:
        with ExitStack() as stack:
            if stand_ins:
                stack.enter_context(torch.serialization.safe_globals(stand_ins))
            file = str(path) if mapped else stack.enter_context(open(path, "rb"))
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except LOADING_ERRORS as error:
        why = " ".join(str(error).split())[:160]
        if isinstance(error, pickle.UnpicklingError):  # whose text begins with advice to execute the file nevertheless
            why = "PyTorch refuses it"
        raise ValueError(f"{path} could not be loaded: {why}; fetch it again, or save it as safetensors") from None


def _pickled(path: Path, inert: Set[str], mapped: bool) -> Pickled:
    state = _loaded(path, inert, mapped)
    metadata: dict[str, str] = {}
    # dict's own methods, because a file may put other things under their names into an OrderedDict.
    while isinstance(state, dict) and isinstance(dict.get(state, "state_dict"), dict):
        metadata |= {str(name): str(value) for name, value in dict.items(state) if _plain(value)}
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}; a table of tensors is expected")
    tensors: dict[str, Tensor] = {}
    for name, value in _flattened(path, state):
        if name in tensors or name in metadata:
            raise ValueError(f"{path} has the name {name!r:.200} twice")
        if isinstance(value, Tensor):
            tensors[name] = _checked(path, name, value)
        elif _plain(value):
            metadata[name] = str(value)
    # What does not begin where an element may begin is copied.
    views = frozenset(name for name, tensor in tensors.items() if mapped and not _askew(tensor))
    ready = {name: tensor.clone() if _askew(tensor) else tensor for name, tensor in tensors.items()}
    whole = Pickled(ready, metadata, views, lambda: _pickled(path, inert, mapped) if mapped else whole)
    return whole


def _flattened(path: Path, state: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Everything in tables within tables, by names joined with dots."""
    seen = {id(state)}
    waiting: list[tuple[str, dict[Any, Any], int]] = [("", state, 1)]
    while waiting:
        prefix, table, depth = waiting.pop()
        for key, value in dict.items(table):
            name = prefix + str(key)
            if not isinstance(value, dict):
                yield name, value
            elif str(key) not in TRAINING:
                if id(value) in seen or depth == DEPTH:
                    raise ValueError(f"{path}: the table {name!r:.200} is nested too deeply or comes twice")
                seen.add(id(value))
                waiting.append((f"{name}.", value, depth + 1))


def _checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_complex()
    if not dense or tensor.device.type != "cpu":
        raise ValueError(f"{path}: {name!r:.200} is no dense tensor of real numbers; save it as one")
    tensor = tensor.detach()
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{path}: {name!r:.200} {tuple(tensor.shape)} is larger than what the file holds of it")
    return tensor


def _askew(tensor: Tensor) -> bool:
    return tensor.data_ptr() % tensor.element_size() != 0


def _plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) and len(str(value)) < 10_000
