"""Adapters of Stable Diffusion XL and 3: the same files in diffusers, and original names that join several layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.models.mmdit import MMDiT
from sfumato.weights import compvis, sd3
from sfumato.weights.adapters import AdapterHost, read_adapter
from sfumato.weights.folder import save_folder
from sfumato.weights.parts import Components

from ..tiny_sd3 import tiny_sd3
from ..tiny_xl import tiny_xl
from .adapters_made import assert_near, assert_untouched, factors, kohya, layers, peft, snapshot, written

SEED = torch.Generator().manual_seed(5)
IDS = torch.arange(2 * 12).reshape(2, 12) * 7 % 540
TOWER = ("q_proj", "v_proj", "out_proj", "fc1")
Answers = dict[str, Tensor]
Inputs = dict[str, Tensor]


def towers(parts: Any) -> list[Any]:
    found = (getattr(parts, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
    return [tower for tower in found if tower is not None]


def texts(parts: Any) -> Answers:
    return {f"tower {i}": tower(IDS % 160).last_hidden_state for i, tower in enumerate(towers(parts))}


def xl_inputs() -> Inputs:
    shapes = {"x": (2, 4, 8, 8), "context": (2, 5, 40), "text": (2, 24)}
    drawn = {name: torch.randn(shape, generator=SEED) for name, shape in shapes.items()}
    return drawn | {"ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2), "t": torch.tensor([3.0, 700.0])}


def sd3_inputs() -> Inputs:
    shapes = {"x": (2, 16, 8, 8), "context": (2, 5, 48), "pooled": (2, 40)}
    return {name: torch.randn(shape, generator=SEED) for name, shape in shapes.items()} | {
        "t": torch.tensor([3.0, 700.0])
    }


@torch.no_grad()
def of_xl(unet: Any, i: Inputs) -> Tensor:
    given = {"text_embeds": i["text"], "time_ids": i["ids"]}
    return unet(i["x"], i["t"], encoder_hidden_states=i["context"], added_cond_kwargs=given).sample


@torch.no_grad()
def of_sd3(transformer: Any, i: Inputs) -> Tensor:
    return transformer(
        i["x"], timestep=i["t"], encoder_hidden_states=i["context"], pooled_projections=i["pooled"]
    ).sample


@torch.no_grad()
def compare(parts: Components, peer: Any, path: Path, denoiser: str, answer: Callable[[Any], Tensor]) -> None:
    """One file, in diffusers and here merged and live; it says something else than no file; and comes off again."""

    def answers(model: Any) -> Answers:
        return {denoiser: answer(getattr(model, denoiser)), **texts(model)}

    before = answers(peer)
    for name, mine in answers(parts).items():
        assert_near(f"without, {name}", mine, before[name])
    peer.load_lora_weights(str(path))
    expected = answers(peer)
    assert all(float((expected[name] - before[name]).abs().max()) > 0.01 for name in expected)
    untouched = snapshot(parts.denoiser, *towers(parts))
    host = AdapterHost(parts.denoiser, *towers(parts))
    for live in (False, True):
        host.apply([(read_adapter(path), 1.0)], live)
        for name, mine in answers(parts).items():
            assert_near(f"{path.stem}, {'live' if live else 'merged'}, {name}", mine, expected[name])
    host.apply([])
    assert_untouched(untouched, parts.denoiser, *towers(parts))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("style", ["kohya", "peft"])
def test_a_file_for_xl_does_what_it_does_in_diffusers(style: str, tmp_path: Path) -> None:
    import diffusers

    parts = tiny_xl()
    save_folder(parts, tmp_path / "model")
    peer = diffusers.StableDiffusionXLPipeline.from_pretrained(str(tmp_path / "model"), local_files_only=True)
    unet = parts.denoiser
    ends = ("to_q", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.2", "time_emb_proj")
    one, two = towers(parts)
    if style == "kohya":
        tensors = kohya("lora_unet_", unet, *ends, alpha=3.0) | kohya("lora_te1_", one, *TOWER, alpha=1.0)
        tensors |= kohya("lora_te2_", two, *TOWER, alpha=6.0)
    else:
        tensors = peft("unet.", unet, *ends) | peft("text_encoder.", one, *TOWER, start=300)
        tensors |= peft("text_encoder_2.", two, *TOWER, start=500)
    inputs = xl_inputs()
    compare(parts, peer, written(tmp_path / f"{style}.safetensors", tensors), "unet", lambda net: of_xl(net, inputs))


@pytest.mark.filterwarnings("ignore")
def test_a_file_for_sd3_does_what_it_does_in_diffusers(tmp_path: Path) -> None:
    import diffusers

    parts = tiny_sd3("sd3.5-medium", t5=False)
    save_folder(parts, tmp_path / "model")
    peer = diffusers.StableDiffusion3Pipeline.from_pretrained(
        str(tmp_path / "model"), local_files_only=True, text_encoder_3=None, tokenizer_3=None
    )
    ends = ("to_q", "to_v", "add_k_proj", "to_out.0", "to_add_out", "ff.net.2", "ff_context.net.0.proj", "norm1.linear")
    one, two = towers(parts)
    tensors = peft("transformer.", parts.denoiser, *ends) | peft("text_encoder.", one, *TOWER, start=300)
    tensors |= peft("text_encoder_2.", two, *TOWER, start=500)
    inputs = sd3_inputs()
    path = written(tmp_path / "peft.safetensors", tensors)
    compare(parts, peer, path, "transformer", lambda net: of_sd3(net, inputs))


@pytest.mark.parametrize("kind", ["LoRA", "LoKr", "full"])
def test_original_names_of_sd3_that_join_layers(kind: str, tmp_path: Path) -> None:
    """What is added to the file's own matrices, q, k and v in one, is added to ours, with halves exchanged."""
    net = tiny_sd3("sd3.5-medium").denoiser
    assert isinstance(net, MMDiT)
    table = sd3.mmdit_map(net.config)
    base = {name: t.clone() for name, t in net.state_dict().items()}
    wanted, tensors = dict(table.save(base)), {}
    chosen = [
        "joint_blocks.0.x_block.attn.qkv",
        "joint_blocks.1.x_block.attn2.qkv",
        "joint_blocks.1.context_block.attn.qkv",
        "joint_blocks.0.x_block.attn.proj",
        "joint_blocks.2.x_block.mlp.fc1",
        "joint_blocks.3.context_block.adaLN_modulation.1",
        "final_layer.adaLN_modulation.1",
    ]
    for seed, name in enumerate(chosen):
        weight = wanted[f"{name}.weight"]
        rows, columns = weight.shape
        raw = "lora_unet_" + name.replace(".", "_")
        if kind == "LoRA":
            down, up = factors(nn.Linear(columns, rows), 4, seed)
            tensors |= {f"{raw}.lora_down.weight": down, f"{raw}.lora_up.weight": up, f"{raw}.alpha": torch.tensor(2.0)}
            difference = up @ down / 2
        elif kind == "LoKr":
            left, right = torch.randn(4, 2, generator=SEED), torch.randn(rows // 4, columns // 2, generator=SEED)
            tensors |= {f"{raw}.lokr_w1": left, f"{raw}.lokr_w2": right}
            difference = torch.kron(left, right)
        else:
            difference = torch.randn(rows, columns, generator=SEED)
            tensors[f"{raw}.diff"] = difference
        wanted[f"{name}.weight"] = weight + difference
    host = AdapterHost(net)
    host.apply([(read_adapter(written(tmp_path / "a.safetensors", tensors)), 1.0)])
    expected = table.load(wanted)
    for name, mine in net.state_dict().items():
        assert float((mine - expected[name]).abs().max()) < 1e-5, name
    host.apply([])
    assert all(torch.equal(t, base[name]) for name, t in net.state_dict().items())


def test_original_names_of_xl(tmp_path: Path) -> None:
    """CompVis' names, the added vector's layers among them."""
    unet = tiny_xl().unet
    names = compvis.unet_modules(unet.config)
    assert names["add_embedding.linear_1"] == "label_emb.0.0"
    weights = dict(layers(unet, "to_k", "linear_1"))
    tensors = {}
    for seed, (name, part) in enumerate(weights.items()):
        down, up = factors(part, 2, seed)
        raw = "lora_unet_" + names[name].replace(".", "_")
        tensors |= {f"{raw}.lora_down.weight": down, f"{raw}.lora_up.weight": up}
    before = {name: part.weight.detach().clone() for name, part in weights.items()}
    AdapterHost(unet).apply([(read_adapter(written(tmp_path / "a.safetensors", tensors)), 1.0)])
    for seed, (name, part) in enumerate(weights.items()):
        down, up = factors(part, 2, seed)
        assert float((part.weight.detach() - before[name] - up @ down).abs().max()) < 1e-5


def test_adapters_of_other_families_are_refused(tmp_path: Path) -> None:
    parts = tiny_xl()
    host = AdapterHost(parts.denoiser, *towers(parts))
    path = written(tmp_path / "a.safetensors", kohya("lora_unet_", tiny_sd3().denoiser, "add_q_proj"))
    with pytest.raises(ValueError, match="0 of 4 modules fit this model"):
        host.apply([(read_adapter(path), 1.0)])
    odd = {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": torch.zeros(95, 2)}
    odd["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"] = torch.zeros(2, 32)
    with pytest.raises(ValueError, match="has 95 rows, which are not 3 modules' of the same size"):
        AdapterHost(tiny_sd3().denoiser).apply([(read_adapter(written(tmp_path / "b.safetensors", odd)), 1.0)])
