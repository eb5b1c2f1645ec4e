"""Layers that the U-Net and the autoencoder share; parameter names are those of the diffusers layout.

B batch, C channels, H W height and width, L tokens of the picture (H * W), K tokens of the context,
D token width, N attention heads, E width of the time embedding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu and He 2018), followed by SiLU when `silu` is set."""

    def __init__(self, groups: int, channels: int, eps: float, silu: bool = False) -> None:
        if channels % groups:
            raise ValueError(f"norm_num_groups = {groups} does not divide {channels} channels; use a divisor")
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        training = torch.is_grad_enabled()
        if self._by_sums(x):
            if training:
                return GroupNormBySums.apply(x, self.weight, self.bias, self.num_groups, self.eps, self.silu)
            h, _, _ = norm_by_sums(x, self.weight, self.bias, self.num_groups, self.eps)
        else:
            h = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return F.silu(h, inplace=not training) if self.silu else h

    def _by_sums(self, x: Tensor) -> bool:
        """Whether PyTorch's own kernels would be slow: channels-last on the CPU with few channels a group.

        They go through a channels-last picture group by group, a few numbers at a time. Norm and SiLU on one
        AVX2 thread, forward / with backward, (64, 96, 16, 16) in groups of 3: theirs 7.2 / 13.4 ms, by sums
        3.0 / 9.3 ms; (16, 16, 128, 128) in groups of 2: 7.2 / 37.2 and 7.1 / 24.5 ms. From groups of 8 on,
        and on contiguous pictures (2.3 / 5.4 ms for the first), theirs are the faster ones.
        """
        return (
            x.device.type == "cpu"
            and self.num_channels // self.num_groups < 8
            and x.dtype in (torch.float32, torch.float64)
            and x.dtype == self.weight.dtype
            and x.ndim == 4
            and x.is_contiguous(memory_format=torch.channels_last)
            and not x.is_contiguous()
            and not torch.compiler.is_compiling()
        )


def norm_by_sums(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Group norm of a channels-last picture; also means and 1 / deviations of the groups, (B, G, 1) each."""
    B, C, H, W = x.shape
    if H * W >= 1024:  # from this size on PyTorch's own forward kernel works along the channels, too
        y, mean, rstd = torch.native_group_norm(x, weight, bias, B, C, H * W, groups, eps)
        return y, mean.unsqueeze(2), rstd.unsqueeze(2)
    n = H * W * (C // groups)
    mean = x.sum((2, 3)).view(B, groups, -1).sum(2, keepdim=True) / n  # (B, G, 1)
    square = (x * x).sum((2, 3)).view(B, groups, -1).sum(2, keepdim=True) / n
    rstd = (square - mean * mean).clamp(min=0.0).add(eps).rsqrt()
    scale, shift = affine(mean, rstd, weight, bias)
    return torch.addcmul(shift, x, scale), mean, rstd


def affine(mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Group norm as `scale * x + shift`, one pair a picture and channel: 2 x (B, C, 1, 1)."""
    B, G, _ = mean.shape
    scale = rstd * weight.view(1, G, -1)  # (B, G, C / G)
    shift = bias.view(1, G, -1) - mean * scale
    return scale.view(B, -1, 1, 1), shift.view(B, -1, 1, 1)


class GroupNormBySums(torch.autograd.Function):
    """Group norm with optional SiLU whose backward pass is a few sums over pixels and two multiply-adds.

    Keeps x and the groups' statistics only; what went into the SiLU is computed again.
    With n = (x - mean) * rstd and g the gradient of weight * n + bias, the gradient of x is
    rstd * (weight * g - mean(weight * g) - n * mean(weight * g * n)), the means over a group.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        h, mean, rstd = norm_by_sums(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.silu = silu  # type: ignore[attr-defined]
        return F.silu(h, inplace=True) if silu else h

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x, weight, bias, mean, rstd = ctx.saved_tensors  # type: ignore[attr-defined]
        B, C, H, W = x.shape
        G = mean.shape[1]
        n = H * W * (C // G)
        scale, shift = affine(mean, rstd, weight, bias)
        g = grad.contiguous(memory_format=torch.channels_last)
        if ctx.silu:  # type: ignore[attr-defined]
            g = torch.ops.aten.silu_backward(g, torch.addcmul(shift, x, scale))
        g_sum = g.sum((2, 3)).view(B, G, -1)  # (B, G, C / G)
        gx_sum = (g * x).sum((2, 3)).view(B, G, -1)
        gn_sum = (gx_sum - mean * g_sum) * rstd
        w = weight.view(1, G, -1)
        mean_g = (w * g_sum).sum(2, keepdim=True) / n  # (B, G, 1)
        mean_gn = (w * gn_sum).sum(2, keepdim=True) / n
        per_x = -mean_gn * rstd * rstd  # gradient = scale * g + per_x * x + rest
        rest = -mean_g * rstd - per_x * mean
        spread = [v.expand(B, G, C // G).reshape(B, C, 1, 1) for v in (per_x, rest)]
        dx = torch.addcmul(spread[1], x, spread[0]).addcmul_(g, scale)
        return dx, gn_sum.sum(0).view(-1), g_sum.sum(0).view(-1), None, None, None


class RMSNorm(nn.Module):
    """Division by the root mean square (Zhang and Sennrich 2019), with weights; computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        h = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)  # (..., width)
        return h.to(self.weight.dtype) * self.weight


