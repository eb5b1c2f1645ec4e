"""The U-Net of latent diffusion, Stable Diffusion 1.x, 2.x and XL (Rombach et al. 2022; Podell et al. 2023).

B batch, C channels, H W height and width of the (latent) picture, K tokens and D width of the context,
E width of the time embedding, x the noisy picture, t the network's time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.cond import Cond
from sfumato.models.config import check_choice, per_level, read_config, write_config
from sfumato.models.layers import (
    Attention,
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    ScaleShiftResnetBlock2D,
    TextTimeEmbedding,
    TimestepEmbedding,
    Transformer2DModel,
    Upsample2D,
    sinusoidal,
)
from sfumato.models.network import Network, NetworkOutput

# Options of diffusers' UNet2DConditionModel and UNet2DModel for which our models need one value only.
FIXED: dict[str, tuple[Any, ...]] = {
    "add_attention": (True,),
    "attention_type": ("default",),
    "attn_norm_num_groups": (None,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_type": ("conv",),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "num_attention_heads": (None,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "upsample_type": ("conv",),
}
# Block types by class: those of UNet2DConditionModel, those of UNet2DModel.
DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D"), ("DownBlock2D", "AttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D"), ("UpBlock2D", "AttnUpBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"), ("UNetMidBlock2D",)
# Where the defaults of UNet2DModel are others, and the options that it does not have.
UNCONDITIONAL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
    "block_out_channels": (224, 448, 672, 896),
}
CONTEXT_OPTIONS = (
    "addition_embed_type",
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "cross_attention_dim",
    "only_cross_attention",
    "transformer_layers_per_block",
    "upcast_attention",
    "use_linear_projection",
)
PER_LEVEL = ("layers_per_block", "only_cross_attention", "transformer_layers_per_block", "attention_head_dim")


@dataclass(frozen=True)
class UNetConfig:
    """The entries of `unet/config.json`; defaults are those of diffusers' UNet2DConditionModel.

    Levels go from the finest to the coarsest. `attention_head_dim` is the *number* of heads, one value or one
    a level: the name is an old slip that all published configs carry. `layers_per_block`,
    `only_cross_attention` and `transformer_layers_per_block` also take one value or one a level.
    `sample_size` is the side of the latents the model was trained on; the network takes any.
    `num_class_embeds` is the number of classes (noise levels, for an upscaler) that `cond.pooled` may name.
    `addition_embed_type` "text_time": `cond.pooled` is a text's vector and then numbers (sizes, a score), each of which
    becomes `addition_time_embed_dim` wide; `projection_class_embeddings_input_dim` is what they are wide together.
    "text": the context itself, pooled with `addition_embed_type_num_heads` heads, joins the time.
    `resnet_time_scale_shift`: what the time tells a residual block, a shift ("default") or "scale_shift".
    `unconditional` stands for diffusers' class UNet2DModel: attention without context, also in the middle, and
    `attention_head_dim` is what its name says, channels a head; None makes one head.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] | None = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"
    num_class_embeds: int | None = None
    addition_embed_type: str | None = None
    addition_embed_type_num_heads: int = 64
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    unconditional: bool = False

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        kind = int(self.unconditional)
        for name, allowed in (("down_block_types", DOWN_BLOCKS[kind]), ("up_block_types", UP_BLOCKS[kind])):
            blocks = getattr(self, name)
            if len(blocks) != levels:
                raise ValueError(
                    f"UNetConfig: {name} = {blocks!r} has {len(blocks)} entries; "
                    f"give {levels}, as block_out_channels does"
                )
            for block in blocks:
                check_choice(f"UNetConfig: {name} entry", block, allowed)
        check_choice("UNetConfig: mid_block_type", self.mid_block_type, MID_BLOCKS[kind])
        if self.unconditional:
            check_choice("UNetConfig: mid_block_scale_factor", self.mid_block_scale_factor, (1.0,))
        check_choice("UNetConfig: act_fn", self.act_fn, ("silu", "swish"))
        check_choice("UNetConfig: downsample_padding", self.downsample_padding, (0, 1))
        if not isinstance(self.cross_attention_dim, int):
            raise ValueError(
                f"UNetConfig: cross_attention_dim = {self.cross_attention_dim!r} is not supported; allowed: one integer"
            )
        check_choice("UNetConfig: addition_embed_type", self.addition_embed_type, (None, "text", "text_time"))
        shifts = ("default",) if self.unconditional else ("default", "scale_shift")
        check_choice("UNetConfig: resnet_time_scale_shift", self.resnet_time_scale_shift, shifts)
        lifts = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if self.addition_embed_type == "text_time" and not all(lifts):
            raise ValueError(
                f"UNetConfig: addition_time_embed_dim and projection_class_embeddings_input_dim = {lifts}; "
                "addition_embed_type 'text_time' needs both"
            )
        heads = self.addition_embed_type_num_heads
        if self.addition_embed_type == "text" and (not self.has_cross_attention or self.cross_attention_dim % heads):
            raise ValueError(
                f"UNetConfig: addition_embed_type 'text' with {heads} heads needs cross-attention to a context whose "
                f"width they divide; cross_attention_dim = {self.cross_attention_dim}"
            )
        for name in PER_LEVEL:
            self.levels(name)
        if not self.unconditional and None in self.levels("attention_head_dim"):
            raise ValueError(f"UNetConfig: attention_head_dim = {self.attention_head_dim!r}; give the number of heads")

    def levels(self, name: str) -> tuple[Any, ...]:
        """The option `name` as one value a level, finest first."""
        return per_level(f"UNetConfig: {name}", getattr(self, name), len(self.block_out_channels))

    @property
    def has_cross_attention(self) -> bool:
        """Whether the network reads `cond.context`."""
        blocks = (*self.down_block_types, self.mid_block_type, *self.up_block_types)
        return any("CrossAttn" in block for block in blocks)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> UNetConfig:
        """Read the entries of a `config.json`; ValueError on an option that is not implemented.

        The note `_class_name` decides between UNet2DConditionModel (also without the note) and UNet2DModel.
        """
        if raw.get("_class_name") != "UNet2DModel":
            return read_config(cls, raw, FIXED)
        rest = {k: v for k, v in raw.items() if k != "num_train_timesteps"}  # only a learned time embedding reads it
        return read_config(cls, {**UNCONDITIONAL, "unconditional": True, **rest}, FIXED)

    def to_dict(self) -> dict[str, Any]:
        """The entries of a `config.json` that diffusers opens as well."""
        written = write_config(self, "UNet2DModel" if self.unconditional else "UNet2DConditionModel")
        absent = ("unconditional", *CONTEXT_OPTIONS) if self.unconditional else ("unconditional",)
        return {name: value for name, value in written.items() if name not in absent}


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the level has it."""

    def __init__(self, c: UNetConfig, level: int, ins: list[int], attend: bool) -> None:
        super().__init__()
        width = c.block_out_channels[level]
        self.resnets = nn.ModuleList([resnet(c, channels, width) for channels in ins])
        self.attentions = nn.ModuleList([attention(c, level) for _ in ins] if attend else [])

    def layer(self, i: int, x: Tensor, temb: Tensor, context: Tensor | None) -> Tensor:
        """Residual block i and its attention: (B, C_in, H, W) -> (B, C_out, H, W)."""
        x = self.resnets[i](x, temb)
        return self.attentions[i](x, context) if len(self.attentions) else x


class DownBlock(Level):
    """DownBlock2D, CrossAttnDownBlock2D, AttnDownBlock2D: one level on the way down, halving but at the last level."""

    def __init__(self, c: UNetConfig, level: int) -> None:
        width = c.block_out_channels[level]
        before = c.block_out_channels[max(level - 1, 0)]
        layers = c.levels("layers_per_block")[level]
        attend = "Attn" in c.down_block_types[level]
        super().__init__(c, level, [before] + [width] * (layers - 1), attend)
        last = level == len(c.block_out_channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample2D(width, c.downsample_padding)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Returns the result and, for the way up, the output of every layer."""
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, temb, context)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)  # (B, C, H / 2, W / 2)
            skips.append(x)
        return x, skips


