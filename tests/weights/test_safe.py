from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sfumato.weights.safe import check_finite, fill, lay_out, load_module, read_tensors, write_tensors
from sfumato.weights.source import open_weights


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


def test_missing_files_are_named(tmp_path: Path) -> None:
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


def test_types_that_cannot_be_weights_are_listed() -> None:
    state = build().state_dict() | {"0.bias": torch.arange(4)}
    with pytest.raises(ValueError, match=r"1 of another type: 0\.bias torch\.int64 instead of torch\.float32"):
        fill(build(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("count", [1, 7, 64, 1000])
def test_one_bad_number_anywhere_is_found(dtype: torch.dtype, count: int) -> None:
    good = torch.randn(count).to(dtype)
    check_finite({"good": good, "integers": torch.arange(3), "empty": torch.empty(0)})
    for place in {0, count // 2, count - 1}:
        for value in (float("nan"), float("inf"), -float("inf")):
            bad = good.clone()
            bad[place] = value
            with pytest.raises(ValueError, match=r"f\.pt cannot be used: 1 with NaN or infinite numbers: bad"):
                check_finite({"good": good, "bad": bad}, "f.pt")


def test_weights_that_are_no_numbers_do_not_load(tmp_path: Path) -> None:
    state = build().state_dict()
    state["1.bias"] = state["1.bias"] * float("nan")
    write_tensors(tmp_path / "m.safetensors", state)
    with pytest.raises(ValueError, match=r"m\.safetensors cannot be used: 1 with NaN .*: 1\.bias"):
        load_module(build, tmp_path / "m.safetensors")
    state["1.bias"] = torch.full((4,), 1e6)  # beyond float16, which makes an infinity of it
    write_tensors(tmp_path / "m.safetensors", state)
    load_module(build, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"1 with NaN or infinite numbers: 1\.bias"):
        load_module(build, tmp_path / "m.safetensors", torch.float16)


def test_a_module_is_filled_from_an_open_file(tmp_path: Path) -> None:
    module = build()
    torch.save({"state_dict": module.state_dict()}, tmp_path / "m.ckpt")
    with torch.device("meta"):
        other = build()
    with open_weights(tmp_path / "m.ckpt") as weights:
        fill(other, weights.to(torch.bfloat16))
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name].to(torch.bfloat16)), name


# Run apart, because what a test process has allocated before would hide what loading takes: print the peak and what
# is left after the module is gone, both in shares of its weights' bytes.
PEAK = """
import ctypes, sys, torch
from torch import nn
from sfumato.weights.safe import load_module
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
torch.set_num_threads(1)
torch.aminmax(torch.ones(8).half().float().bfloat16())
load_module(lambda: nn.Linear(2, 2), sys.argv[1])
for path, dtype in zip(sys.argv[2::2], sys.argv[3::2]):
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    module = load_module(lambda: nn.ModuleList(nn.Linear(1024, 1024) for _ in range(24)), path, getattr(torch, dtype))
    size = sum(tensor.nbytes for tensor in module.parameters())
    peak = (status("VmHWM") - before) / size
    del module
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # what was freed, and is kept for the next allocation, is no leak
    print(peak, (status("VmRSS") - before) / size)
assert "gguf" not in sys.modules, "it takes a second to import and serves files of its kind only"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_loading_takes_little_more_than_the_weights(tmp_path: Path) -> None:
    module = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(24))
    write_tensors(tmp_path / "32.safetensors", module.state_dict())
    write_tensors(tmp_path / "16.safetensors", module.state_dict(), torch.float16)
    torch.save(module.state_dict(), tmp_path / "32.ckpt")
    write_tensors(tmp_path / "small.safetensors", nn.Linear(2, 2).state_dict())
    rows = [("32.safetensors", "float32"), ("16.safetensors", "float32"), ("32.safetensors", "bfloat16")]
    rows.append(("32.ckpt", "float16"))
    arguments = [text for file, dtype in rows for text in (str(tmp_path / file), dtype)]
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small.safetensors"), *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for (file, dtype), line in zip(rows, printed.splitlines(), strict=True):
        peak, rest = map(float, line.split())
        print(f"{file} -> {dtype}: peak {peak:.3f} of the weights' bytes, {rest:.3f} left after them")
        assert peak < 1.15 and rest < 0.1


def test_laying_out_changes_the_order_in_memory_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(4, 4), nn.Conv2d(16, 8, 1))
    write_tensors(tmp_path / "m.safetensors", before.state_dict())
    module = load_module(
        lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(4, 4), nn.Conv2d(16, 8, 1)), tmp_path / "m.safetensors"
    )
    parameters = list(module.parameters())
    for _ in range(2):
        lay_out(module)
        assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
        assert all(torch.equal(t, module.state_dict()[name]) for name, t in before.state_dict().items())
    module[0].weight.sum().backward()  # laid out in inference mode or not, it can be trained
