"""Identity attention, beside diffusers' processors for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.cond import Cond
from sfumato.models.perturb import perturbed, self_attentions
from sfumato.models.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    sample_size=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(16, 32),
    layers_per_block=1,
    cross_attention_dim=24,
    attention_head_dim=4,
    norm_num_groups=8,
)


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG).eval()


@pytest.fixture(scope="module")
def asked() -> tuple[Tensor, float, Cond]:
    return torch.randn(2, 4, 8, 8), 300.0, Cond(context=torch.randn(2, 5, 24))


@pytest.mark.parametrize("layers", [["mid"], ["down_blocks.1"], ["up_blocks.0", "mid"]])
@torch.no_grad()
def test_the_same_as_diffusers(unet: UNet, asked: tuple[Tensor, float, Cond], layers: list[str]) -> None:
    import diffusers
    from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

    theirs: Any = diffusers.UNet2DConditionModel.from_config(CONFIG.to_dict()).eval()
    theirs.load_state_dict(unet.state_dict())
    for name, module in theirs.named_modules():
        if name.endswith("attn1") and any(layer in name for layer in layers):
            module.processor = PAGIdentitySelfAttnProcessor2_0()
    x, t, cond = asked
    doubled = theirs(torch.cat([x, x]), t, torch.cat([cond.context, cond.context])).sample
    plain, changed = doubled.chunk(2)
    with perturbed(unet, "identity_attention:" + ",".join(layers)):
        ours = unet(x, t, cond)
    differences = [(a - b).abs().max().item() for a, b in ((ours, changed), (unet(x, t, cond), plain))]
    print(f"{layers}: perturbed {differences[0]:.1e}, plain {differences[1]:.1e}")
    assert max(differences) < 1e-5
    assert (plain - changed).abs().max() > 1e-3


def test_only_self_attentions_are_found(unet: UNet) -> None:
    names = {id(module): name for name, module in unet.named_modules()}
    found = [names[id(module)] for module in self_attentions(unet, "mid")]
    assert found == ["mid_block.attentions.0.transformer_blocks.0.attn1"]
    assert len(self_attentions(unet, "attn1")) == 4 and all("attn1" in names[id(m)] for m in self_attentions(unet, "b"))


def test_networks_without_context_have_them_too() -> None:
    raw = {
        "_class_name": "UNet2DModel",
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    unet = UNet(UNetConfig.from_dict(raw))
    assert len(self_attentions(unet, "mid")) == 1
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad(), perturbed(unet, "identity_attention:mid"):
        changed = unet(x, 5.0, Cond())
    assert (unet(x, 5.0, Cond()) - changed).abs().max() > 1e-4


def test_what_is_unknown_is_refused_and_nothing_stays_changed(unet: UNet, asked: tuple[Tensor, float, Cond]) -> None:
    before = unet(*asked)
    for name, message in {
        "shuffle:mid": "unknown perturbation 'shuffle'; known: identity_attention, skip_layers",
        "identity_attention:mid,top": "no self-attention has 'top' in its name; .* in down_blocks.1, mid_block, up_b",
        "identity_attention": "no self-attention has '' in its name",
        "identity_attention:attn2": "no self-attention has 'attn2'",
    }.items():
        with pytest.raises(ValueError, match=message), perturbed(unet, name):
            pass
    with pytest.raises(KeyError), perturbed(unet, "identity_attention:mid"):
        raise KeyError
    assert torch.equal(unet(*asked), before)