class MidBlock(Level):
    """Residual block, attention, residual block; one residual block for UNetMidBlock2D of a network with context."""

    def __init__(self, c: UNetConfig) -> None:
        nn.Module.__init__(self)
        width = c.block_out_channels[-1]
        last = len(c.block_out_channels) - 1
        attend = c.mid_block_type == "UNetMidBlock2DCrossAttn" or c.unconditional
        self.attentions = nn.ModuleList([attention(c, last, mid=True)] if attend else [])
        self.resnets = nn.ModuleList(
            [resnet(c, width, width, c.mid_block_scale_factor) for _ in range(2 if attend else 1)]
        )

    def forward(self, x: Tensor, temb: Tensor, context: Tensor | None) -> Tensor:
        x = self.resnets[0](x, temb)
        for attention, block in zip(self.attentions, self.resnets[1:], strict=True):
            x = block(attention(x, context), temb)
        return x


class UpBlock(Level):
    """UpBlock2D, CrossAttnUpBlock2D, AttnUpBlock2D: one level on the way up, then a doubling but at the finest level.

    Each layer reads the running picture beside one of the pictures that the way down left behind.
    """

    def __init__(self, c: UNetConfig, level: int) -> None:
        widths = c.block_out_channels
        width, last = widths[level], len(widths) - 1
        layers = c.levels("layers_per_block")[level] + 1
        running = [widths[min(level + 1, last)]] + [width] * (layers - 1)
        skips = [width] * (layers - 1) + [widths[max(level - 1, 0)]]
        attend = "Attn" in c.up_block_types[last - level]
        super().__init__(c, level, [r + s for r, s in zip(running, skips, strict=True)], attend)
        self.upsamplers = nn.ModuleList([Upsample2D(width)] if level > 0 else [])

    def forward(self, x: Tensor, skips: list[Tensor], temb: Tensor, context: Tensor | None) -> Tensor:
        """Takes its pictures from the end of `skips`; odd sizes are met by upsampling to the next one's."""
        for i in range(len(self.resnets)):
            x = torch.cat([x, skips.pop()], dim=1)  # (B, C + C_skip, H, W)
            x = self.layer(i, x, temb, context)  # (B, C_out, H, W)
        for upsampler in self.upsamplers:
            x = upsampler(x, size=(skips[-1].shape[2], skips[-1].shape[3]))  # (B, C_out, 2 H, 2 W)
        return x