class ResnetBlock2D(nn.Module):
    """Two 3x3 convolutions around an optional shift by the time embedding, plus a shortcut.

    time_channels: width E of the time embedding, or None for a block without time (the autoencoder's).
    out_scale: the sum is divided by it (`mid_block_scale_factor` of the configs).
    """

    told = 1  # numbers that the time tells each channel: the shift

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        eps: float,
        time_channels: int | None = None,
        out_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.out_scale = out_scale
        self.norm1 = GroupNorm(groups, in_channels, eps, silu=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_channels is None else nn.Linear(time_channels, self.told * out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps, silu=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(self.norm1(x))  # (B, C_out, H, W)
        if self.time_emb_proj is not None and temb is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.norm2(h))
        return self.joined(x, h)

    def joined(self, x: Tensor, h: Tensor) -> Tensor:
        """What the convolutions made of x, h (B, C_out, H, W), beside x itself."""
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        h = x + h
        return h if self.out_scale == 1.0 else h / self.out_scale


class ScaleShiftResnetBlock2D(ResnetBlock2D):
    """A residual block whose second norm is scaled and shifted by the time embedding (Dhariwal & Nichol 2021, eq. 3).

    `resnet_time_scale_shift: scale_shift` of the configs.
    """

    told = 2  # scale and shift

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, eps: float, time_channels: int, out_scale: float = 1.0
    ) -> None:
        super().__init__(in_channels, out_channels, groups, eps, time_channels, out_scale)
        self.norm2 = GroupNorm(groups, out_channels, eps)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        assert self.time_emb_proj is not None and temb is not None
        h = self.norm2(self.conv1(self.norm1(x)))  # (B, C_out, H, W)
        scale, shift = self.time_emb_proj(F.silu(temb))[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(torch.addcmul(shift, h, 1 + scale)))
        return self.joined(x, h)


class Downsample2D(nn.Module):
    """Halve the picture with a strided 3x3 convolution.

    padding 1 pads all sides; padding 0 pads below and to the right only, as the autoencoder does.
    """

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.padding == 0:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)  # (B, C, H / 2, W / 2)


class Upsample2D(nn.Module):
    """Double the picture by repeating pixels (or stretch it to `size`), then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None:
            size = (2 * x.shape[2], 2 * x.shape[3])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))  # (B, C, 2 H, 2 W)


class Attention(nn.Module):
    """Multi-head attention of the tokens x to themselves or to a context (Vaswani et al. 2017).

    groups: when set, x is a picture (B, C, H, W) that is group-normalised first and added at the end
    (the autoencoder's attention); otherwise x is (B, L, D) and the caller normalises and adds.
    upcast: scores and softmax in float32 whatever the weights' dtype (`upcast_attention`).
    `sliced` may be set to a number of heads that are computed at a time, which takes less memory; None takes all.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context_width: int | None = None,
        bias: bool = False,
        upcast: bool = False,
        groups: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} attention heads do not divide the width {width}; choose a divisor")
        self.crosses = context_width is not None
        context_width = width if context_width is None else context_width
        self.identity = False  # each token looks at itself alone; set by `perturb.perturbed`
        self.heads = heads
        self.sliced: int | None = None
        self.upcast = upcast
        self.group_norm = None if groups is None else GroupNorm(groups, width, eps)
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width, width, bias=bias)
        self.to_v = nn.Linear(context_width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.group_norm is not None:
            h = pixels_to_tokens(self.group_norm(x))  # (B, L, D)
            return x + tokens_to_pixels(self._tokens(h, h), x)
        return self._tokens(x, x if context is None else context)

    def _tokens(self, x: Tensor, context: Tensor) -> Tensor:
        if self.identity:
            return self.to_out[0](self.to_v(x))  # (B, L, D)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, L or K, D / N)
            for layer, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        kind = torch.float32 if self.upcast else v.dtype
        h = self._attended(q.to(kind), k.to(kind), v.to(kind)).to(v.dtype)  # (B, N, L, D / N)
        return self.to_out[0](h.transpose(1, 2).flatten(2))  # (B, L, D)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.sliced is None:
            return F.scaled_dot_product_attention(q, k, v)
        slices = zip(*(heads.split(self.sliced, dim=1) for heads in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*heads) for heads in slices], dim=1)


