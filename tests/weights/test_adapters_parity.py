"""The same adapter files in diffusers and PEFT: the same answers, merged and live."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.cond import Cond
from sfumato.models.clip import CLIPTextModel
from sfumato.models.unet import UNet
from sfumato.weights.adapters import AdapterHost, read_adapter
from sfumato.weights.folder import load_folder

from .adapters_made import assert_near, factors, kohya, layers, peft, tiny_unet, written

X = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(5))
CONTEXT = torch.randn((2, 5, 32), generator=torch.Generator().manual_seed(6))
IDS = torch.arange(2 * 12).reshape(2, 12) * 7 % 540
TIME = torch.tensor([3.0, 700.0])
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TOWER = ("q_proj", "v_proj", "out_proj", "fc1")


@pytest.fixture
def peer(tiny_folder: Path) -> Any:
    import diffusers

    return diffusers.StableDiffusionPipeline.from_pretrained(str(tiny_folder), local_files_only=True)


@pytest.fixture
def parts(tiny_folder: Path) -> tuple[UNet, CLIPTextModel]:
    loaded = load_folder(tiny_folder)
    assert isinstance(loaded.unet, UNet) and isinstance(loaded.text_encoder, CLIPTextModel)
    return loaded.unet, loaded.text_encoder


def theirs(pipe: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return pipe.unet(X, TIME, CONTEXT).sample, pipe.text_encoder(IDS).last_hidden_state


def ours(unet: UNet, tower: CLIPTextModel) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return unet(X, TIME, Cond(context=CONTEXT)), tower(IDS).last_hidden_state


def assert_same(what: str, mine: tuple[Tensor, Tensor], peers: tuple[Tensor, Tensor]) -> None:
    for part, a, b in zip(("U-Net", "text tower"), mine, peers, strict=True):
        assert_near(f"{what}, {part}", a, b)


def make(folder: Path, style: str, unet: UNet, tower: CLIPTextModel) -> Path:
    """A file on U-Net and text tower; convolutions of all sizes are among the layers."""
    convolutions = ("conv1", "conv_shortcut", "downsamplers.0.conv", "time_emb_proj", "proj_in", "ff.net.2")
    if style == "kohya":
        tensors = kohya("lora_unet_", unet, *ATTENTION, *convolutions, alpha=3.0)
        tensors |= kohya("lora_te_", tower, *TOWER, alpha=1.0)
        return written(folder / "kohya.safetensors", tensors)
    tensors = peft("unet.", unet, *ATTENTION, *convolutions) | peft("text_encoder.", tower, *TOWER, start=300)
    if style == "peft":
        return written(folder / "peft.safetensors", tensors)
    settings = {
        f"{part}.{key}": value
        for part, targets in (("unet", [*ATTENTION, *convolutions]), ("text_encoder", list(TOWER)))
        for key, value in {
            "r": 4,
            "lora_alpha": 6,
            "alpha_pattern": {targets[0]: 10},
            "target_modules": targets,
        }.items()
    }
    return written(folder / "noted.safetensors", tensors, {"lora_adapter_metadata": json.dumps(settings)})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("style", ["kohya", "peft", "noted"])
def test_a_file_does_what_it_does_in_diffusers(
    tmp_path: Path, peer: Any, parts: tuple[UNet, CLIPTextModel], style: str
) -> None:
    path = make(tmp_path, style, *parts)
    before = theirs(peer)
    assert_same("without", ours(*parts), before)
    peer.load_lora_weights(str(path))
    expected = theirs(peer)
    assert all(float((a - b).abs().max()) > 0.05 for a, b in zip(expected, before, strict=True))
    host = AdapterHost(*parts)
    for live in (False, True):
        host.apply([(read_adapter(path), 1.0)], live)
        assert_same(f"{style}, {'live' if live else 'merged'}", ours(*parts), expected)


@pytest.mark.filterwarnings("ignore")
def test_several_at_once_with_strengths(tmp_path: Path, peer: Any, parts: tuple[UNet, CLIPTextModel]) -> None:
    paths = [make(tmp_path, style, *parts) for style in ("kohya", "peft")]
    for path in paths:
        peer.load_lora_weights(str(path), adapter_name=path.stem)
    host, adapters = AdapterHost(*parts), [read_adapter(path) for path in paths]
    for strengths in ((0.7, -0.4), (1.3, 0.2)):
        peer.set_adapters(["kohya", "peft"], list(strengths))
        expected = theirs(peer)
        for live in (False, True):
            host.apply(list(zip(adapters, strengths, strict=True)), live)
            assert_same(f"{strengths}, live {live}", ours(*parts), expected)
    assert host.applied == (("kohya", 1.3), ("peft", 0.2))
    peer.unload_lora_weights()
    host.apply([])
    assert_same("taken off", ours(*parts), theirs(peer))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_dora_is_diffusers(tmp_path: Path, peer: Any, parts: tuple[UNet, CLIPTextModel], strength: float) -> None:
    chosen = (*ATTENTION, "proj_in", "conv1")
    tensors = peft("unet.", parts[0], *chosen)
    for seed, (name, part) in enumerate(layers(parts[0], *chosen)):
        spread = 1 + 0.3 * torch.randn(part.weight.shape[0], generator=torch.Generator().manual_seed(seed))
        lengths = part.weight.detach().flatten(1).norm(dim=1) * spread
        key = f"unet.{name}.lora_magnitude_vector"
        tensors[key] = lengths if part.weight.ndim == 2 else lengths[None, :, None, None]
    path = written(tmp_path / "dora.safetensors", tensors)
    peer.load_lora_weights(str(path), adapter_name="dora")
    peer.set_adapters(["dora"], [strength])
    expected = theirs(peer)
    host = AdapterHost(*parts)
    for live in (False, True):
        host.apply([(read_adapter(path), strength)], live)
        assert_same(f"DoRA at {strength}, live {live}", ours(*parts), expected)


def peft_kinds() -> Iterator[tuple[str, Any]]:
    """Configurations of PEFT's own layers, on linear layers and on convolutions, with random numbers in them."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    names = ["to_q", "to_out.0", "conv1", "proj_in", "conv2"]
    lora = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": names}
    other = {"r": 4, "alpha": 6, "init_weights": False, "target_modules": names}
    yield "LoRA", LoraConfig(**lora, rank_pattern={"to_q": 2}, alpha_pattern={"conv1": 5})
    yield "rsLoRA", LoraConfig(**lora, use_rslora=True)
    yield "LoRA with biases", LoraConfig(**lora, lora_bias=True)
    yield "LoHa", LoHaConfig(**other)
    yield "LoHa, Tucker", LoHaConfig(**other, use_effective_conv2d=True)
    yield "LoKr", LoKrConfig(**other)
    yield "LoKr, both in factors", LoKrConfig(**{**other, "r": 1}, decompose_both=True)
    yield "LoKr, Tucker", LoKrConfig(**{**other, "r": 2}, use_effective_conv2d=True, decompose_factor=4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "config"), list(peft_kinds()), ids=[kind for kind, _ in peft_kinds()])
