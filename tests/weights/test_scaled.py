"""8-bit weights with scales, in both of ComfyUI's spellings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.weights.packed import Packed
from sfumato.weights.safe import fill, load_module
from sfumato.weights.source import open_weights

EIGHT = torch.float8_e4m3fn


def scaled(weight: Tensor, dtype: torch.dtype, rows: bool = False) -> tuple[Tensor, Tensor]:
    """A weight in 8 bits and its scale, of which there is one, or one a row."""
    most = weight.abs().amax(dim=1) if rows else weight.abs().max()
    scale = most / torch.finfo(dtype).max
    return (weight / (scale[:, None] if rows else scale)).to(dtype), scale


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("spelling", ["old", "new", "rows"])
def test_the_weight_is_the_number_times_the_scale(tmp_path: Path, spelling: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, path = nn.Linear(16, 24), tmp_path / "x.safetensors"
    weight, scale = scaled(layer.weight.detach(), dtype, spelling == "rows")
    tensors = {"weight": weight, "bias": layer.bias.detach().half()}
    tensors = {f"net.{name}": tensor for name, tensor in tensors.items()}
    if spelling == "old":
        tensors |= {"net.scale_weight": scale, "net.scale_input": torch.ones(1), "scaled_fp8": torch.empty(2).to(EIGHT)}
    else:
        tensors |= {"net.weight_scale": scale, "net.comfy_quant": torch.zeros(30, dtype=torch.uint8)}
    save_file(tensors, path)
    with open_weights(path) as weights:
        assert set(weights) == {"net.weight", "net.bias"}
        assert weights.infos["net.weight"].dtype == torch.float32
        found = weights["net.weight"]
        exact = weight.float() * (scale[:, None] if spelling == "rows" else scale)
        assert torch.equal(found, exact)
        assert torch.equal(weights.to(torch.float16)["net.weight"], exact.half())
    weight_max = layer.weight.detach().abs().max()
    error = float((exact - layer.weight.detach()).abs().max() / weight_max)
    print(f"{dtype}: error {error:.3f} of the largest weight")
    assert error < (0.04 if dtype == EIGHT else 0.08)


def test_plain_8_bit_weights_stay_8_bit(tmp_path: Path) -> None:
    weight = torch.randn(4, 4).to(EIGHT)
    save_file({"weight": weight, "bias": torch.zeros(4)}, tmp_path / "x.safetensors")
    layer = load_module(lambda: nn.Linear(4, 4), tmp_path / "x.safetensors")
    assert layer.weight.dtype == EIGHT
    assert load_module(lambda: nn.Linear(4, 4), tmp_path / "x.safetensors", torch.float32).weight.dtype == torch.float32


def test_scales_without_8_bit_weights_are_unknown_names(tmp_path: Path) -> None:
    save_file(
        {"weight": torch.ones(4, 4), "bias": torch.ones(4), "scale_weight": torch.ones(1)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ValueError, match="1 unknown: scale_weight"):
        load_module(lambda: nn.Linear(4, 4), tmp_path / "x.safetensors")


def test_what_a_file_packs_is_kept_packed(tmp_path: Path) -> None:
    weight, scale = scaled(torch.randn(8, 8), EIGHT)
    save_file({"0.weight": weight, "0.weight_scale": scale, "0.bias": torch.ones(8)}, tmp_path / "x.safetensors")
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 8))
    fill(net, open_weights(tmp_path / "x.safetensors"), packed=True)
    kept = net[0].weight
    assert isinstance(kept, Packed) and kept.is_meta and not isinstance(net[0].bias, Packed)
    assert torch.equal(kept.unpack(), weight.float() * scale)
