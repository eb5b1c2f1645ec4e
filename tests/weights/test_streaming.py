"""Weights that come and go: the same numbers, the same names, and the file's pages given back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.weights.mapped import FileRanges, Info
from sfumato.weights.packed import Packed
from sfumato.weights.safe import load_module
from sfumato.weights.streaming import Residence, home_of

CPU = torch.device("cpu")


class Small(nn.Module):
    """Layers of each kind, and a table that the module itself owns."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.first = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.filter = nn.Conv2d(16, 8, 3, padding=1)
        self.register_buffer("table", torch.randn(16))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.first(self.words(ids))) * self.table  # (B, L, 16)
        return self.filter(h.transpose(1, 2)[..., None])  # (B, 8, L, 1)


def stored(tmp_path: Path, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A module whose weights are views of a file."""
    torch.manual_seed(seed)
    path = tmp_path / f"{dtype}.safetensors"
    save_file({k: v.to(dtype) if v.is_floating_point() else v for k, v in Small().state_dict().items()}, path)
    return load_module(Small, path, check=False)


def residence(
    modules: Sequence[nn.Module], stream: bool = True, dtype: torch.dtype = torch.float32, smallest: int = 20
) -> Residence:
    stages = {str(i): [module] for i, module in enumerate(modules)}
    return Residence(stages, CPU, dtype, stream, modules, smallest)


FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, *FP8])
def test_the_numbers_are_those_of_a_converted_module(tmp_path: Path, dtype: torch.dtype, stream: bool) -> None:
    ids = torch.arange(12).view(2, 6)
    whole = stored(tmp_path, dtype).to(torch.float32)
    whole.filter.weight.data = whole.filter.weight.data.contiguous(memory_format=torch.channels_last)
    module = stored(tmp_path, dtype)
    residence([module], stream)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(module(ids), whole(ids))


def test_names_and_originals_are_kept(tmp_path: Path) -> None:
    module = stored(tmp_path, torch.float16)
    before = dict(module.named_parameters())
    home = residence([module])
    with torch.no_grad():
        module(torch.zeros(1, 3, dtype=torch.int64))
    assert list(dict(module.named_parameters())) == list(before)
    assert module.first.weight is before["first.weight"]
    assert module.norm.weight.dtype == torch.float32  # small, so it stays
    with home.stored():
        assert {name: p.dtype for name, p in module.named_parameters()} == dict.fromkeys(before, torch.float16)
    home.close()
    assert all(p is before[name] for name, p in module.named_parameters())
    assert not module.first._forward_pre_hooks and home_of(module.first) is None
    residence([module]).close()  # and once more


def test_weights_stay_until_another_stage_begins(tmp_path: Path) -> None:
    one, other = stored(tmp_path, torch.float16), stored(tmp_path, torch.bfloat16)
    residence([one, other], stream=False)
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with torch.inference_mode():
        one(ids)
        assert (one.first.weight.dtype, other.first.weight.dtype) == (torch.float32, torch.bfloat16)
        kept = one.first.weight
        one(ids)
        assert one.first.weight is kept
        other(ids)
        assert (one.first.weight.dtype, other.first.weight.dtype) == (torch.float16, torch.float32)


def test_an_error_in_a_layer_lets_its_weights_go(tmp_path: Path) -> None:
    module = stored(tmp_path, torch.float16)
    residence([module])
    with torch.no_grad(), pytest.raises(RuntimeError):
        module.first(torch.zeros(1, 3))
    assert module.first.weight.dtype == torch.float16


def test_gradients_reach_the_input(tmp_path: Path) -> None:
    module, whole = stored(tmp_path, torch.float16), stored(tmp_path, torch.float16).to(torch.float32)
    residence([module])
    found = []
    for net in (module, whole):
        x = torch.ones(2, 8, requires_grad=True)
        net.norm(net.first(net.first(x)[:, :8]).square()).square().mean().backward()
        found.append(x.grad)
    assert found[0] is not None and found[1] is not None and torch.equal(found[0], found[1])


def test_what_is_put_on_a_weight_is_put_on_whenever_it_comes(tmp_path: Path) -> None:
    module, whole = stored(tmp_path, torch.float16), stored(tmp_path, torch.float16).to(torch.float32)
    home = residence([module])
    x = torch.randn(2, 8)
    of = home_of(module.first)
    assert of is not None
    of.dress("weight", lambda w: w + 1)
    of.dress("bias", lambda b: b * 2)
    with torch.no_grad():
        whole_dressed = nn.functional.linear(x, whole.first.weight + 1, whole.first.bias * 2)
        assert torch.equal(module.first(x), whole_dressed)
        of.undress()
        assert torch.equal(module.first(x), whole.first(x))
        home.to(CPU, torch.bfloat16)
        assert module.first(x.bfloat16()).dtype == torch.bfloat16 == module.norm.weight.dtype


def test_packed_weights_are_unpacked_for_each_call(tmp_path: Path) -> None:
    module, whole = stored(tmp_path, torch.float16), stored(tmp_path, torch.float16).to(torch.float32)
    numbers, calls = whole.first.weight.detach().clone(), []
    module.first.weight = Packed.of(Info((16, 8), torch.float32), lambda: calls.append(1) or numbers.clone())
    home = residence([module])
    x = torch.randn(2, 8)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(module.first(x), whole.first(x))
    assert len(calls) == 2 and module.first.weight.is_meta
    home.close()
    assert torch.equal(module.first.weight, numbers)


def test_weights_come_and_go_for_one_owner(tmp_path: Path) -> None:
    module = stored(tmp_path, torch.float16)
    residence([module])
    with pytest.raises(ValueError, match="come and go already"):
        residence([module])


def test_views_of_files_are_told_from_other_memory(tmp_path: Path) -> None:
    module = stored(tmp_path, torch.float16)
    ranges = FileRanges()
    assert module.first.weight in ranges
    assert torch.zeros(10_000) not in ranges and torch.empty(3, device="meta") not in ranges


class Wide(nn.Module):
    """16 layers of 4 MiB in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(1448, 1448, bias=False) for _ in range(16)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def memory(name: str) -> float:
    """MiB of a row of /proc/self/status."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith(f"{name}:")) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says what is resident")
def test_memory_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "wide.safetensors"
    save_file({f"layers.{i}.weight": torch.full((1448, 1448), 0.001, dtype=torch.float16) for i in range(16)}, path)
    module = load_module(Wide, path, check=False)
    home = residence([module], smallest=1000)
    x = torch.ones(1, 1448)
    with torch.inference_mode():
        module.layers[0](x)  # scratch
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        module(x)
        peak, after = memory("VmHWM") - before, memory("VmRSS") - before
    print(f"64 MiB of weights: {peak:.1f} MiB at the peak, {after:.1f} MiB after")
    assert peak < 16 and after < 8
    home.leave()
    assert memory("VmRSS") - before < 1
