"""Pickles that try something, written instruction by instruction, and the files that they may come in."""

from __future__ import annotations

import io
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

# A small assembler: each function gives the instructions that put one thing on the stack.
MARK, TUPLE, REDUCE, BUILD, STOP, POP = b"(", b"t", b"R", b"b", b".", b"0"
PERSISTENT, EMPTY, DICT, LIST, SET = b"Q", b")", b"}", b"]", b"s"
PROTO = b"\x80\x02"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def short(value: str) -> bytes:
    raw = value.encode()
    return b"\x8c" + bytes([len(raw)]) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(path: str) -> bytes:
    module, _, attribute = path.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def tuple_(*items: bytes) -> bytes:
    return MARK + b"".join(items) + TUPLE


def call(function: bytes | str, *arguments: bytes) -> bytes:
    return (name(function) if isinstance(function, str) else function) + tuple_(*arguments) + REDUCE


def numbers(*values: int) -> bytes:
    return tuple_(*map(number, values))


def table(*rows: tuple[bytes, bytes]) -> bytes:
    return DICT + b"".join(key + value + SET for key, value in rows)


def storage(key: str = "0", count: int = 4, kind: str = "torch.FloatStorage", *more: bytes) -> bytes:
    return tuple_(text("storage"), name(kind), text(key), text("cpu"), number(count), *more) + PERSISTENT


ORDERED = call("collections.OrderedDict")


def tensor(
    shape: tuple[int, ...] = (4,),
    strides: tuple[int, ...] = (1,),
    offset: int = 0,
    held: bytes | None = None,
    *more: bytes,
) -> bytes:
    parts = (held or storage(), number(offset), numbers(*shape), numbers(*strides), b"\x89", ORDERED, *more)
    return call("torch._utils._rebuild_tensor_v2", *parts)


def state(value: bytes) -> bytes:
    return PROTO + table((text("w"), value)) + STOP


