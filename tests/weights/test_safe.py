from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sfumato.weights.safe import fill, load_module, read_tensors, write_tensors


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_module_comes_back_as_it_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    module = build()
    write_tensors(tmp_path / "sub" / "m.safetensors", module.state_dict(), dtype)
    loaded = load_module(build, tmp_path / "sub" / "m.safetensors", torch.float32)
    for (name, a), b in zip(module.state_dict().items(), loaded.state_dict().values(), strict=True):
        difference = float((a.to(dtype).float() - b).abs().max())
        assert difference == 0, f"{name}: {difference}"
        assert b.dtype == torch.float32 and not b.is_meta
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())


def test_integers_keep_their_type(tmp_path: Path) -> None:
    write_tensors(tmp_path / "m.safetensors", {"i": torch.arange(3), "x": torch.ones(2)}, torch.float16)
    tensors = read_tensors(tmp_path / "m.safetensors", torch.float64)
    assert tensors["i"].dtype == torch.int64 and tensors["x"].dtype == torch.float64


def test_layouts_other_than_contiguous_can_be_written(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    write_tensors(tmp_path / "m.safetensors", {"x": x, "y": x.transpose(0, 1).clone().transpose(0, 1)})
    read = read_tensors(tmp_path / "m.safetensors")
    assert torch.equal(read["x"], x) and torch.equal(read["y"], x)


def test_what_does_not_fit_is_listed() -> None:
    state = build().state_dict()
    state["extra"] = state.pop("0.bias")
    state["1.weight"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"1 missing: 0\.bias; 1 unknown: extra; 1 of another shape: 1\.weight \(5,\)"):
        fill(build(), state, "some.safetensors")


def test_long_lists_are_cut_and_counted() -> None:
    with pytest.raises(ValueError, match=r"12 unknown: .* and 4 more"):
        fill(build(), build().state_dict() | {f"k{i}": torch.zeros(1) for i in range(12)})


def test_ignored_names_are_dropped(tmp_path: Path) -> None:
    write_tensors(tmp_path / "m.safetensors", build().state_dict() | {"position_ids": torch.arange(4)})
    load_module(build, tmp_path / "m.safetensors", ignored=("position_ids",))
    with pytest.raises(ValueError, match="1 unknown: position_ids"):
        load_module(build, tmp_path / "m.safetensors")


def test_cut_short_and_lying_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_tensors(path, build().state_dict())
    whole = path.read_bytes()
    for damaged in (b"", whole[:4], whole[: len(whole) // 2], whole[:-1], b"\xff" * 8 + whole[8:], b"<html>" * 40):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"m\.safetensors .*is not a complete safetensors file"):
            read_tensors(path)
    with pytest.raises(FileNotFoundError, match=r"no weights file .*gone"):
        read_tensors(tmp_path / "gone.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_tensors(path, {"x": torch.ones(2)})
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError):  # two names for one storage, which safetensors refuses
        write_tensors(path, {"a": shared, "b": shared})
    assert torch.equal(read_tensors(path)["x"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_loaded_module_can_be_trained(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_tensors(path, build().state_dict())
    before = path.read_bytes()
    module = load_module(build, path).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.randn(2, 3)).square().sum().backward()
    optimizer.step()
    assert path.read_bytes() == before, "the mapped file was written to"
