"""Checkpoints by `torch.save`, and what malicious ones try. Each of those is refused before anything of it runs."""

from __future__ import annotations

import collections
import contextlib
import copyreg
import io
import os
import pickle
import re
import struct
import sys
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sfumato.weights.opcodes import Machine
from sfumato.weights.source import open_weights

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


# Codes that stand for names once a program has registered them.
EXTENSIONS = {0xF0: ("os", "system"), 0xF0F0: ("posix", "system"), 0x0FF0F0F0: ("subprocess", "getoutput")}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work where the canary would be made, with the extension codes registered that some programs use."""
    monkeypatch.chdir(tmp_path)
    for code, (module, attribute) in EXTENSIONS.items():
        copyreg.add_extension(module, attribute, code)
    yield
    for code, (module, attribute) in EXTENSIONS.items():
        copyreg.remove_extension(module, attribute, code)


def refused(content: bytes) -> str:
    """The error of opening a file, after making sure that nothing was executed or imported."""
    Path("m.safetensors.pt").write_bytes(content)
    modules, files = set(sys.modules) | {"encodings.cp437"}, set(os.listdir())  # in which archives have their names
    with pytest.raises(ValueError) as caught:
        open_weights("m.safetensors.pt")
    assert set(os.listdir()) == files, "something was executed"
    assert set(sys.modules) <= modules, f"imported: {set(sys.modules) - modules}"
    message = str(caught.value)
    assert "m.safetensors.pt" in message and "\n" not in message and len(message) < 700, message
    return message


class Trusting(pickle.Unpickler):
    """Python's own reader, as torch.load used to use it."""

    def persistent_load(self, entry: Any) -> Any:
        return torch.storage.TypedStorage(4, dtype=torch.float32, _internal=True)


