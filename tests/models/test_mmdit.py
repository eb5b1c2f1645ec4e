"""The transformer of Stable Diffusion 3 beside diffusers' SD3Transformer2DModel."""

from __future__ import annotations

import re
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sfumato.cond import Cond
from sfumato.models.mmdit import MMDiT, MMDiTConfig
from sfumato.models.perturb import perturbed
from sfumato.models.unet import UNet, UNetConfig

from .parity import assert_close, count, exchange

TINY: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 20,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 12,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "sd3": {},
    "sd3.5-medium": {"dual_attention_layers": [0, 1], "qk_norm": "rms_norm"},
    "sd3.5-large": {"qk_norm": "rms_norm"},
    "rare": {"patch_size": 4, "in_channels": 5, "dual_attention_layers": [2], "num_attention_heads": 2},
}
# Published configurations: transformer/config.json of the three models.
FULL: dict[str, tuple[dict[str, Any], int]] = {
    "sd3-medium": (
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        2_028_328_000,
    ),
    "sd3.5-medium": (
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)),
            "qk_norm": "rms_norm",
        },
        2_243_171_520,
    ),
    "sd3.5-large": (
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        8_056_627_520,
    ),
}


def pair(**changes: Any) -> tuple[MMDiT, Any]:
    c = MMDiTConfig.from_dict({**TINY, **changes})
    ours, theirs = MMDiT(c), diffusers.SD3Transformer2DModel.from_config(c.to_dict())
    assert_close("the table of positions", ours.pos_embed.pos_embed, theirs.pos_embed.pos_embed, 1e-6)
    exchange(ours, theirs)
    return ours, theirs


def inputs(config: MMDiTConfig, height: int = 16, width: int = 16) -> tuple[Tensor, Tensor, Cond]:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, config.in_channels, height, width, generator=g)
    context = torch.randn(2, 7, config.joint_attention_dim, generator=g)
    pooled = torch.randn(2, config.pooled_projection_dim, generator=g)
    return x, torch.tensor([1000.0, 13.5]), Cond(context, pooled)


def theirs_of(theirs: Any, x: Tensor, t: Tensor, cond: Cond, **others: Any) -> Tensor:
    return theirs(x, timestep=t, encoder_hidden_states=cond.context, pooled_projections=cond.pooled, **others).sample  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", [(16, 16), (8, 20)])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_same_as_diffusers(variant: str, size: tuple[int, int]) -> None:
    ours, theirs = pair(**VARIANTS[variant])
    x, t, cond = inputs(ours.config, *size)
    out = ours(x, t, cond)
    assert_close(f"{variant} {size}", out, theirs_of(theirs, x, t, cond))
    assert_close("called as in notebooks", theirs_of(ours, x, t, cond), out, 0.0)


@pytest.mark.parametrize("layers", [[1], [0, 2]])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_skipped_layers_are_diffusers(variant: str, layers: list[int]) -> None:
    ours, theirs = pair(**VARIANTS[variant])
    x, t, cond = inputs(ours.config)
    before = ours(x, t, cond)
    with perturbed(ours, "skip_layers:" + ",".join(map(str, layers))):
        out = ours(x, t, cond)
    assert_close(f"{variant} without {layers}", out, theirs_of(theirs, x, t, cond, skip_layers=layers))
    assert torch.equal(ours(x, t, cond), before) and not torch.allclose(out, before, atol=1e-3)


@torch.no_grad()
def test_identity_attention_is_diffusers() -> None:
    from diffusers.models.attention_processor import PAGJointAttnProcessor2_0

    ours, theirs = pair()
    theirs.transformer_blocks[1].attn.processor = PAGJointAttnProcessor2_0()
    x, t, cond = inputs(ours.config)
    doubled = [torch.cat([part, part]) for part in (x, t, cond.context, cond.pooled)]
    plain, changed = theirs_of(theirs, doubled[0], doubled[1], Cond(doubled[2], doubled[3])).chunk(2)
    with perturbed(ours, "identity_attention:blocks.1"):
        assert_close("perturbed", ours(x, t, cond), changed)
    assert_close("as it is", ours(x, t, cond), plain)
    assert not torch.allclose(plain, changed, atol=1e-3)