class UNet(Network):
    """A noisy picture, its time and the condition to a prediction; parameters named as in `unet/`."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = c = config
        widths = c.block_out_channels
        levels = range(len(widths))
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])
        self.class_embedding = None if c.num_class_embeds is None else nn.Embedding(c.num_class_embeds, 4 * widths[0])
        self.add_embedding = addition(c)
        self.down_blocks = nn.ModuleList([DownBlock(c, level) for level in levels])
        self.mid_block = MidBlock(c)
        self.up_blocks = nn.ModuleList([UpBlock(c, level) for level in reversed(levels)])
        self.conv_norm_out = GroupNorm(c.norm_num_groups, widths[0], c.norm_eps, silu=True)
        self.conv_out = nn.Conv2d(widths[0], c.out_channels, 3, padding=1)

    def __call__(  # beside the package's own net(x, t, cond)
        self,
        sample: Tensor,
        timestep: Tensor | float,
        cond: Cond | Tensor | None = None,
        *own: Any,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Evaluate the network: `forward` where the third argument is a Cond, else in the form that notebooks use.

        There, encoder_hidden_states (B, K, D) may be the third argument, class_labels are (B,), added_cond_kwargs has
        text_embeds (B, P) and time_ids (B, n), sample has all input channels, and the answer is an object with
        `.sample`, or a tuple with return_dict=False.
        Raises ValueError for an option of diffusers' network that this one has not.
        """
        given = {name: value for name, value in others.items() if value is not None and value != {}}
        if given:
            name, value = next(iter(given.items()))
            raise ValueError(f"UNet: {name} = {value!r} is not supported; leave it out")
        if isinstance(cond, Cond):
            return super().__call__(sample, timestep, cond, *own)
        context = encoder_hidden_states if cond is None else cond
        pooled = None if class_labels is None else class_labels.reshape(-1, 1).expand(sample.shape[0], 1)
        if added_cond_kwargs:
            names = ("text_embeds", "time_ids")
            check_choice("UNet: the entries of added_cond_kwargs", tuple(sorted(added_cond_kwargs)), (names,))
            pooled = torch.cat([added_cond_kwargs[name].float() for name in names], dim=1)
        out = super().__call__(sample, timestep, Cond(context=context, pooled=pooled))
        return NetworkOutput(out) if return_dict else (out,)

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond) -> Tensor:
        """Evaluate the network.

        x: (B, C, H, W) with the model's latent channels; `cond.concat` adds further input channels.
        t: time as a number or tensor, one for all or one a picture (B,).
        cond: context (B, K, D) when the config has cross-attention; pooled (B, 1) with integer labels when it has
        num_class_embeds, (B, P + n) with a text's vector and n numbers when its addition_embed_type is text_time.
        Returns (B, C_out, H, W). Raises ValueError when the condition does not fit the config.
        """
        x, temb, context = self.entered(x, t, cond)
        skips = [x]
        for down in self.down_blocks:
            x, left = down(x, temb, context)
            skips += left
        x = self.mid_block(x, temb, context)  # (B, C_last, H / f, W / f)
        for up in self.up_blocks:
            x = up(x, skips, temb, context)
        return self.conv_out(self.conv_norm_out(x))  # (B, C_out, H, W)

    def entered(self, x: Tensor, t: Tensor | float, cond: Cond) -> tuple[Tensor, Tensor, Tensor | None]:
        """A network's input as its levels take it: the picture's first features, the time's embedding, the context."""
        c = self.config
        context = self._context(cond)
        temb = self._time(x, t)  # (B, E)
        if isinstance(self.add_embedding, TextTimeEmbedding):
            temb = temb + self.add_embedding(context)
        elif self.add_embedding is not None:
            temb = temb + self.add_embedding(self._text_time(cond).to(x.dtype))
        elif self.class_embedding is not None or cond.pooled is not None:
            temb = temb + self._class(cond)
        x = x if cond.concat is None else torch.cat([x, cond.concat], dim=1)  # (B, C_in, H, W)
        if x.shape[1] != c.in_channels:
            raise ValueError(f"input of {x.shape[1]} channels; this U-Net takes {c.in_channels}")
        if c.center_input_sample:
            x = 2 * x - 1
        return self.conv_in(x), temb, context  # (B, C_0, H, W), (B, E), (B, K, D)

    def _time(self, x: Tensor, t: Tensor | float) -> Tensor:
        c = self.config
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(x.shape[0])  # (B,)
        features = sinusoidal(t, c.block_out_channels[0], c.flip_sin_to_cos, c.freq_shift)  # (B, C_0)
        return self.time_embedding(features.to(x.dtype))  # (B, E)

    def _class(self, cond: Cond) -> Tensor:
        labels, known = cond.pooled, self.config.num_class_embeds
        if self.class_embedding is None or known is None:
            raise ValueError("cond.pooled is given, but this U-Net has no class embedding; leave it None")
        if labels is None or labels.is_floating_point() or labels.shape[1:] != (1,):
            found = "None" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise ValueError(
                f"cond.pooled is {found}, but this U-Net has a class embedding; "
                f"give integer labels (B, 1) from 0 to {known - 1}"
            )
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high >= known:
            raise ValueError(f"class label {low if low < 0 else high} in cond.pooled; use 0 to {known - 1}")
        return self.class_embedding(labels[:, 0])  # (B, E)

    def _text_time(self, cond: Cond) -> Tensor:
        """The text's vector beside sines and cosines of the numbers (Podell et al. 2023, section 2.2): (B, P + n F)."""
        c, pooled = self.config, cond.pooled
        assert c.addition_time_embed_dim is not None and c.projection_class_embeddings_input_dim is not None
        width = 0 if pooled is None else pooled.shape[-1]
        each = c.addition_time_embed_dim - 1
        n, rest = divmod(c.projection_class_embeddings_input_dim - width, each)
        if pooled is None or rest or not 0 <= n <= width:
            found = "None" if pooled is None else f"{width} wide"
            raise ValueError(
                f"cond.pooled is {found}; this U-Net wants a text's vector (B, P) and n numbers (B, n) in it, with "
                f"P + {each + 1} n = {c.projection_class_embeddings_input_dim}"
            )
        text, numbers = pooled[:, : width - n], pooled[:, width - n :]
        lifted = sinusoidal(numbers.flatten(), each + 1, c.flip_sin_to_cos, c.freq_shift)  # (B n, F)
        return torch.cat([text.float(), lifted.reshape(len(pooled), -1)], dim=1)

    def _context(self, cond: Cond) -> Tensor | None:
        c = self.config
        if not c.has_cross_attention:
            return None
        if cond.context is None:
            raise ValueError(
                "cond.context is None, but this U-Net has cross-attention; "
                f"give token states of shape (B, K, {c.cross_attention_dim})"
            )
        if cond.context.shape[-1] != c.cross_attention_dim:
            raise ValueError(
                f"cond.context is {cond.context.shape[-1]} wide, this U-Net reads {c.cross_attention_dim}; "
                "use the text encoder of the same model"
            )
        return cond.context


