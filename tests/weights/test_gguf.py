from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.weights.source import open_weights

gguf = pytest.importorskip("gguf", reason='GGUF files need pip install "sfumato[gguf]"')
EXACT = ("F32", "F16", "BF16")
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


def blocks(kind: str) -> np.ndarray:
    """Three rows of two blocks each: any numbers with sensible scales."""
    count, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    generator = np.random.default_rng(count * size)
    if kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        rows = generator.standard_normal((3, 2 * count)).astype(np.float32)
        return gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind])
    return generator.integers(0, 60, (3, 2 * size)).astype(np.uint8)  # no exponent of all ones, so no infinity


def write(path: Path) -> dict[str, torch.Tensor]:
    """A file by the package's own writer, and what its tensors should be."""
    writer = gguf.GGUFWriter(str(path), "sd1")
    writer.add_uint32("sd.version", 3)
    writer.add_string("general.name", "tiny")
    writer.add_array("tags", ["a", "b"])
    writer.add_array("comfy.gguf.orig_shape.conv.weight", [8, 4, 4, 4])
    wanted = {}
    plain = torch.randn(2, 3, 5)
    for kind, dtype in zip(EXACT, (torch.float32, torch.float16, torch.bfloat16), strict=True):
        tensor = plain.to(dtype)
        raw = tensor.view(torch.uint8).numpy() if kind == "BF16" else tensor.numpy()
        writer.add_tensor(kind, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
        wanted[kind] = tensor
    for kind in QUANTISED:
        raw = blocks(kind)
        writer.add_tensor(kind, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
        wanted[kind] = torch.from_numpy(np.array(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])))
    kernel = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    raw = gguf.quants.quantize(kernel, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("conv.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    unpacked = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
    wanted["conv.weight"] = torch.from_numpy(np.array(unpacked)).reshape(8, 4, 4, 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("gguf") / "m.safetensors"  # whatever the name
    return path, write(path)


def test_every_type_reads_as_the_package_unpacks_it(example: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, wanted = example
    weights = open_weights(path)
    assert weights.kind == "gguf" and set(weights) == set(wanted)
    for name, tensor in wanted.items():
        for _ in range(2):
            read = weights[name]
            difference = float((read.double() - tensor.double()).abs().max())
            assert difference == 0 and read.dtype == tensor.dtype, f"{name}: {difference}"
        assert weights.infos[name].shape == tuple(read.shape) == tuple(tensor.shape)
        assert weights.infos[name].dtype == read.dtype
        halves = weights.to(torch.float16)[name]
        assert torch.equal(halves, tensor.half()), name


def test_numbers_and_texts_are_metadata(example: tuple[Path, dict[str, torch.Tensor]]) -> None:
    said = open_weights(example[0]).metadata
    assert said == {"general.architecture": "sd1", "general.name": "tiny", "sd.version": "3"}


def test_what_was_quantised_is_near(tmp_path: Path) -> None:
    """The blocks lie where the shape says: a mistake in the order of the axes would be as large as the numbers."""
    numbers = torch.randn(6, 64)
    writer = gguf.GGUFWriter(str(tmp_path / "m"), "sd1")
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("x", gguf.quants.quantize(numbers.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    difference = float((open_weights(tmp_path / "m")["x"] - numbers).abs().max())
    print(f"Q8_0 differs from what was quantised by {difference:.4f}")
    assert difference < 0.02


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def made(
    tensors: bytes = b"",
    count: int = 0,
    values: bytes = b"",
    many: int = 0,
    version: int = 3,
    data: bytes = bytes(64),
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, count, many) + values + tensors
    return head + bytes(-len(head) % 32) + data


def row(name: str = "x", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def uint32(name: str, value: int) -> bytes:
    return text(name) + struct.pack("<II", 4, value)


SHAPE = text("comfy.gguf.orig_shape.x") + struct.pack("<IIQqq", 9, 11, 2, 2, 3)
LIES: dict[str, bytes] = {
    "nothing but its name": b"GGUF",
    "half a header": b"GGUF\x03\0\0\0" + bytes(7),
    "tensors without end": made(count=2**63),
    "more tensors than there are": made(row(), 2),
    "values without end": made(many=2**63),
    "a name without end": made(struct.pack("<Q", 2**63) + bytes(99), 1),
    "a name too long": made(row("x" * 5000), 1),
    "a name that is no text": made(struct.pack("<Q", 2) + b"\xff\xff" + bytes(99), 1),
    "a name twice": made(row() + row(offset=32), 2),
    "no axes": made(row(shape=()), 1),
    "nine axes": made(row(shape=(1,) * 9), 1),
    "axes without end": made(text("x") + struct.pack("<I", 2**31) + bytes(99), 1),
    "a side of zero": made(row(shape=(0,)), 1),
    "sides without end": made(row(shape=(2**40, 2**40)), 1),
    "beyond the file": made(row(shape=(17,)), 1),
    "from beyond the file": made(row(offset=64), 1),
    "offset without end": made(row(offset=2**64 - 8), 1),
    "overlapping": made(row() + row("y", offset=8), 2),
    "half a block": made(row(shape=(33,), kind=8), 1),
    "alignment of zero": made(row(), 1, uint32("general.alignment", 0), 1),
    "alignment of three": made(row(), 1, uint32("general.alignment", 3), 1),
    "alignment without end": made(row(), 1, uint32("general.alignment", 2**31), 1),
    "alignment that is a text": made(row(), 1, text("general.alignment") + struct.pack("<I", 8) + text("32"), 1),
    "a value twice": made(row(), 1, uint32("a", 1) + uint32("a", 1), 2),
    "a value of no type": made(row(), 1, text("a") + struct.pack("<II", 13, 0), 1),
    "a list of lists": made(row(), 1, text("a") + struct.pack("<IIQ", 9, 9, 1), 1),
    "a list without end": made(row(), 1, text("a") + struct.pack("<IIQ", 9, 0, 2**62), 1),
    "texts without end": made(row(), 1, text("a") + struct.pack("<IIQ", 9, 8, 2**60), 1),
    "another original shape": made(row(), 1, SHAPE, 1),
}


@pytest.mark.parametrize("what", LIES)
def test_lying_headers_are_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "m.gguf").write_bytes(LIES[what])
    with pytest.raises(ValueError, match=r"is not a complete GGUF file: .*fetch or convert it again") as caught:
        open_weights(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


def test_the_files_made_here_can_be_valid(tmp_path: Path) -> None:
    """Without this, each of them could be refused for a mistake in making it."""
    values = uint32("general.alignment", 64) + text("a") + struct.pack("<IIQBB", 9, 0, 2, 1, 1)
    (tmp_path / "m").write_bytes(made(row(shape=(2, 3)) + row("y", (8,), 24, 32), 2, values, 2, data=bytes(96)))
    weights = open_weights(tmp_path / "m")
    assert weights["x"].shape == (3, 2) and weights["y"].dtype == torch.int8
    assert gguf.GGUFReader(tmp_path / "m").tensors[0].shape.tolist() == [2, 3]


def test_other_versions_and_types_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for version, message in ((1, r"version 1; known: 2, 3"), (3 << 24, "of a big-endian machine")):
        path.write_bytes(made(row(), 1, version=version))
        with pytest.raises(ValueError, match=message):
            open_weights(path)
    for kind in (4, 9, 200):  # removed; not for storing; not known
        path.write_bytes(made(row(shape=(32,), kind=kind), 1))
        with pytest.raises(ValueError, match=f"ggml's type {kind}, which the installed gguf package cannot unpack"):
            open_weights(path)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gguf", "gguf.constants", "gguf.quants"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "m").write_bytes(made(row(), 1))
    with pytest.raises(ValueError, match=r'pip install "sfumato\[gguf\]"'):
        open_weights(tmp_path / "m")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_give_a_clear_error_or_load(
    tmp_path_factory: pytest.TempPathFactory, example: tuple[Path, Any], data: st.DataObject
) -> None:
    content = bytearray(example[0].read_bytes())
    place = st.one_of(st.integers(0, 1200), st.integers(0, len(content) - 1))
    for at, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=4), "changed"):
        content[at] = value
    if data.draw(st.booleans(), "cut"):
        del content[data.draw(place, "from") :]
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(content)
    try:
        weights = open_weights(path)
        for name in weights:
            assert tuple(weights[name].shape) == weights.infos[name].shape
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error), error
