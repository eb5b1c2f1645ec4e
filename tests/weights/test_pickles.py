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
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sfumato.weights.opcodes import Machine
from sfumato.weights.source import open_weights

from .malicious import (
    BUILD,
    CANARY,
    DEAD,
    DICT,
    FORMS,
    LIVE,
    ORDERED,
    PROTO,
    SET,
    STOP,
    legacy,
    name,
    state,
    storage,
    tensor,
    text,
    zipped,
)

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