def test_gradients_are_diffusers() -> None:
    ours, theirs = pair(**VARIANTS["sd3.5-medium"])
    x, t, cond = inputs(ours.config)
    ours(x, t, cond).square().mean().backward()
    theirs_of(theirs, x, t, cond).square().mean().backward()
    others, worst = dict(theirs.named_parameters()), 0.0
    for name, p in ours.named_parameters():
        q = others[name].grad
        assert p.grad is not None and q is not None
        worst = max(worst, float((p.grad - q).abs().max() / q.abs().max().clamp(min=1e-6)))
    print(f"largest difference of a gradient {worst:.2e} of its range")
    assert worst < 1e-3


@pytest.mark.parametrize("name", FULL)
def test_full_sizes_have_the_published_parameter_counts(name: str) -> None:
    raw, published = FULL[name]
    c = MMDiTConfig.from_dict(raw)
    with torch.device("meta"):
        ours, theirs = MMDiT(c), diffusers.SD3Transformer2DModel.from_config(c.to_dict())
    assert count(ours) == count(theirs) == published
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in theirs.state_dict().items()}


@torch.no_grad()
def test_a_new_one_answers_nothing_and_every_part_can_learn() -> None:
    torch.manual_seed(0)
    net = MMDiT(MMDiTConfig.from_dict({**TINY, **VARIANTS["sd3.5-medium"]}))
    x, t, cond = inputs(net.config)
    assert not net(x, t, cond).any()
    for step in range(4):
        with torch.enable_grad():
            loss = (net(x, t, cond) - x).square().mean()
            loss.backward()
        silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
        for p in net.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
                p.grad = None
        print(f"step {step}: loss {loss.item():.3f}, {len(silent)} silent")
    # The softmax does not hear what moves all keys alike, and in the last block the text asks for nothing.
    deaf = re.compile(r"k(_proj)?\.bias$|blocks\.2\.attn\.(add_q_proj|norm_added_q)")
    assert [name for name in silent if not deaf.search(name)] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_survives_the_round_trip_through_diffusers(variant: str) -> None:
    c = MMDiTConfig.from_dict({**TINY, **VARIANTS[variant]})
    assert hash(c) is not None and c.to_dict()["_class_name"] == "SD3Transformer2DModel"
    assert MMDiTConfig.from_dict(c.to_dict()) == c
    with torch.device("meta"):
        theirs, default = (diffusers.SD3Transformer2DModel.from_config(c.to_dict()), diffusers.SD3Transformer2DModel())
    assert MMDiTConfig.from_dict(dict(theirs.config)) == c
    assert MMDiTConfig.from_dict(dict(default.config)) == MMDiTConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm = 'layer_norm' is not supported; allowed: None, 'rms_norm'"),
        ({"caption_projection_dim": 24}, "caption_projection_dim = 24 is not supported; allowed: 16"),
        ({"dual_attention_layers": [3]}, "dual_attention_layers entry 3; there are blocks 0 to 2"),
        ({"num_layer": 3}, "unknown option num_layer = 3; did you mean 'num_layers'"),
        ({"attention_head_dim": 9, "caption_projection_dim": 18}, "18 channels; positions need a multiple of 4"),
    ],
)
def test_config_errors_name_the_value_and_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MMDiTConfig.from_dict({**TINY, **changes})


@torch.no_grad()
def test_what_does_not_fit_is_refused() -> None:
    net = MMDiT(MMDiTConfig.from_dict(TINY))
    x, t, cond = inputs(net.config)
    wrong: dict[str, tuple[Tensor, Cond]] = {
        "cond.context is None, this transformer reads 20; use the text encoders": (x, Cond(pooled=cond.pooled)),
        "cond.pooled is 20 wide, this transformer reads 12": (x, Cond(cond.context, cond.context)),
        "input of 8 channels; this transformer takes 4": (x, Cond(cond.context, cond.pooled, x)),
        "15x16 is not made of patches of 2x2; choose sides that 2 divides": (x[:, :, 1:], cond),
        "26x16; this transformer has positions for at most 24 a side": (torch.cat([x, x[:, :, :10]], 2), cond),
    }
    for message, (given, told) in wrong.items():
        with pytest.raises(ValueError, match=message):
            net(given, t, told)
    with pytest.raises(ValueError, match=r"skip_layer = .* is not supported; leave it out"):
        net(x, timestep=t, skip_layer=[1])
    with (
        pytest.raises(ValueError, match="no block '3' to skip; this network has 0 to 2"),
        perturbed(net, "skip_layers:3"),
    ):
        pass
    unet = UNet(UNetConfig(block_out_channels=(32,) * 4, norm_num_groups=8))
    with pytest.raises(ValueError, match="is no transformer and has none"), perturbed(unet, "skip_layers:1"):
        pass