def addition(c: UNetConfig) -> TimestepEmbedding | TextTimeEmbedding | None:
    """What joins the time embedding besides the time, as the config wants it."""
    time_channels = 4 * c.block_out_channels[0]
    if c.addition_embed_type == "text":
        return TextTimeEmbedding(c.cross_attention_dim, time_channels, c.addition_embed_type_num_heads)
    wide = c.projection_class_embeddings_input_dim
    return TimestepEmbedding(wide, time_channels) if c.addition_embed_type == "text_time" and wide else None


def resnet(c: UNetConfig, in_channels: int, out_channels: int, out_scale: float = 1.0) -> ResnetBlock2D:
    """A residual block with time, as the config wants it."""
    time_channels = 4 * c.block_out_channels[0]
    kind = ScaleShiftResnetBlock2D if c.resnet_time_scale_shift == "scale_shift" else ResnetBlock2D
    return kind(in_channels, out_channels, c.norm_num_groups, c.norm_eps, time_channels, out_scale)


def attention(c: UNetConfig, level: int, mid: bool = False) -> Attention | Transformer2DModel:
    """The attention of one level, or of the middle, which `only_cross_attention` does not concern."""
    if c.unconditional:
        width = c.block_out_channels[level]
        size = c.levels("attention_head_dim")[level] or width
        if width % size:
            raise ValueError(f"UNetConfig: attention_head_dim = {size} does not divide {width} channels; use a divisor")
        return Attention(width, width // size, bias=True, groups=c.norm_num_groups, eps=c.norm_eps)
    return Transformer2DModel(
        channels=c.block_out_channels[level],
        heads=c.levels("attention_head_dim")[level],
        context_width=c.cross_attention_dim,
        groups=c.norm_num_groups,
        depth=c.levels("transformer_layers_per_block")[level],
        linear=c.use_linear_projection,
        only_cross=c.levels("only_cross_attention")[level] and not mid,
        upcast=c.upcast_attention,
    )
