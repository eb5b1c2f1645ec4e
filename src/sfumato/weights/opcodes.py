"""Going through a pickle on descriptions: what would it make, and what would it call?

`Machine` follows the instructions that `torch.save` writes (and those of newer pickles as far as is needed to name
what they would call). The stack holds plain values and descriptions: `Named` for a global that was looked up,
`Storage` for the bytes of tensors, `Made` for everything else. Nothing of the file is imported or called.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import torch

READ_LIMIT = 2**20  # bytes of one text or number
STEPS = 600_000  # instructions; a full checkpoint with optimiser states has about 200,000
TYPES: Mapping[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
STORAGES: Mapping[str, torch.dtype] = {
    "torch.storage.UntypedStorage": torch.uint8,
    **{f"{place}.{name}": dtype for place in ("torch", "torch.cuda") for name, dtype in TYPES.items()},
}
NEW_TYPES = ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")  # those that have no storage class
DTYPES: Mapping[str, torch.dtype] = {f"torch.{name}": getattr(torch, name) for name in NEW_TYPES}
TENSOR, TENSOR_OF = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
PARAMETER, ENCODE, TABLE = "torch._utils._rebuild_parameter", "_codecs.encode", "collections.OrderedDict"
SIZE = "torch.Size"
REBUILDERS = frozenset({TENSOR, TENSOR_OF, PARAMETER, ENCODE, TABLE, SIZE})
INERT = frozenset(
    {
        "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
        "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
        "lightning_fabric.utilities.data.AttributeDict",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "pytorch_lightning.utilities.parsing.AttributeDict",
    }
)
KNOWN = REBUILDERS | INERT | STORAGES.keys() | DTYPES.keys()
# Read only to name what such a pickle would call; torch.load does not take them.
FOREIGN = frozenset({"BINUNICODE8", "FRAME", "INST", "MEMOIZE", "POP", "SHORT_BINUNICODE", "STACK_GLOBAL"})
ADVICE = "if you trust its origin, open it with the program that made it and save the tensors alone as safetensors"


@dataclass(frozen=True)
class Named:
    """A global that the pickle names and that is known; it was not looked up."""

    name: str


@dataclass(frozen=True)
class Storage:
    """`nbytes` bytes in the file under `key`."""

    key: str
    nbytes: int
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Made:
    """Something that the pickle would make: by calling `name`, or a "dict"."""

    name: str


class Stream:
    """The reading half of a file, for the instructions only: not more at once or in all than is sensible."""

    def __init__(self, file: Any, limit: int) -> None:
        self._file = file
        self._left = limit

    def read(self, count: int) -> bytes:
        return self._counted(self._file.read(count) if count <= min(READ_LIMIT, self._left) else None)

    def readline(self) -> bytes:
        return self._counted(self._file.readline(4096))

    def _counted(self, read: bytes | None) -> bytes:
        if read is None or len(read) > self._left:
            raise ValueError("a text or number in it is longer than any that torch.save writes")
        self._left -= len(read)
        return read


class Machine:
    """Goes through pickles of one file; `named` and `storages` collect what they refer to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.named: set[str] = set()
        self.storages: dict[str, Storage] = {}
        self._steps = 0

    def run(self, stream: Stream) -> Any:
        """What one pickle would make, as a description.

        Raises ValueError for the first thing in it that no file of weights needs.
        """
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._foreign = ""
        try:
            for opcode, argument, _ in pickletools.genops(cast(BinaryIO, stream)):
                self._steps += 1
                if self._steps > STEPS:
                    self._refuse(f"it has more than {STEPS} instructions")
                if opcode.name == "STOP":
                    break
                if opcode.name in FOREIGN:
                    self._foreign = self._foreign or opcode.name
                self._step(opcode.name, argument)
            result = self._stack.pop()
        except (IndexError, KeyError):
            self._refuse("its instructions take what was never put there")
        except (ValueError, OverflowError) as error:
            if isinstance(error, Refused):
                raise
            self._refuse("its instructions cannot be read: " + " ".join(str(error).split())[:160])
        if self._foreign:
            self._refuse(f"it has the instruction {self._foreign}, which torch.save does not write")
        return result

    def _step(self, name: str, argument: Any) -> None:
        if name in VALUES:
            self._stack.append(VALUES[name](argument))
        elif name in ACTIONS:
            ACTIONS[name](self, argument)
        else:
            self._refuse(f"it has the instruction {name}, which torch.save does not write")

    def _refuse(self, why: str) -> NoReturn:
        raise Refused(f"{self.path} is refused: {why}; {ADVICE}") from None

    def _protocol(self, argument: int) -> None:
        if argument != 2:
            self._foreign = self._foreign or f"PROTO {argument}"

    def _global(self, argument: str) -> None:
        name = ".".join(argument.split(" "))
        if name not in KNOWN:
            self._refuse(f"it would call {name!r:.200}, which has no part in making a tensor")
        self.named.add(name)
        self._stack.append(Named(name))

    def _stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(f"{module} {name}")

    def _instance(self, argument: str) -> None:
        self._global(argument)
        self._stack.append(Made(argument))

    def _mark(self, _: None) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _marked(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _tuple(self, _: None) -> None:
        items = self._marked()  # which changes what `self._stack` is
        self._stack.append(tuple(items))

    def _tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _append(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            self._refuse("it appends to something that is not a list")
        self._stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, Made) or target.name not in ("dict", TABLE):
            self._refuse("it sets entries of something that is not a table")
        if len(items) % 2:
            raise IndexError
        for key in items[::2]:
            self._key(key)

    def _key(self, key: Any) -> None:
        # The hash of a tuple of tuples of tuples can take for ever.
        if not isinstance(key, (str, int, float, Named)) and key is not None:
            self._refuse(f"it has a {type(key).__name__} as a name in a table")

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _persistent(self, _: None) -> None:
        entry = self._stack.pop()
        if not isinstance(entry, tuple) or len(entry) not in (5, 6) or entry[0] != "storage":
            self._refuse("it asks for something from outside that is not a storage")
        _, kind, key, place, count, *view = entry
        if not isinstance(kind, Named) or kind.name not in STORAGES or view not in ([], [None]):
            self._refuse("it describes a storage in a way that torch.save does not")
        if not isinstance(key, str) or not isinstance(place, str) or not _natural(count):
            self._refuse("it describes a storage in a way that torch.save does not")
        dtype = STORAGES[kind.name]
        storage = Storage(key, count * dtype.itemsize, dtype)
        if self.storages.setdefault(key, storage) != storage:
            self._refuse(f"it describes storage {key!r:.80} twice and differently")
        self._stack.append(storage)

    def _call(self, _: None) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Named) or not isinstance(arguments, tuple):
            self._refuse("it calls something that it has made itself")
        name = function.name
        if name in STORAGES or name in DTYPES or not self._fits(name, arguments):
            self._refuse(f"it calls {name} in a way that torch.save does not")
        self._stack.append(Made(name))

    def _fits(self, name: str, arguments: tuple[Any, ...]) -> bool:
        if name in (TENSOR, TENSOR_OF):
            return self._tensor(name, arguments)
        if name == PARAMETER:
            kinds = [value.name if isinstance(value, Made) else type(value).__name__ for value in arguments]
            return len(kinds) == 3 and kinds[0] in (TENSOR, TENSOR_OF) and kinds[1:] == ["bool", TABLE]
        if name == ENCODE:
            return len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] in ("latin1", "latin-1")
        if name == SIZE:
            return len(arguments) == 1 and _naturals(arguments[0])
        if name == TABLE:
            return not arguments or (len(arguments) == 1 and self._pairs(arguments[0]))
        return name in INERT

    def _pairs(self, rows: Any) -> bool:
        if type(rows) is not list or not all(isinstance(row, (list, tuple)) and len(row) == 2 for row in rows):
            return False
        for row in rows:
            self._key(row[0])
        return True

    def _tensor(self, name: str, arguments: tuple[Any, ...]) -> bool:
        """Whether a tensor is described as torch.save does it, within its storage."""
        count = 6 if name == TENSOR else 7
        if len(arguments) not in (count, count + 1) or (len(arguments) > count and arguments[count] is not None):
            return False
        storage, offset, shape, strides, grad, hooks = arguments[:6]
        if not isinstance(storage, Storage) or not _natural(offset) or type(grad) is not bool:
            return False
        if not isinstance(hooks, Made) or hooks.name != TABLE:
            return False
        if not _naturals(shape) or not _naturals(strides) or len(shape) != len(strides) or len(shape) > 64:
            return False
        dtype = storage.dtype
        if name == TENSOR_OF:
            kind = arguments[6]
            if not isinstance(kind, Named) or kind.name not in DTYPES:
                return False
            dtype = DTYPES[kind.name]
        last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True)) + 1
        needed = 0 if 0 in shape else max(last, prod(shape)) * dtype.itemsize
        if needed > storage.nbytes:
            self._refuse(f"a tensor {shape!s:.80} needs {needed} bytes of a storage that has {storage.nbytes}")
        return prod(side or 1 for side in shape) < 2**48  # an empty tensor may have any other sides

    def _build(self, _: None) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        table = isinstance(state, Made) and state.name in ("dict", TABLE)
        if not isinstance(target, Made) or not (target.name in INERT or (target.name == TABLE and table)):
            self._refuse("it sets the state of something that it has made")