class GEGLU(nn.Module):
    """A linear layer whose one half is gated by the GELU of the other (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.proj(x).chunk(2, dim=-1)  # 2 x (B, L, hidden)
        return h * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back; `net.1` is the place of a dropout that is never used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each on the layer norm of x and added to it.

    only_cross: the first attention reads the context as well (`only_cross_attention`).
    """

    def __init__(self, width: int, heads: int, context_width: int, only_cross: bool, upcast: bool) -> None:
        super().__init__()
        self.only_cross = only_cross
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, context_width if only_cross else None, upcast=upcast)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width, upcast=upcast)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x), context if self.only_cross else None)  # (B, L, D)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """Transformer blocks on the pixels of a feature map, between two projections, added to the map.

    linear: the projections are linear layers on tokens instead of 1x1 convolutions (SD 2.x).
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context_width: int,
        groups: int,
        depth: int = 1,
        linear: bool = False,
        only_cross: bool = False,
        upcast: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [BasicTransformerBlock(channels, heads, context_width, only_cross, upcast) for _ in range(depth)]
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm(x)  # (B, C, H, W)
        h = self.proj_in(pixels_to_tokens(h)) if self.linear else pixels_to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context)  # (B, L, C)
        if self.linear:
            return x + tokens_to_pixels(self.proj_out(h), x)  # (B, C, H, W)
        return x + self.proj_out(tokens_to_pixels(h, x))


def pixels_to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C), a view of a channels-last picture."""
    return x.flatten(2).transpose(1, 2)


def tokens_to_pixels(h: Tensor, like: Tensor) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W) with the height and width of `like`, channels-last without a copy."""
    return h.transpose(1, 2).unflatten(2, like.shape[2:])


class TimestepEmbedding(nn.Module):
    """Two linear layers around SiLU that lift the sinusoidal features of the time to width E."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))  # (B, E)


class AttentionPooling(nn.Module):
    """Tokens to one vector: their mean, beside a learned vector, asks, and they and itself answer (Radford et al. 2021,
    section 2.4; as in DeepFloyd IF)."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, D) -> (B, D)."""
        asking = x.mean(dim=1, keepdim=True) + self.positional_embedding  # (B, 1, D)
        answering = torch.cat([asking, x], dim=1)  # (B, 1 + K, D)
        parts = (self.q_proj(asking), self.k_proj(answering), self.v_proj(answering))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # (B, N, L, D / N)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)


class TextTimeEmbedding(nn.Module):
    """The text's part of the time embedding: token states (B, K, D) to (B, E); `addition_embed_type: text`."""

    def __init__(self, width: int, time_channels: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.pool = AttentionPooling(heads, width)
        self.proj = nn.Linear(width, time_channels)
        self.norm2 = nn.LayerNorm(time_channels)

    def forward(self, context: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(context))))


def sinusoidal(t: Tensor, width: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sines and cosines of t at `width / 2` geometric frequencies from 1 down to 1/10000: (B,) -> (B, width).

    Transformer position encoding (Vaswani et al. 2017, section 3.5); `flip_sin_to_cos` puts cosines first and
    `freq_shift` 1 makes the last frequency exactly 1/10000. Computed in float32.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * steps / (half - freq_shift))  # (B, half)
    first, second = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat([first, second], dim=-1), (0, width % 2))  # (B, width)