def test_what_peft_saves_is_what_peft_does(tmp_path: Path, kind: str, config: Any) -> None:
    from peft import get_peft_model

    class Wrapped(nn.Module):
        """PEFT takes a module that is called with tensors."""

        def __init__(self, net: UNet) -> None:
            super().__init__()
            self.net = net

        def forward(self) -> Tensor:
            return self.net(X, TIME, Cond(context=CONTEXT[..., :24]))

    torch.manual_seed(3)
    net = tiny_unet()
    model = get_peft_model(net, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(mark in name for mark in ("hada_", "lokr_", "lora_")):
                p.copy_(torch.randn_like(p) * (0.4 if p.ndim > 1 else 0.05))
        model.eval()
        expected = Wrapped(model.base_model.model)()
        model.save_pretrained(tmp_path)
        plain = tiny_unet()
        adapter = read_adapter(tmp_path)
        host = AdapterHost(plain)
        without = Wrapped(plain)()
        assert float((expected - without).abs().max()) > 0.05
        for live in (False, True):
            host.apply([(adapter, 1.0)], live)
            assert_near(f"{kind}, live {live}", Wrapped(plain)(), expected)


def test_a_layer_alone_in_float64(tmp_path: Path) -> None:
    """What parity with float32 references cannot tell: the formula to the last digits."""
    net = tiny_unet().double()
    name, part = next(layers(net, "proj_in"))
    down, up = (t.double() for t in factors(part, 4, 1))
    path = written(tmp_path / "a.safetensors", {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up})
    expected = part.weight.detach() + (up.flatten(1) @ down.flatten(1)).reshape(part.weight.shape)
    AdapterHost(net).apply([(read_adapter(path), 1.0)])
    assert_near("float64", part.weight, expected, 1e-15)