@pytest.mark.parametrize("what", LIVE)
def test_the_live_programs_do_something(what: str) -> None:
    """Without this, the next test could pass because the programs are wrong."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.suppress(Exception):
        Trusting(io.BytesIO(LIVE[what])).load()
    assert Path(CANARY).exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", LIVE)
def test_programs_that_call_are_refused_by_name(what: str, form: str) -> None:
    message = refused(FORMS[form](LIVE[what]))
    assert "it would call '" in message or "instruction" in message, message


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", DEAD)
def test_programs_that_do_other_harm_are_refused(what: str, form: str) -> None:
    refused(FORMS[form](DEAD[what]))


def test_what_would_be_called_is_said() -> None:
    assert "it would call 'os.system', which has no part in making a tensor" in refused(zipped(LIVE["os.system"]))
    assert "'posix.system'" in refused(legacy(LIVE["posix.system"]))
    assert "'torch._utils.os.system'" in refused(zipped(LIVE["a dotted name"]))
    assert "save the tensors alone as safetensors" in refused(zipped(LIVE["builtins.eval"]))


GOOD = state(tensor())


def test_the_assembler_can_write_a_valid_checkpoint() -> None:
    """Without this, every program above could be refused for a mistake of the assembler."""
    for content in (zipped(GOOD), legacy(GOOD)):
        Path("good").write_bytes(content)
        assert torch.equal(open_weights("good")["w"], torch.zeros(4))
        assert torch.equal(torch.load("good", weights_only=True)["w"], torch.zeros(4))


def patched(content: bytes, old: bytes, new: bytes, count: int = -1) -> bytes:
    assert old in content
    return content.replace(old, new, count)


def stretched() -> bytes:
    """An archive whose two storages are the same bytes."""
    content = bytearray(zipped(GOOD, {"m/data/1": bytes(16)}))
    first, second = (content.rindex(b"m/data/" + key) - 46 for key in (b"0", b"1"))
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    return bytes(content)


ARCHIVES: dict[str, tuple[bytes, str]] = {
    "two programs": (zipped(GOOD, again={"m/data.pkl": LIVE["os.system"]}), "comes twice"),
    "two programs, one in capitals": (zipped(GOOD, {"m/DATA.PKL": LIVE["os.system"]}), "comes twice"),
    "two folders": (zipped(GOOD, {"n/data.pkl": LIVE["os.system"]}), "outside the one folder"),
    "program by another name": (zipped(LIVE["os.system"], named="m/data.pickle"), "without 'data.pkl'"),
    "program at the top": (zipped(LIVE["os.system"], named="data.pkl"), "outside the one folder"),
    "name that climbs": (zipped(GOOD, {"m/../../x": b"x"}), "has the name"),
    "name from the root": (zipped(GOOD, {"/etc/x": b"x"}), "has the name"),
    "name with a backslash": (zipped(GOOD, {"m\\x": b"x"}), "has the name"),
    "compressed": (zipped(GOOD, method=zipfile.ZIP_DEFLATED), "is compressed or encrypted"),
    "compressed a thousandfold": (zipped(GOOD, {"m/x": bytes(2**20)}, method=zipfile.ZIP_BZIP2), "is compressed"),
    "encrypted": (
        patched(zipped(GOOD), b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"),
        "encrypted",
    ),
    "overlapping": (stretched(), "not where the table of members says|overlaps"),
    "something before": (b"PK\x03\x04" + bytes(60) + zipped(GOOD), "is not a complete checkpoint|before the archive"),
    "something after": (zipped(GOOD) + b"x", "does not end where the file ends"),
    "a comment": (zipped(GOOD)[:-2] + b"\x03\x00abc", "does not end where the file ends"),
    "cut in half": (zipped(GOOD)[:200], "does not end where the file ends"),
    "no members": (b"PK\x03\x04" + bytes(30) + b"PK\x05\x06" + bytes(18), "table of members"),
    "fewer members than said": (
        zipped(GOOD)[:-14] + b"\x09\x00\x09\x00" + zipped(GOOD)[-10:],
        "lists 3 members and says",
    ),
    "storage too small": (zipped(GOOD, {"m/data/1": b"abc"}), ""),
    "flipped program": (patched(zipped(GOOD), b"FloatStorage", b"HalfStorage\0", 1), "checksum"),
    "big-endian": (zipped(GOOD, {"m/byteorder": b"big"}), "big-endian machine"),
    "TorchScript": (zipped(GOOD, {"m/constants.pkl": b"x"}), "TorchScript"),
    "not by torch": (zipped(b"", named="m/readme.txt"), "without 'data.pkl'"),
    "an alignment that is none": (zipped(GOOD, {"m/.storage_alignment": b"x"}), "could not be loaded"),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_archives_that_torch_does_not_write_are_refused(what: str) -> None:
    content, message = ARCHIVES[what]
    if not message:
        Path("m").write_bytes(content)
        assert torch.equal(open_weights("m")["w"], torch.zeros(4))  # odd, and harmless
        return
    assert re.search(message, refused(content)), refused(content)


def test_storages_that_the_archive_does_not_hold() -> None:
    assert "storage '0' of 32 bytes has 16 bytes" in refused(zipped(state(tensor(held=storage("0", 8)))))
    assert "storage '0' of 8 bytes has 16 bytes" in refused(zipped(state(tensor((2,), held=storage("0", 2)))))
    assert "storage '7' of 16 bytes is missing" in refused(zipped(state(tensor(held=storage("7")))))


def test_storages_that_the_older_form_does_not_hold() -> None:
    size = len(legacy(GOOD))
    assert f"is cut short: {size} bytes would hold its tensors and it has {size - 1}" in refused(legacy(GOOD)[:-1])
    assert "list of storages" in refused(legacy(GOOD, keys=pickle.dumps(["1"], 2)))
    assert "list of storages" in refused(legacy(GOOD, keys=pickle.dumps(["0", "0"], 2)))
    assert "list of storages" in refused(legacy(GOOD, keys=pickle.dumps([[["0"]]], 2)))
    assert "the size of storage '0' is wrong" in refused(legacy(GOOD, data=struct.pack("<q", 3) + bytes(16)))
    assert "is refused" in refused(legacy(GOOD, keys=LIVE["os.system"]))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_behind_our_check_stands_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "run", lambda machine, stream: None)
    for program in LIVE.values():
        message = refused(zipped(program))
        assert "weights_only" not in message, "advice to execute the file nevertheless is not passed on"


def test_an_archive_with_a_64_bit_end_opens() -> None:
    content = zipped(GOOD)
    rows, length, start = struct.unpack("<HII", content[-12:-2])
    end = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, rows, rows, length, start)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, len(content) - 22, 1)
    Path("m").write_bytes(content[:-22] + end + locator + content[-22:])
    assert torch.equal(open_weights("m")["w"], torch.zeros(4))
    lying = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, rows, rows, length - 1, start + 1)
    assert "two end records differ" in refused(content[:-22] + lying + locator + content[-22:])


def both(content: Any) -> Iterator[str]:
    for archive in (True, False):
        torch.save(content, "m.ckpt", _use_new_zipfile_serialization=archive)
        yield "m.ckpt"


def test_everything_is_as_torch_reads_it() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    base = torch.randn(6, 5)
    content = dict(module.state_dict()) | dict(nn.ParameterDict({"p": torch.ones(2)}))
    content |= {"transposed": base.T, "part": base[1:4, ::2], "whole": base, "none": torch.empty(0, 4)}
    content |= {"last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), "scalar": torch.tensor(3)}
    for path in both(content):
        weights, theirs = open_weights(path), torch.load(path, weights_only=True)
        assert set(weights) == set(theirs)
        for key, tensor_ in theirs.items():
            assert torch.equal(weights[key], tensor_) and weights[key].stride() == tensor_.stride(), key
            assert not weights[key].requires_grad
            assert torch.equal(
                weights.to(torch.float16)[key], tensor_.half() if tensor_.is_floating_point() else tensor_
            )


def test_an_ordered_table_with_its_metadata_opens() -> None:
    module = nn.Linear(2, 3)
    for path in both(module.state_dict()):  # an OrderedDict that has an attribute _metadata
        assert set(open_weights(path)) == {"weight", "bias"}


def test_what_a_table_says_of_itself_is_not_believed() -> None:
    """An OrderedDict may carry attributes that hide its methods."""
    hidden = b"".join(text(word) + name("_codecs.encode") + SET for word in ("items", "get", "keys", "values"))
    program = PROTO + ORDERED + text("w") + tensor() + SET + DICT + hidden + BUILD + STOP
    for content in (zipped(program), legacy(program)):
        Path("m").write_bytes(content)
        assert torch.equal(open_weights("m")["w"], torch.zeros(4))


def test_the_state_is_found_and_the_training_left() -> None:
    content = {
        "state_dict": {"w": torch.ones(2), "deep": {"x": torch.zeros(3)}},
        "global_step": 470_000,
        "epoch": 3,
        "rate": 0.5,
        "pytorch-lightning_version": "1.4.2",
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [],
    }
    for path in both(content):
        weights = open_weights(path)
        assert set(weights) == {"w", "deep.x"}
        said = {"global_step": "470000", "epoch": "3", "rate": "0.5", "pytorch-lightning_version": "1.4.2"}
        assert weights.metadata == said


def test_tables_in_tables_are_joined_with_dots() -> None:
    """As an embedding of several vectors is kept."""
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 4)}, "name": "cat", "step": None}
    for path in both(content | {"optimizer": {"state": {0: torch.ones(4)}}}):
        weights = open_weights(path)
        assert set(weights) == {"string_to_param.*"}
        assert weights.metadata == {"string_to_token.*": "265", "name": "cat"}


def test_names_that_coincide_are_refused() -> None:
    torch.save({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "m")
    with pytest.raises(ValueError, match=r"has the name 'a\.b' twice"):
        open_weights("m")
    shared: dict[str, Any] = {}
    torch.save({"a": shared, "b": {"c": shared}}, "m")
    with pytest.raises(ValueError, match="nested too deeply or comes twice"):
        open_weights("m")
    shared["itself"] = shared
    torch.save(shared, "m")
    with pytest.raises(ValueError, match="nested too deeply or comes twice"):
        open_weights("m")


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), None, 3])
def test_what_is_no_table_is_refused(content: Any) -> None:
    torch.save(content, "m")
    with pytest.raises(ValueError, match="a table of tensors is expected"):
        open_weights("m")


@pytest.mark.parametrize("content", [torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex64), nn.Linear(2, 2)])
def test_what_is_no_plain_tensor_is_refused_by_name(content: Any) -> None:
    for path in both({"x": content}):
        with pytest.raises(ValueError, match="it would call"):
            open_weights(path)


def test_what_training_leaves_behind_is_neither_imported_nor_made() -> None:
    """A checkpoint of the kind that PyTorch Lightning writes, with its class as a name and NumPy's numbers."""
    path = "pytorch_lightning.callbacks.model_checkpoint"
    made = types.ModuleType(path)
    made.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": path})  # type: ignore[attr-defined]
    parents = [types.ModuleType(parent) for parent in ("pytorch_lightning", "pytorch_lightning.callbacks")]
    content = {
        "state_dict": collections.OrderedDict(w=torch.ones(2)),
        "callbacks": {made.ModelCheckpoint: {"best_model_score": np.float64(0.5), "current": np.int64(3)}},
        "epoch": 1,
    }
    for module in (*parents, made):
        sys.modules[module.__name__] = module
    contents = [Path(file).read_bytes() for file in both(content)]
    for module in (*parents, made):
        del sys.modules[module.__name__]
    before = set(torch.serialization.get_safe_globals())
    for raw in contents:
        Path("m").write_bytes(raw)
        weights = open_weights("m")
        assert torch.equal(weights["w"], torch.ones(2)) and weights.metadata == {"epoch": "1"}
        assert "pytorch_lightning" not in sys.modules
        assert set(torch.serialization.get_safe_globals()) == before, "the placeholders stay registered"
