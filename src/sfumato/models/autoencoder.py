"""The KL autoencoder between pictures and latents (Rombach et al. 2022, "latent diffusion", appendix G).

B batch, C channels, H W picture height and width, f = 2 ** (levels - 1) the reduction,
h = H / f, w = W / f, Z latent channels, x a picture in [-1, 1], z a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.models.config import check_choice, read_config, write_config
from sfumato.models.layers import Attention, Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D
from sfumato.models.network import Network

EPS = 1e-6  # of every group norm in the autoencoder; no published config changes it
OVERLAP = 0.25  # share of a tile that is blended with its neighbour


@dataclass(frozen=True)
class CoderConfig:
    """What the configs of the autoencoders have in common.

    sample_size: picture side the model was trained on; also the side of a tile.
    scaling_factor: latents for diffusion are z * scale.
    force_upcast: says that the decoder overflows in float16. It is kept, not acted upon: choose another precision.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        name, levels = type(self).__name__, len(self.block_out_channels)
        blocks = ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels
        check_choice(f"{name}: down_block_types", self.down_block_types, blocks[:1])
        check_choice(f"{name}: up_block_types", self.up_block_types, blocks[1:])
        check_choice(f"{name}: act_fn", self.act_fn, ("silu", "swish"))

    @property
    def factor(self) -> int:
        """Picture pixels a latent pixel, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class AutoencoderConfig(CoderConfig):
    """The entries of `vae/config.json` for the autoencoders of the Stable Diffusion family.

    shift_factor: latents for diffusion are (z - shift) * scale.
    """

    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> AutoencoderConfig:
        """Read the entries of a `config.json`; ValueError on an option that is not implemented."""
        return read_config(cls, raw, fixed={"latents_mean": (None,), "latents_std": (None,)})

    def to_dict(self) -> dict[str, Any]:
        """The entries of a `config.json` that diffusers opens as well."""
        return write_config(self, "AutoencoderKL")


class DiagonalGaussian:
    """The encoder's answer: an independent normal distribution for each latent number.

    mean, logvar, std, var: (B, Z, h, w), the log variance clamped to [-30, 20].
    """

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)  # 2 x (B, Z, h, w)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw a latent (B, Z, h, w); the noise comes in float32 from the generator's own device."""
        device = self.mean.device if generator is None else generator.device
        eps = torch.randn(self.mean.shape, generator=generator, device=device, dtype=torch.float32)
        return self.mean + self.std * eps.to(self.mean)

    def mode(self) -> Tensor:
        """The most likely latent, (B, Z, h, w)."""
        return self.mean

    def kl(self) -> Tensor:
        """Divergence from the standard normal in nats, summed over each latent: (B,)."""
        return 0.5 * (self.mean**2 + self.var - 1.0 - self.logvar).sum(dim=(1, 2, 3))


@dataclass(frozen=True)
class EncoderOutput:
    """What `encode` returns."""

    latent_dist: DiagonalGaussian

    def __getitem__(self, index: int) -> DiagonalGaussian:
        """[0] is the distribution."""
        return (self.latent_dist,)[index]


@dataclass(frozen=True)
class DecoderOutput:
    """What `decode` returns: the picture (B, 3, H, W), about [-1, 1] and not clamped."""

    sample: Tensor

    def __getitem__(self, key: int | str) -> Tensor:
        """The picture for 0 and for "sample"."""
        return {0: self.sample, "sample": self.sample}[key]


class DownEncoderBlock2D(nn.Module):
    """Residual blocks at one resolution, then a halving."""

    def __init__(self, c: CoderConfig, in_channels: int, out_channels: int, down: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (c.layers_per_block - 1)
        self.resnets = nn.ModuleList([ResnetBlock2D(w, out_channels, c.norm_num_groups, EPS) for w in widths])
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding=0)] if down else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x  # (B, C_out, H / 2, W / 2)


