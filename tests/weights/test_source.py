from __future__ import annotations

import gc
import json
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from sfumato.weights.source import Weights, open_weights

STATE = {
    "w": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
    "h": torch.linspace(-1, 1, 7).half(),
    "n": torch.arange(5),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
}


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def row(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, kind: str) -> Path:
    if kind == "safetensors":
        save_file(STATE, path, metadata={"format": "pt"})
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".bin", ""])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_the_content_decides_whatever_the_name(tmp_path: Path, kind: str, suffix: str) -> None:
    with open_weights(write(tmp_path / f"m{suffix}", kind)) as weights:
        assert weights.kind == ("safetensors" if kind == "safetensors" else "pickle")
        assert set(weights) == set(STATE) and len(weights) == len(STATE)
        for name, tensor in STATE.items():
            assert same(weights[name], tensor), name
            assert weights.infos[name].shape == tuple(tensor.shape) and weights.infos[name].dtype == tensor.dtype
            assert weights.infos[name].nbytes == tensor.nbytes


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_conversion_happens_on_reading(tmp_path: Path, kind: str) -> None:
    weights = open_weights(write(tmp_path / "m", kind))
    halves = weights.to(torch.float16)
    for name, tensor in STATE.items():
        wanted = tensor.half() if tensor.is_floating_point() else tensor
        assert halves.infos[name].dtype == wanted.dtype
        for _ in range(2):  # pages that were released are read again
            assert same(halves[name], wanted), name
            assert same(weights[name], tensor), name


@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_tensors_are_private_and_outlive_the_file(tmp_path: Path, kind: str) -> None:
    big = {"w": torch.ones(100_000)}
    path = tmp_path / "m"
    if kind == "zip":
        torch.save(big, path)
    else:
        save_file(big, path)
    before = path.read_bytes()
    with open_weights(path) as weights:
        tensor = weights["w"]
        tensor.mul_(3)
        assert float(weights.to(torch.float64)["w"].max()) == 1, "a conversion reads the file"
        weights.to(torch.float16)["w"]
    gc.collect()
    assert float(tensor.min()) == 3, "converting must not undo what was written to a tensor"
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="was closed; open it again"):
        weights["w"]
    with pytest.raises(ValueError, match="was closed"):
        weights.to(torch.float16)


@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_views_of_one_file_do_not_disturb_one_another(tmp_path: Path, kind: str) -> None:
    """Converting releases pages, which must never be those of a tensor that somebody has."""
    big = {"w": torch.ones(100_000)}
    path = tmp_path / "m"
    if kind == "zip":
        torch.save(big, path)
    else:
        save_file(big, path)
    weights = open_weights(path)
    converted, views = weights.to(torch.float16), weights.to()
    held = [views["w"], weights["w"], converted.to()["w"]]
    for factor, tensor in enumerate(held, 2):
        tensor.mul_(factor)
    for source in (converted, weights.to(torch.float64), views.to(torch.bfloat16), weights.to(torch.float16)):
        assert float(source["w"].max()) == 1
    assert [float(tensor.min()) for tensor in held] == [2, 3, 4]


def test_nothing_is_read_to_know_what_is_there(tmp_path: Path) -> None:
    weights = open_weights(write(tmp_path / "m", "safetensors"))
    assert "w" in weights and "x" not in weights and list(weights.infos) == list(weights)
    with pytest.raises(KeyError):
        weights["x"]
    assert weights.metadata == {"format": "pt"}


def test_tensors_of_one_file_have_storages_of_their_own(tmp_path: Path) -> None:
    weights = open_weights(write(tmp_path / "m", "safetensors"))
    assert weights["w"].untyped_storage().nbytes() == STATE["w"].nbytes
    save_file(dict(weights), tmp_path / "again")  # which refuses tensors that share one
    assert same(open_weights(tmp_path / "again")["w"], STATE["w"])