class Refused(ValueError):
    """Raised inside `Machine`; to callers it is a ValueError."""


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48  # which is more than a file has bytes


def _naturals(values: Any) -> bool:
    return isinstance(values, tuple) and all(map(_natural, values))


VALUES: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), lambda argument: argument),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINSTRING", "SHORT_BINUNICODE", "BINUNICODE8"), lambda argument: argument),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: Made("dict"),
}
ACTIONS: Mapping[str, Callable[[Machine, Any], None]] = {
    "PROTO": Machine._protocol,
    "FRAME": lambda machine, _: None,
    "POP": lambda machine, _: machine._stack.pop(),
    "GLOBAL": Machine._global,
    "STACK_GLOBAL": Machine._stack_global,
    "INST": Machine._instance,
    "MARK": Machine._mark,
    "TUPLE": Machine._tuple,
    "TUPLE1": lambda machine, _: machine._tuple_of(1),
    "TUPLE2": lambda machine, _: machine._tuple_of(2),
    "TUPLE3": lambda machine, _: machine._tuple_of(3),
    "APPEND": lambda machine, _: machine._append([machine._stack.pop()]),
    "APPENDS": lambda machine, _: machine._append(machine._marked()),
    "SETITEM": lambda machine, _: machine._set([machine._stack.pop(-2), machine._stack.pop()]),
    "SETITEMS": lambda machine, _: machine._set(machine._marked()),
    "BINPUT": Machine._put,
    "LONG_BINPUT": Machine._put,
    "MEMOIZE": Machine._memoize,
    "BINGET": Machine._get,
    "LONG_BINGET": Machine._get,
    "BINPERSID": Machine._persistent,
    "REDUCE": Machine._call,
    "BUILD": Machine._build,
}