class UpDecoderBlock2D(nn.Module):
    """Residual blocks at one resolution, one more than in the encoder, then a doubling."""

    def __init__(self, c: CoderConfig, in_channels: int, out_channels: int, up: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * c.layers_per_block
        self.resnets = nn.ModuleList([ResnetBlock2D(w, out_channels, c.norm_num_groups, EPS) for w in widths])
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x  # (B, C_out, 2 H, 2 W)


class MidBlock2D(nn.Module):
    """Residual block, attention over all pixels when the config asks for it, residual block."""

    def __init__(self, c: CoderConfig, channels: int) -> None:
        super().__init__()
        attention = c.mid_block_add_attention
        self.attentions = nn.ModuleList(
            [Attention(channels, 1, bias=True, groups=c.norm_num_groups, eps=EPS)] if attention else []
        )
        self.resnets = nn.ModuleList([ResnetBlock2D(channels, channels, c.norm_num_groups, EPS) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Picture to `out_channels` numbers a latent pixel: (B, 3, H, W) -> (B, C_out, h, w)."""

    def __init__(self, c: CoderConfig, out_channels: int) -> None:
        super().__init__()
        widths = c.block_out_channels
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [DownEncoderBlock2D(c, widths[max(i - 1, 0)], w, down=i < last) for i, w in enumerate(widths)]
        )
        self.mid_block = MidBlock2D(c, widths[-1])
        self.conv_norm_out = GroupNorm(c.norm_num_groups, widths[-1], EPS, silu=True)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B, C_0, H, W)
        for block in self.down_blocks:
            h = block(h)
        h = self.mid_block(h)  # (B, C_last, h, w)
        return self.conv_out(self.conv_norm_out(h))  # (B, C_out, h, w)


class Decoder(nn.Module):
    """Latent to picture: (B, Z, h, w) -> (B, 3, H, W)."""

    def __init__(self, c: CoderConfig) -> None:
        super().__init__()
        widths = c.block_out_channels[::-1]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock2D(c, widths[0])
        self.up_blocks = nn.ModuleList(
            [UpDecoderBlock2D(c, widths[max(i - 1, 0)], w, up=i < last) for i, w in enumerate(widths)]
        )
        self.conv_norm_out = GroupNorm(c.norm_num_groups, widths[-1], EPS, silu=True)
        self.conv_out = nn.Conv2d(widths[-1], c.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))  # (B, C_last, h, w)
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(self.conv_norm_out(h))  # (B, 3, H, W)


class Coder(Network):
    """Encoder and decoder, on whole pictures or in tiles; the classes below say what lies between them.

    They give `quant_conv` and `post_quant_conv`, and encode and decode through `_encoded` and `_decoded`.
    """

    quant_conv: nn.Module
    post_quant_conv: nn.Module

    def __init__(self, config: CoderConfig, encoded: int) -> None:
        super().__init__()
        self.tile: int | None = None  # side of a tile in picture pixels while tiling is on
        self.slicing = False
        self._sample_size, self._factor = config.sample_size, config.factor
        self.encoder = Encoder(config, encoded)
        self.decoder = Decoder(config)

    def enable_tiling(self, tile: int | None = None) -> None:
        """Work in overlapping tiles of `tile` pixels a side (default: the config's sample_size).

        Memory then follows the tile instead of the picture; a picture no larger than a tile is unaffected.
        """
        tile = self._sample_size if tile is None else tile
        f = self._factor
        if tile % f or tile < 4 * f:
            raise ValueError(f"tile = {tile}; use a multiple of {f}, at least {4 * f}")
        self.tile = tile

    def disable_tiling(self) -> None:
        """Work on whole pictures again."""
        self.tile = None

    def enable_slicing(self) -> None:
        """Work on one picture of a batch at a time, which takes less memory."""
        self.slicing = True

    def disable_slicing(self) -> None:
        """Work on all pictures of a batch at once again."""
        self.slicing = False

    def _encoded(self, x: Tensor) -> Tensor:
        """What the encoder says of a picture (B, 3, H, W), after `quant_conv`: (B, C_out, h, w)."""
        f = self._factor
        if x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"picture of {x.shape[3]}x{x.shape[2]} pixels; use multiples of {f}")
        if self.slicing and x.shape[0] > 1:
            return torch.cat([self._encoded(row) for row in x.split(1)])
        if self.tile is not None and max(x.shape[2:]) > self.tile:
            return tiled(self._encode_tile, x, self.tile, self.tile // f)
        return self._encode_tile(x)

    def _decoded(self, z: Tensor) -> Tensor:
        """The picture (B, 3, H, W) of what goes into `post_quant_conv`, (B, Z, h, w)."""
        f = self._factor
        if self.slicing and z.shape[0] > 1:
            return torch.cat([self._decoded(row) for row in z.split(1)])
        if self.tile is not None and max(z.shape[2:]) > self.tile // f:
            return tiled(self._decode_tile, z, self.tile // f, self.tile)
        return self._decode_tile(z)

    def _encode_tile(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def _decode_tile(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


class AutoencoderKL(Coder):
    """Pictures (B, 3, H, W) in [-1, 1] to latents (B, Z, h, w) and back; parameters named as in `vae/`.

    `encode` and `decode` are raw; `to_latents` and `to_pixels` apply the config's shift and scale as well.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        z = config.latent_channels
        super().__init__(config, 2 * z)
        self.config = config
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(z, z, 1) if config.use_post_quant_conv else nn.Identity()

    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput:
        """The distribution of the raw latent of a picture (B, 3, H, W); H and W must be multiples of f.

        return_dict: for notebooks, which take [0] of what they get with False.
        """
        return EncoderOutput(DiagonalGaussian(self._encoded(x)))  # moments (B, 2 Z, h, w)

    def decode(self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> DecoderOutput:
        """The picture (B, 3, H, W) of a raw latent (B, Z, h, w).

        return_dict: for notebooks, which take [0] of what they get with False; generator: for these, not needed.
        """
        return DecoderOutput(self._decoded(z))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruct a picture through a sampled latent; returns it and the latent's distribution."""
        dist = self.encode(x).latent_dist
        return self.decode(dist.sample(generator)).sample, dist

    def to_latents(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents for diffusion, (z - shift) * scale, with z sampled: (B, 3, H, W) -> (B, Z, h, w)."""
        z = self.encode(x).latent_dist.sample(generator)
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def to_pixels(self, z: Tensor) -> Tensor:
        """Pictures of diffusion latents, z / scale + shift decoded: (B, Z, h, w) -> (B, 3, H, W)."""
        return self.decode(z / self.config.scaling_factor + (self.config.shift_factor or 0.0)).sample


def tiled(net: Callable[[Tensor], Tensor], x: Tensor, tile: int, out_tile: int) -> Tensor:
    """Apply `net`, which turns `tile` input pixels into `out_tile`, tile by tile, and blend the overlaps.

    Every tile has the full size: the last of a row is moved back inside instead of being cut, so that no
    pixel is computed with less surroundings than a tile gives. Weights rise linearly over the overlap and
    are normalised by their sum. Holds the result and one tile at a time.
    """
    (height, width), (th, tw) = x.shape[2:], (min(tile, x.shape[2]), min(tile, x.shape[3]))
    scaled = [n * out_tile // tile for n in (height, width)]
    ramp = max(1, round(out_tile * OVERLAP))
    total: Tensor | None = None
    weight = torch.zeros(scaled, device=x.device)  # (H, W)
    for top in starts(height, th):
        for left in starts(width, tw):
            y = net(x[:, :, top : top + th, left : left + tw])  # (B, C, out tile, out tile)
            if total is None:
                total = y.new_zeros(y.shape[0], y.shape[1], *scaled)
            i, j = top * out_tile // tile, left * out_tile // tile
            w = feather(y.shape[2], ramp, i, scaled[0])[:, None] * feather(y.shape[3], ramp, j, scaled[1])
            area = (..., slice(i, i + y.shape[2]), slice(j, j + y.shape[3]))
            total[area] += y * w.to(y)
            weight[area] += w.to(weight)
    assert total is not None
    return total / weight.to(total)


def starts(size: int, tile: int, overlap: float = OVERLAP) -> list[int]:
    """Where the tiles begin along one side; neighbours share at least that part of a tile."""
    stride = max(1, tile - round(tile * overlap))
    return [*range(0, size - tile, stride), size - tile]


def feather(size: int, ramp: int, start: int, total: int) -> Tensor:
    """Weights of a tile along one side: 1, falling linearly over `ramp` towards sides inside the picture."""
    steps = (torch.arange(size) + 0.5) / ramp
    ones = torch.ones(size)
    rise = steps.clamp(max=1.0) if start > 0 else ones
    fall = steps.flip(0).clamp(max=1.0) if start + size < total else ones
    return rise * fall