def test_an_element_that_begins_at_an_odd_byte_is_copied(tmp_path: Path) -> None:
    data = b"\x07" + STATE["w"].numpy().tobytes()
    header = {"b": row("U8", [1], 0, 1), "w": row("F32", [2, 3, 4], 1, 97)}
    for padding in range(4):
        (tmp_path / "m").write_bytes(packed(json.dumps(header).encode() + b" " * padding, data))
        weights = open_weights(tmp_path / "m")
        assert same(weights["w"], STATE["w"]) and weights["w"].data_ptr() % 4 == 0
        assert same(weights.to(torch.float16)["w"], STATE["w"].half())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.bool, torch.uint16])
def test_small_types(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([0, 1, 1, 0]).to(dtype)
    save_file({"x": tensor}, tmp_path / "a")
    torch.save({"x": tensor}, tmp_path / "b")
    for name in "ab":
        read = open_weights(tmp_path / name)["x"]
        assert read.dtype == dtype and torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


# What people have instead of weights, and the mend they are told.
OTHERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty; fetch it again"),
    "short": (b"abc", "too short to be weights; fetch it again"),
    "zeros": (bytes(9000), "all zeros at its beginning, as an unfinished download is; fetch it again"),
    "page": (b"\n <!DOCTYPE html><html>" + b" " * 99, "a web page .* fetch the file itself"),
    "xml": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "a web page or an XML answer"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a git-lfs pointer.*git lfs pull"),
    "gzip": (b"\x1f\x8b" + bytes(99), "compressed with gzip; unpack it first"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(99), "a picture"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    "tar": (b"a" * 257 + b"ustar" + b"a" * 300, "a tar archive"),
    "text": (b"once upon a time there was a file", "no weights file that is known; it begins with"),
    "json": (b'{"error": "not found"}', "JSON without a weight_map"),
    "half json": (b'{"weight_map": {', "looks like JSON, and is not an index"),
    "zip": (b"PK\x05\x06" + bytes(18), "an empty zip archive"),
    "half zip": (b"PK\x03\x04" + bytes(99), "does not end where the file ends; fetch it again"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_recognised(tmp_path: Path, name: str) -> None:
    content, message = OTHERS[name]
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_weights(tmp_path / "m.safetensors")
    assert "\n" not in str(caught.value) and "m.safetensors" in str(caught.value)


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights file .*gone"):
        open_weights(tmp_path / "gone")
    with pytest.raises(ValueError, match="is a folder; name one file"):
        open_weights(tmp_path)


F32 = {"a": row("F32", [2], 0, 8)}
LIES: dict[str, bytes] = {
    "header longer than the file": packed(F32, bytes(8), length=10_000),
    "header beyond all measure": packed(F32, bytes(8), length=2**63),
    "header beyond the limit": struct.pack("<Q", 17 * 2**20) + b'{"a":1}' + b" " * (17 * 2**20),
    "header cut short": packed(F32, bytes(8))[:30],
    "data cut short": packed(F32, bytes(7)),
    "data too long": packed(F32, bytes(9)),
    "not JSON": packed(b'{"a": nonsense}', bytes(8)),
    "not UTF-8": packed(b'{"\xff": 1}', bytes(8)),
    "half of a surrogate pair": packed(b'{"\\ud800": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "nested without end": packed(b'{"a":' + b"[" * 100_000, bytes(8)),
    "brackets without end": packed(b'{"a":[' + b"[]," * 600_000 + b"[]]}"),
    "a name twice": packed(b"{" + json.dumps(F32)[1:-1].encode() + b"," + json.dumps(F32)[1:].encode(), bytes(8)),
    "a number too long": packed(b'{"a":{"dtype":"F32","shape":[' + b"9" * 9999 + b'],"data_offsets":[0,8]}}', bytes(8)),
    "unknown type": packed({"a": row("F7", [2], 0, 8)}, bytes(8)),
    "type that is none": packed({"a": row([], [2], 0, 8)}, bytes(8)),  # type: ignore[arg-type]
    "row without shape": packed({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "row that is a list": packed({"a": [1]}, bytes(8)),
    "shape with a fraction": packed({"a": row("F32", [2.0], 0, 8)}, bytes(8)),
    "shape with true": packed({"a": row("F32", [True, 2], 0, 8)}, bytes(8)),
    "negative shape": packed({"a": row("F32", [-1, -2], 0, 8)}, bytes(8)),
    "shape larger than its span": packed({"a": row("F32", [2**40], 0, 8)}, bytes(8)),
    "shape that overflows": packed({"a": row("F32", [2**62, 0, 2**62], 0, 0)}),
    "65 axes": packed({"a": row("F32", [1] * 64 + [2], 0, 8)}, bytes(8)),
    "offsets backwards": packed({"a": row("F32", [2], 8, 0)}, bytes(8)),
    "offsets beyond the file": packed({"a": row("F32", [2], 8, 16)}, bytes(8)),
    "negative offsets": packed({"a": row("F32", [2], -8, 0)}, bytes(8)),
    "three offsets": packed({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, bytes(8)),
    "overlap": packed(F32 | {"b": row("F32", [2], 4, 12)}, bytes(12)),
    "two names for the same bytes": packed(F32 | {"b": row("F32", [2], 0, 8)}, bytes(8)),
    "gap": packed(F32 | {"b": row("F32", [2], 12, 20)}, bytes(20)),
    "gap at the beginning": packed({"a": row("F32", [2], 4, 12)}, bytes(12)),
    "metadata of numbers": packed(F32 | {"__metadata__": {"a": 1}}, bytes(8)),
    "metadata that is a list": packed(F32 | {"__metadata__": []}, bytes(8)),
}


@pytest.mark.parametrize("name", LIES)
def test_lying_headers_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "m.bin").write_bytes(LIES[name])
    with pytest.raises(ValueError, match=r"is not a complete safetensors file: .*fetch or save it again") as caught:
        open_weights(tmp_path / "m.bin")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def sharded(folder: Path) -> Path:
    save_file({"w": STATE["w"]}, folder / "m-1.safetensors")
    torch.save({"h": STATE["h"]}, folder / "m-2.bin")
    index = {"metadata": {"total_size": 110}, "weight_map": {"w": "m-1.safetensors", "h": "m-2.bin"}}
    (folder / "m.json").write_text(json.dumps(index))
    return folder / "m.json"


def test_an_index_gathers_its_shards(tmp_path: Path) -> None:
    weights = open_weights(sharded(tmp_path))
    assert weights.kind == "sharded" and set(weights) == {"w", "h"}
    assert same(weights["w"], STATE["w"]) and same(weights["h"], STATE["h"])
    converted = weights.to(torch.bfloat16)
    assert same(converted["w"], STATE["w"].bfloat16()) and same(converted["h"], STATE["h"].bfloat16())


def edited(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / "m.json").read_text())
        change(index["weight_map"])
        (folder / "m.json").write_text(json.dumps(index))

    return edit


WRONG_SHARDS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "gone": (lambda folder: (folder / "m-2.bin").unlink(), FileNotFoundError, "names the shard 'm-2.bin'"),
    "elsewhere": (edited(lambda rows: rows.update(h="../m-2.bin")), ValueError, "which is no file name"),
    "rooted": (edited(lambda rows: rows.update(h="/etc/passwd")), ValueError, "which is no file name"),
    "no text": (edited(lambda rows: rows.update(h=3)), ValueError, "which is no file name"),
    "a folder": (edited(lambda rows: rows.update(h=".")), ValueError, "which is no file name|names the shard"),
    "itself": (edited(lambda rows: rows.update(h="m.json")), ValueError, "which is an index itself"),
    "too many names": (edited(lambda rows: rows.update(x="m-2.bin")), ValueError, "only the index has 'x'"),
    "too few names": (edited(lambda rows: rows.update(h="m-1.safetensors")), ValueError, "do not belong together"),
    "none": (edited(lambda rows: rows.clear()), ValueError, "JSON without a weight_map"),
}


@pytest.mark.parametrize("name", WRONG_SHARDS)
def test_wrong_shards_are_named(tmp_path: Path, name: str) -> None:
    path = sharded(tmp_path)
    edit, kind, message = WRONG_SHARDS[name]
    edit(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        open_weights(path)
    assert caught.type is kind or name == "a folder"


def read_all(path: Path) -> None:
    """Open a file and read everything in it, which may only work or raise ValueError."""
    try:
        with open_weights(path) as weights:
            for name in weights:
                assert tuple(weights[name].shape) == weights.infos[name].shape
                weights.to(torch.float32)[name]
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error), error


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("valid")
    return {kind: write(folder / kind, kind).read_bytes() for kind in ("safetensors", "zip", "legacy")}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_give_a_clear_error_or_load(
    tmp_path_factory: pytest.TempPathFactory, valid: dict[str, bytes], data: st.DataObject
) -> None:
    content = bytearray(valid[data.draw(st.sampled_from(sorted(valid)), "kind")])
    # What decides is at the beginning and, for archives, at the end.
    near = st.integers(0, min(400, len(content) - 1))
    place = st.one_of(near, near.map(lambda n: len(content) - 1 - n), st.integers(0, len(content) - 1))
    for at, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=4), "changed"):
        content[at] = value
    if data.draw(st.booleans(), "cut"):
        del content[data.draw(place, "from") :]
    if data.draw(st.booleans(), "longer"):
        content[data.draw(near, "at") : 0] = data.draw(st.binary(max_size=20), "with")
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(content)
    read_all(path)


@settings(max_examples=100, deadline=None)
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "I8"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["a", "__metadata__", "dtype", "shape", "data_offsets"]) | st.text(max_size=3), inner
            )
        ),
        max_leaves=12,
    ),
    data=st.binary(max_size=16),
)
def test_any_header_gives_a_clear_error_or_loads(
    tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(packed(header, data))
    read_all(path)


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_refusing_takes_little_memory(tmp_path: Path) -> None:
    """Files of a few megabytes that ask for terabytes."""
    torch.save({"a": torch.zeros(1)}, tmp_path / "zip")
    torch.save({"a": torch.zeros(1)}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    legacy = (tmp_path / "legacy").read_bytes()
    with zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2**26))
    bombs = {
        "strings": packed(b'{"a":[' + b'"ab",' * (3 * 2**20) + b'"ab"]}'),
        "brackets": LIES["brackets without end"],
        # K 1 is the number of elements of the only storage; it becomes 2 ** 40.
        "storage": re.sub(rb"(?<=cpuq.)K\x01", lambda _: b"\x8a\x06" + (2**40).to_bytes(6, "little"), legacy),
        "lists": b"\x80\x02" + b"]" * (8 * 2**20),
        "text": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + bytes(2**20),
        "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + bytes(2**20),
        "packed": (tmp_path / "packed").read_bytes(),
        "gguf": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + bytes(2**20),
    }
    assert bombs["storage"] != legacy
    for name, content in bombs.items():
        (tmp_path / "bomb").write_bytes(content)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        with pytest.raises(ValueError):
            open_weights(tmp_path / "bomb")
        grown = (status("VmHWM") - before) / 2**20
        print(f"{name}: {len(content) / 2**20:.1f} MiB, peak {grown:.0f} MiB more")
        assert grown < 400, name


def test_a_weights_object_is_a_mapping(tmp_path: Path) -> None:
    weights: Weights = open_weights(write(tmp_path / "m", "safetensors"))
    assert all(same(tensor, STATE[name]) for name, tensor in weights.items())
    assert weights.get("gone") is None


def test_a_file_may_be_larger_than_memory(tmp_path: Path) -> None:
    """What is mapped takes no memory until it is read, and none is set aside."""
    overcommit = Path("/proc/sys/vm/overcommit_memory")
    if not overcommit.exists() or overcommit.read_text().strip() == "2":
        pytest.skip("the system sets memory aside for everything")
    size = 2**40
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode().ljust(96)
    with open(tmp_path / "huge.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    with open_weights(tmp_path / "huge.safetensors") as weights:
        tensor = weights["a"]
    assert tensor.shape == (size,) and int(tensor[size // 2]) == 0
    tensor[-1] = 3  # in memory alone
    with open_weights(tmp_path / "huge.safetensors") as weights:
        assert int(weights["a"][-1]) == 0