def zipped(program: bytes, extra: dict[str, bytes] | None = None, **options: Any) -> bytes:
    """The archive of torch.save around a program, with a storage "0" of 16 bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", options.get("method", zipfile.ZIP_STORED)) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names that come twice
        archive.writestr(options.get("named", "m/data.pkl"), program)
        for member, data in ({"m/data/0": bytes(16), "m/version": b"3\n"} | (extra or {})).items():
            archive.writestr(member, data)
        for member, data in options.get("again", {}).items():
            archive.writestr(member, data)
    return content.getvalue()


def legacy(program: bytes, keys: bytes | None = None, data: bytes | None = None) -> bytes:
    """The older form around a program, with a storage "0" of 16 bytes."""
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    tail = pickle.dumps(["0"], 2) if keys is None else keys
    # A storage is described with one entry more, for a view of it.
    program = re.sub(rb"(?<!t)tQ", b"NtQ", program)
    return head + program + tail + (struct.pack("<q", 4) + bytes(16) if data is None else data)


FORMS: dict[str, Callable[[bytes], bytes]] = {"raw": lambda program: program, "zip": zipped, "legacy": legacy}
CANARY = "canary-that-must-not-sing"
TOUCH = text(f"touch {CANARY}")
WRITE = text(f"open({CANARY!r}, 'w')")
IMPORT_OS = call("builtins.__import__", text("os"))

# Programs that do something when they are unpickled: each makes a file.
LIVE: dict[str, bytes] = {
    "os.system": PROTO + call("os.system", TOUCH) + STOP,
    "posix.system": PROTO + call("posix.system", TOUCH) + STOP,
    "os.popen": PROTO + call(call("builtins.getattr", call("os.popen", TOUCH), text("read"))) + STOP,
    "os.spawnvp": PROTO + call("os.spawnlp", number(0), text("touch"), text("touch"), text(CANARY)) + STOP,
    "subprocess.call": PROTO + call("subprocess.call", tuple_(text("touch"), text(CANARY))) + STOP,
    "subprocess.Popen": PROTO
    + call(call("builtins.getattr", call("subprocess.Popen", tuple_(text("touch"), text(CANARY))), text("wait")))
    + STOP,
    "subprocess.getoutput": PROTO + call("subprocess.getoutput", TOUCH) + STOP,
    "builtins.eval": PROTO + call("builtins.eval", WRITE) + STOP,
    "builtins.exec": PROTO + call("builtins.exec", WRITE) + STOP,
    "builtins.open": PROTO + call("builtins.open", text(CANARY), text("w")) + STOP,
    "builtins.map": PROTO + call("builtins.list", call("builtins.map", name("os.system"), tuple_(TOUCH))) + STOP,
    "python 2's names": PROTO + call("__builtin__.eval", WRITE) + STOP,
    "getattr of an import": PROTO + call(call("builtins.getattr", IMPORT_OS, text("system")), TOUCH) + STOP,
    "importlib": PROTO
    + call(call("builtins.getattr", call("importlib.import_module", text("os")), text("system")), TOUCH)
    + STOP,
    "names put together on the stack": b"\x80\x04" + short("os") + short("system") + b"\x93" + TOUCH + b"\x85R.",
    "names from the memo": b"\x80\x04"
    + short("system")
    + b"\x94"
    + POP
    + short("os")
    + b"h\x00\x93"
    + TOUCH
    + b"\x85R.",
    "a dotted name": b"\x80\x04" + short("torch._utils") + short("os.system") + b"\x93" + TOUCH + b"\x85R.",
    "a dotted name of another": b"\x80\x04"
    + short("torch.serialization")
    + short("os.system")
    + b"\x93"
    + TOUCH
    + b"\x85R.",
    "INST": b"(" + b"S'touch " + CANARY.encode() + b"'\nios\nsystem\n.",
    "OBJ": PROTO + MARK + name("os.system") + TOUCH + b"o.",
    "text of protocol 0": b"cos\nsystem\n(S'touch " + CANARY.encode() + b"'\ntR.",
    "frames": b"\x80\x04\x95" + struct.pack("<Q", 4) + short("os") + short("system") + b"\x93" + TOUCH + b"\x85R.",
    "numpy's runstring": PROTO + call("numpy.testing._private.utils.runstring", WRITE, DICT) + STOP,
    "functools.partial": PROTO + call(call("functools.partial", name("os.system"), TOUCH)) + STOP,
    "functools.reduce": PROTO + call("functools.reduce", name("builtins.eval"), tuple_(WRITE, DICT)) + STOP,
    "operator.attrgetter": PROTO
    + call(call(call("operator.attrgetter", text("system")), call("importlib.import_module", text("os"))), TOUCH)
    + STOP,
    "operator.methodcaller": PROTO + call(call("operator.methodcaller", text("system"), TOUCH), IMPORT_OS) + STOP,
    "types.FunctionType": PROTO
    + call(
        call("types.FunctionType", call("builtins.compile", WRITE, text("f"), text("eval")), name("builtins.__dict__"))
    )
    + STOP,
    "marshal.loads": PROTO
    + call(
        "builtins.eval",
        call("marshal.loads", call("marshal.dumps", call("builtins.compile", WRITE, text("f"), text("eval")))),
    )
    + STOP,
    "pickle in a pickle": PROTO
    + call("pickle.loads", call("_codecs.encode", text(f"cos\nsystem\n(S'touch {CANARY}'\ntR."), text("latin1")))
    + STOP,
    "timeit": PROTO + call("timeit.timeit", WRITE, text("pass"), name("time.time"), number(1)) + STOP,
    "cProfile.run": PROTO + call("cProfile.run", WRITE, text("profile-of-it")) + STOP,
    "runpy": PROTO + call("runpy._run_code", call("builtins.compile", WRITE, text("f"), text("eval")), DICT) + STOP,
    "pdb": PROTO + call(call("builtins.getattr", call("bdb.Bdb"), text("runeval")), WRITE) + STOP,
    "torch's own rebuilder": PROTO
    + call("torch._tensor._rebuild_from_type_v2", name("builtins.eval"), name("builtins.str"), tuple_(WRITE), DICT)
    + STOP,
    "state that is called": PROTO
    + call("types.SimpleNamespace")
    + tuple_(b"N", table((text("a"), call("os.system", TOUCH))))
    + BUILD
    + STOP,
    "beside real tensors": PROTO + table((text("w"), tensor()), (text("x"), call("os.system", TOUCH))) + STOP,
    "before real tensors": PROTO + call("os.system", TOUCH) + POP + table((text("w"), tensor())) + STOP,
    "as a name in a table": PROTO + table((call("os.system", TOUCH), text("v"))) + STOP,
    "extension code 1": PROTO + b"\x82\xf0" + TOUCH + b"\x85R.",
    "extension code 2": PROTO + b"\x83\xf0\xf0" + TOUCH + b"\x85R.",
    "extension code 4": PROTO + b"\x84\xf0\xf0\xf0\x0f" + TOUCH + b"\x85R.",
}
# Programs that would do harm elsewhere, hang or take all memory, so that only their refusal is tried.
DEAD: dict[str, bytes] = {
    "asyncio": PROTO + call("asyncio.run", call("asyncio.create_subprocess_shell", TOUCH)) + STOP,
    "torch.load": PROTO + call("torch.load", text("other.pt")) + STOP,
    "torch.serialization.load": PROTO + call("torch.serialization.load", text("other.pt")) + STOP,
    "torch.hub.load": PROTO + call("torch.hub.load", text("a/b"), text("c")) + STOP,
    "torch.jit.load": PROTO + call("torch.jit.load", text("other.pt")) + STOP,
    "torch.storage._load_from_bytes": PROTO + call("torch.storage._load_from_bytes", text("x")) + STOP,
    "torch._C": PROTO + call("torch._C._cuda_init") + STOP,
    "torch.utils.cpp_extension": PROTO + call("torch.utils.cpp_extension.load", text("x"), text("x.cpp")) + STOP,
    "torch.ops.load_library": PROTO + call("torch._ops._Ops.load_library", text("x.so")) + STOP,
    "numpy.load": PROTO + call("numpy.load", text("x.npy")) + STOP,
    "pty.spawn": PROTO + call("pty.spawn", text("sh")) + STOP,
    "webbrowser.open": PROTO + call("webbrowser.open", text("http://localhost")) + STOP,
    "socket": PROTO + call("socket.create_connection", tuple_(text("localhost"), number(9))) + STOP,
    "shutil.rmtree": PROTO + call("shutil.rmtree", text("gone")) + STOP,
    "ctypes": PROTO + call("ctypes.CDLL", text("libc.so.6")) + STOP,
    "multiprocessing": PROTO + call("multiprocessing.Process") + STOP,
    "urllib": PROTO + call("urllib.request.urlopen", text("http://localhost")) + STOP,
    "http": PROTO + call("http.server.test") + STOP,
    "code.interact": PROTO + call("code.interact") + STOP,
    "sys.exit": PROTO + call("sys.exit", number(0)) + STOP,
    "a class that is not torch's": PROTO + call("copyreg._reconstructor", name("collections.Counter"), EMPTY) + STOP,
    "NEWOBJ": PROTO + name("collections.OrderedDict") + EMPTY + b"\x81.",
    "NEWOBJ_EX": b"\x80\x04" + name("collections.OrderedDict") + EMPTY + DICT + b"\x92.",
    "setting a tensor's state": state(tensor() + tuple_(storage(), number(0), numbers(9), numbers(1)) + BUILD),
    "setting a function's state": state(name("torch._utils._rebuild_tensor_v2") + DICT + BUILD),
    "calling a result": state(call(tensor(), text("x"))),
    "calling a storage": state(call("torch.FloatStorage", number(2**40))),
    "calling a type": state(call("torch.float8_e4m3fn")),
    "encoding by any codec": state(call("_codecs.encode", text("x"), text("zlib"))),
    "encoding what is no text": state(call("_codecs.encode", LIST, text("latin1"))),
    "a tensor of any size": state(call("torch.Tensor", number(2**40))),
    "a bytearray of any size": state(call("builtins.bytearray", number(2**40))),
    "a set": state(call("builtins.set", LIST)),
    "a view of a storage": state(
        tensor(held=storage("0", 4, "torch.FloatStorage", tuple_(text("v"), number(1), number(1))))
    ),
    "storage of a type that is none": state(tensor(held=storage("0", 4, "collections.OrderedDict"))),
    "storage of negative size": state(tensor(held=storage("0", -4))),
    "storage of any size": state(tensor(held=storage("0", 2**62))),
    "storage of enormous size": state(tensor(held=storage("0", 2**1000))),
    "storage that is not there": state(tensor(held=storage("1"))),
    "storage elsewhere": state(tensor(held=storage("../version", 1))),
    "one storage with two sizes": PROTO
    + table((text("a"), tensor()), (text("b"), tensor((1,), held=storage("0", 2))))
    + STOP,
    "something else from outside": state(
        tuple_(text("module"), name("collections.OrderedDict"), text("f.py"), text("x")) + PERSISTENT
    ),
    "a number from outside": state(number(3) + PERSISTENT),
    "a text from outside": state(b"Pstorage\n"),
    "a list from outside": state(LIST + PERSISTENT),
    "a tensor beyond its storage": state(tensor((5,))),
    "a tensor from beyond its storage": state(tensor((1,), (1,), 4)),
    "strides beyond the storage": state(tensor((2, 2), (3, 1))),
    "a large tensor of one number": state(tensor((2**40,), (0,))),
    "a large tensor of few numbers": state(tensor((2**20, 2**20), (0, 1), held=storage("0", 4))),
    "negative sides": state(tensor((-1,))),
    "negative strides": state(tensor((2,), (-1,), 1)),
    "negative offset": state(tensor((1,), (1,), -1)),
    "sides without strides": state(tensor((2, 2), (1,))),
    "empty and enormous": state(tensor((0, 2**62), (1, 1))),
    "metadata of a tensor": state(tensor((4,), (1,), 0, None, table((text("a"), text("b"))))),
    "hooks of a tensor": state(
        call(
            "torch._utils._rebuild_tensor_v2",
            storage(),
            number(0),
            numbers(4),
            numbers(1),
            b"\x89",
            name("_codecs.encode"),
        )
    ),
    "a parameter of nothing": state(call("torch._utils._rebuild_parameter", text("x"), b"\x88", ORDERED)),
    "a list as a name in a table": state(table((LIST, text("x")))),
    "itself as a name": state(LIST + b"q\x00" + DICT + b"h\x00" + b"N" + SET + b"a"),
    "a hash without end": state(EMPTY + b"".join(b"q\x00h\x00\x86" for _ in range(64)) + DICT + b"h\x00" + b"N" + SET),
    "the same in an ordered table": state(
        EMPTY
        + b"".join(b"q\x00h\x00\x86" for _ in range(64))
        + POP
        + call("collections.OrderedDict", LIST + tuple_(b"h\x00", b"N") + b"a")
    ),
    "appending to a tensor": state(tensor() + b"N" + b"a"),
    "an entry of a list": state(LIST + text("k") + b"N" + SET),
    "memo that was not filled": PROTO + b"h\x07.",
    "memo from an empty stack": PROTO + b"r\xff\xff\xff\xff.",
    "mark without end": PROTO + MARK + STOP,
    "tuple without mark": PROTO + TUPLE + STOP,
    "three from a stack of one": PROTO + b"N\x87.",
    "nothing at the end": PROTO + STOP,
    "no end": PROTO + DICT,
    "odd entries": PROTO + DICT + MARK + text("a") + b"u.",
    "unknown instruction": PROTO + b"\xff.",
    "protocol 9": b"\x80\x09" + table((text("w"), tensor())) + STOP,
    "protocol changed halfway": PROTO + table((text("w"), b"\x80\x04" + tensor())) + STOP,
    "LONG4 of 2 GiB": PROTO + b"\x8b\xff\xff\xff\x7f" + bytes(99) + STOP,
    "LONG4 of negative length": PROTO + b"\x8b\xff\xff\xff\xff" + bytes(99) + STOP,
    "BINBYTES8 of 2**63": b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + bytes(99) + STOP,
    "BYTEARRAY8 of 2**40": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + bytes(99) + STOP,
    "text of 4 GiB": PROTO + b"X\xff\xff\xff\xff" + bytes(99) + STOP,
    "text that is none": state(b"X\x02\x00\x00\x00\xff\xff"),
    "a long line": PROTO + b"c" + b"a" * 9999 + b"\nb\n.",
    "a number in many digits": b"\x80\x02L" + b"9" * 3000 + b"L\n.",
    "a name that is not ASCII": PROTO + "cos\nsystém\n".encode() + EMPTY + REDUCE + STOP,
    "a name with spaces": PROTO + b"ctorch _utils\n_rebuild_tensor_v2\n" + EMPTY + REDUCE + STOP,
    "an out-of-band buffer": b"\x80\x05\x97.",
    "a frozen set": b"\x80\x04(\x91.",
    "a whole module": state(call("torch.nn.modules.linear.Linear", number(2), number(2))),
    "an inert class's method": state(
        call("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint.on_load", TOUCH)
    ),
}
