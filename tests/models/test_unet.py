"""The U-Net beside diffusers' UNet2DConditionModel and UNet2DModel."""

from __future__ import annotations

from inspect import signature
from typing import Any

import diffusers
import pytest
import torch

from sfumato.cond import Cond
from sfumato.models.unet import UNet, UNetConfig
from sfumato.presets.xl import SDXL, SDXL_INPAINT, SDXL_REFINER

from .parity import assert_close, count, exchange

TINY: dict[str, Any] = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "sample_size": 16,
}
BUILT_IN: dict[str, Any] = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "use_linear_projection": True,
}
SD2 = {"attention_head_dim": [1, 2, 4], "use_linear_projection": True, "upcast_attention": True}
SHAPES: dict[str, dict[str, Any]] = {
    "sd1": {},
    "sd2": SD2,
    "built-in": BUILT_IN,
    "inpaint": {"in_channels": 9},
    "upscaler": {
        "in_channels": 7,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "only_cross_attention": [True, True, False],
        "num_class_embeds": 20,
        "use_linear_projection": True,
    },
    "classes": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [8, 16, 20],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 1,
    },
    "ldm-text": {"down_block_types": ["CrossAttnDownBlock2D"] * 3, "up_block_types": ["CrossAttnUpBlock2D"] * 3},
    "only-cross": {"only_cross_attention": [True, True, False], "attention_head_dim": 1},
    "only-cross-everywhere": {"only_cross_attention": True},
    "rare": {
        "center_input_sample": True,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "mid_block_scale_factor": 1.5,
        "norm_eps": 1e-4,
        "out_channels": 8,
        "layers_per_block": [1, 2, 1],
        "transformer_layers_per_block": [1, 2, 1],
    },
    "xl": {
        "block_out_channels": [8, 16, 32],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 3],
        "attention_head_dim": [1, 2, 4],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 12 + 6 * 6,
    },
    "xl-refiner": {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": 2,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 12 + 5 * 6,
    },
    "text": {
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 3,
        "resnet_time_scale_shift": "scale_shift",
    },
    "no-text": {
        "down_block_types": ["DownBlock2D"] * 3,
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ["UpBlock2D"] * 3,
    },
}
FACES: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [8, 16, 24],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "sample_size": 16,
}
UNCONDITIONAL: dict[str, dict[str, Any]] = {
    "celebahq": {},
    "one-head": {"attention_head_dim": None, "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0},
    "classes": {"num_class_embeds": 20, "norm_eps": 1e-3, "layers_per_block": 1},
}
LABELS = torch.tensor([[0], [19]])


def pair(**changes: Any) -> tuple[UNet, Any]:
    c = UNetConfig.from_dict({**TINY, **changes})
    ours, theirs = UNet(c), diffusers.UNet2DConditionModel.from_config(c.to_dict())
    exchange(ours, theirs)
    return ours, theirs


def inputs(channels: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, channels, height, width, generator=generator)
    context = torch.randn(2, 7, 12, generator=generator)
    return x, torch.tensor([3.0, 741.5]), context


def told(c: UNetConfig) -> dict[str, torch.Tensor]:
    """A text's vector and numbers, where a network wants them."""
    if c.addition_embed_type != "text_time":
        return {}
    assert c.projection_class_embeddings_input_dim is not None
    count = (c.projection_class_embeddings_input_dim - 12) // 6
    generator = torch.Generator().manual_seed(4)
    return {
        "text_embeds": torch.randn(2, 12, generator=generator),
        "time_ids": torch.tensor([[1024.0, 768, 0, 8, 512, 640], [64, 48, 3, 0, 24, 32]])[:, :count],
    }


@pytest.mark.parametrize("size", [(16, 16), (11, 13)])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_same_as_diffusers(shape: str, size: tuple[int, int]) -> None:
    ours, theirs = pair(**SHAPES[shape])
    x, t, context = inputs(ours.config.in_channels, *size)
    labels = None if ours.config.num_class_embeds is None else LABELS
    added = told(ours.config)
    cond = Cond(context, torch.cat(list(added.values()), dim=1) if added else labels)
    classes = None if labels is None else labels[:, 0]
    expected = theirs(x, t, context, class_labels=classes, added_cond_kwargs=added).sample
    if added:
        assert torch.equal(ours(x, t, context, added_cond_kwargs=added).sample, ours(x, t, cond))
    assert_close(f"{shape} {size}", ours(x, t, cond), expected)
    ours.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    assert_close(f"{shape} {size} channels-last", ours(x, t, cond), expected)


@pytest.mark.parametrize("size", [(16, 16), (8, 12)])
@pytest.mark.parametrize("shape", UNCONDITIONAL)
@torch.no_grad()
def test_same_as_diffusers_without_context(shape: str, size: tuple[int, int]) -> None:
    c = UNetConfig.from_dict({**FACES, **UNCONDITIONAL[shape]})
    ours, theirs = UNet(c), diffusers.UNet2DModel.from_config(c.to_dict())
    exchange(ours, theirs)
    x, t, _ = inputs(3, *size)
    labels = None if c.num_class_embeds is None else LABELS
    expected = theirs(x, t, class_labels=None if labels is None else labels[:, 0]).sample
    assert_close(f"{shape} {size}", ours(x, t, Cond(pooled=labels)), expected)
    ours.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    assert_close(f"{shape} {size} channels-last", ours(x, t, Cond(pooled=labels)), expected)


@torch.no_grad()
def test_same_as_diffusers_in_training_and_for_the_gradients() -> None:
    ours, theirs = pair(**BUILT_IN)
    x, t, context = inputs(4, 16, 16)
    ours.to(memory_format=torch.channels_last)
    with torch.enable_grad():
        out = ours(x.contiguous(memory_format=torch.channels_last), t, Cond(context))
        expected = theirs(x, t, encoder_hidden_states=context).sample
        out.square().mean().backward()
        expected.square().mean().backward()
    assert_close("training output", out, expected)
    theirs_by_name = dict(theirs.named_parameters())
    worst = 0.0
    for name, p in ours.named_parameters():
        q = theirs_by_name[name].grad
        assert p.grad is not None
        worst = max(worst, float((p.grad - q).abs().max() / q.abs().max().clamp(min=1e-6)))
    print(f"largest difference of a gradient {worst:.2e} of its range")
    assert worst < 1e-3


@torch.no_grad()
def test_time_is_a_number_a_scalar_or_one_a_picture() -> None:
    net, _ = pair()
    x, _, context = inputs(4, 8, 8)
    outs = [net(x, t, Cond(context)) for t in (7.0, 7, torch.tensor(7), torch.tensor([7.0]), torch.tensor([7, 7]))]
    assert all(torch.equal(outs[0], out) for out in outs[1:])


@torch.no_grad()
def test_concat_adds_input_channels() -> None:
    net, _ = pair(in_channels=9)
    x, t, context = inputs(9, 8, 8)
    assert torch.equal(net(x[:, :4], t, Cond(context, concat=x[:, 4:])), net(x, t, Cond(context)))


FINE_PLAIN: dict[str, Any] = {
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
}
FULL_SD1: dict[str, Any] = {"cross_attention_dim": 768}
FULL_SD2: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
FULL_UPSCALER: dict[str, Any] = {
    **FINE_PLAIN,
    "in_channels": 7,
    "block_out_channels": [256, 512, 512, 1024],
    "only_cross_attention": [True, True, True, False],
    "attention_head_dim": 8,
    "cross_attention_dim": 1024,
    "num_class_embeds": 1000,
    "use_linear_projection": True,
}
FULL_CIN: dict[str, Any] = {
    **FINE_PLAIN,
    "in_channels": 3,
    "out_channels": 3,
    "sample_size": 64,
    "block_out_channels": [192, 384, 576, 960],
    "attention_head_dim": 1,
    "cross_attention_dim": 512,
}
FULL: dict[str, tuple[dict[str, Any], int]] = {
    "sd15": (FULL_SD1, 859_520_964),
    "sd15-inpaint": ({**FULL_SD1, "in_channels": 9}, 859_535_364),
    "pix2pix": ({**FULL_SD1, "in_channels": 8}, 859_532_484),
    "sd21": ({**FULL_SD2, "upcast_attention": True}, 865_910_724),
    "sd2-inpaint": ({**FULL_SD2, "in_channels": 9}, 865_925_124),
    "sd2-depth": ({**FULL_SD2, "in_channels": 5}, 865_913_604),
    "x4-upscaler": (FULL_UPSCALER, 473_398_020),
    "sdxl": (SDXL.denoiser.to_dict(), 2_567_463_684),
    "sdxl-inpaint": (SDXL_INPAINT.denoiser.to_dict(), 2_567_478_084),
    "sdxl-refiner": (SDXL_REFINER.denoiser.to_dict(), 2_259_526_660),
    "cin256": (FULL_CIN, 400_920_579),
    "ldm-text": ({"cross_attention_dim": 1280, "sample_size": 32}, 872_300_484),
    "celebahq": ({"_class_name": "UNet2DModel", "attention_head_dim": 32, "sample_size": 64}, 274_056_163),
}


@pytest.mark.parametrize("name", FULL)
def test_full_sizes_have_the_published_parameter_counts(name: str) -> None:
    raw, published = FULL[name]
    c = UNetConfig.from_dict(raw)
    with torch.device("meta"):
        ours, theirs = UNet(c), getattr(diffusers, c.to_dict()["_class_name"]).from_config(c.to_dict())
    assert count(ours) == count(theirs) == published
    assert [(n, p.shape) for n, p in sorted(ours.named_parameters())] == [
        (n, p.shape) for n, p in sorted(theirs.named_parameters())
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_config_survives_the_round_trip_through_diffusers(shape: str) -> None:
    c = UNetConfig.from_dict({**TINY, **SHAPES[shape]})
    assert hash(c) is not None
    assert c.to_dict()["_class_name"] == "UNet2DConditionModel"
    assert UNetConfig.from_dict(c.to_dict()) == c
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(c.to_dict())
    assert UNetConfig.from_dict(dict(theirs.config)) == c


@pytest.mark.parametrize("shape", UNCONDITIONAL)
def test_unconditional_config_survives_the_round_trip_through_diffusers(shape: str) -> None:
    c = UNetConfig.from_dict({**FACES, **UNCONDITIONAL[shape]})
    assert c.unconditional
    assert c.to_dict()["_class_name"] == "UNet2DModel"
    assert UNetConfig.from_dict(c.to_dict()) == c
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel.from_config(c.to_dict())
    assert c.to_dict().keys() - signature(diffusers.UNet2DModel).parameters.keys() == {"_class_name"}
    written = {**theirs.config, "_class_name": "UNet2DModel", "num_train_timesteps": 1000}
    assert UNetConfig.from_dict(written) == c


def test_defaults_are_those_of_the_class_that_the_file_names() -> None:
    for name in ("UNet2DModel", "UNet2DConditionModel"):
        with torch.device("meta"):
            theirs = getattr(diffusers, name)()
        assert UNetConfig.from_dict({**theirs.config, "_class_name": name}) == UNetConfig.from_dict(
            {"_class_name": name}
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"]}, "'AttnDownBlock2D'.*allow"),
        ({"down_block_types": ["DownBlock2D"]}, "has 1 entries; give 3"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "allowed: 'UNetMidBlock2DCrossAttn'"),
        ({"attention_head_dim": [1, 2]}, r"attention_head_dim = \(1, 2\) has 2 entries; give one value or 3"),
        ({"act_fn": "gelu"}, "act_fn = 'gelu'.*'silu'"),
        ({"dual_cross_attention": True}, "dual_cross_attention = True is not supported; allowed: False"),
        ({"attention_head_dim": None}, "attention_head_dim = None; give the number of heads"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep' is not supported; allowed: None"),
        ({**FACES, "mid_block_type": "UNetMidBlock2DCrossAttn"}, "allowed: 'UNetMidBlock2D'"),
        ({**FACES, "mid_block_scale_factor": 1.5}, r"mid_block_scale_factor = 1\.5 .*allowed: 1\.0"),
        ({**FACES, "down_block_types": ["CrossAttnDownBlock2D"] * 3}, "'CrossAttnDownBlock2D'.*'AttnDownBlock2D'"),
        ({**FACES, "resnet_time_scale_shift": "scale_shift"}, "= 'scale_shift' .*allowed: 'default'"),
        ({**FACES, "add_attention": False}, "add_attention = False is not supported; allowed: True"),
        ({"addition_embed_type": "image"}, "addition_embed_type = 'image' .*allowed: None, 'text', 'text_time'"),
        ({"addition_embed_type": "text_time"}, r"\(None, None\); addition_embed_type 'text_time' needs both"),
        ({"addition_embed_type": "text"}, "'text' with 64 heads .* cross_attention_dim = 12"),
        ({"resnet_time_scale_shift": "ada_group"}, "allowed: 'default', 'scale_shift'"),
        ({"cross_attention_dim": [1, 2, 3]}, "allowed: one integer"),
        ({"layers_per_blok": 3}, "unknown option layers_per_blok = 3; did you mean 'layers_per_block'"),
    ],
)
def test_config_errors_name_the_value_and_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict({**TINY, **changes})


def test_notes_and_options_that_are_switched_off_are_passed_over() -> None:
    raw = {**TINY, "_diffusers_version": "9.9", "_name_or_path": "x", "option_of_tomorrow": None, "another": False}
    assert UNetConfig.from_dict(raw) == UNetConfig.from_dict(TINY)


def test_a_condition_that_does_not_fit_is_refused() -> None:
    net = UNet(UNetConfig.from_dict(TINY))
    x, t, context = inputs(4, 8, 8)
    with pytest.raises(ValueError, match=r"cond\.context is None.*\(B, K, 12\)"):
        net(x, t, Cond())
    with pytest.raises(ValueError, match="7 wide, this U-Net reads 12"):
        net(x, t, Cond(context[..., :7]))
    with pytest.raises(ValueError, match="input of 3 channels; this U-Net takes 4"):
        net(x[:, :3], t, Cond(context))
    with pytest.raises(ValueError, match="3 attention heads do not divide"):
        UNet(UNetConfig.from_dict({**TINY, "attention_head_dim": 3}))
    with pytest.raises(ValueError, match="attention_head_dim = 5 does not divide 16 channels"):
        UNet(UNetConfig.from_dict({**FACES, "attention_head_dim": 5}))


@torch.no_grad()
def test_a_class_label_that_does_not_fit_is_refused() -> None:
    net = UNet(UNetConfig.from_dict({**TINY, "num_class_embeds": 20}))
    x, t, context = inputs(4, 8, 8)
    with pytest.raises(ValueError, match=r"cond\.pooled is None.*give integer labels \(B, 1\) from 0 to 19"):
        net(x, t, Cond(context))
    with pytest.raises(ValueError, match=r"torch\.float32 of shape \(2, 1\).*give integer labels"):
        net(x, t, Cond(context, LABELS.float()))
    with pytest.raises(ValueError, match=r"of shape \(2,\).*give integer labels \(B, 1\)"):
        net(x, t, Cond(context, LABELS[:, 0]))
    for label in (20, -1):
        with pytest.raises(ValueError, match=f"class label {label} in cond.pooled; use 0 to 19"):
            net(x, t, Cond(context, torch.tensor([[3], [label]])))
    assert net(x, t, Cond(context, LABELS).to(dtype=torch.float32)).shape == x.shape
    plain = UNet(UNetConfig.from_dict(TINY))
    with pytest.raises(ValueError, match=r"cond\.pooled is given, but this U-Net has no class embedding"):
        plain(x, t, Cond(context, LABELS))
