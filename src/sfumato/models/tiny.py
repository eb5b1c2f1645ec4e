"""A small autoencoder that was distilled from a large one, TAESD (Boer Bohan 2023), in the layout of diffusers.

Convolutions and ReLU only, without norms and attention. Its latents are those that diffusion works in, already scaled;
a picture has one, without spread.

B batch, H W picture height and width, f the reduction, h = H / f, w = W / f, Z latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.autoencoder import Coder, DecoderOutput
from sfumato.models.config import check_choice, read_config, write_config
from sfumato.models.network import Network

BOUND = 3.0  # latents are bent into this range before they are decoded
TILE = 512  # pixels of a side, as its distillation saw them


@dataclass(frozen=True)
class TinyConfig:
    """The entries of `vae/config.json` of diffusers' AutoencoderTiny; defaults are those of TAESD.

    scaling_factor, shift_factor: latents for diffusion are (z - shift) * scale.
    latent_magnitude, latent_shift: how latents would be kept in bytes; not read.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    upsample_fn: str = "nearest"
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    force_upcast: bool = False
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        check_choice("TinyConfig: act_fn", self.act_fn, ("relu",))
        check_choice("TinyConfig: upsample_fn", self.upsample_fn, ("nearest",))
        check_choice("TinyConfig: upsampling_scaling_factor", self.upsampling_scaling_factor, (2,))
        levels = len(self.encoder_block_out_channels)
        names = "encoder_block_out_channels", "decoder_block_out_channels", "num_encoder_blocks", "num_decoder_blocks"
        for name in names:
            if len(getattr(self, name)) != levels:
                raise ValueError(f"TinyConfig: {name} = {getattr(self, name)!r}; give {levels} entries, as the others")
        for name in names[:2]:
            if len(set(getattr(self, name))) > 1:
                raise ValueError(f"TinyConfig: {name} = {getattr(self, name)!r}; all levels must be as wide")

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """The decoder's widths, finest level first."""
        return self.decoder_block_out_channels[::-1]

    @property
    def factor(self) -> int:
        """Picture pixels a latent pixel, along one side."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TinyConfig:
        """Read the entries of a `config.json`; ValueError on an option that is not implemented."""
        return read_config(cls, {name: value for name, value in raw.items() if name != "block_out_channels"}, {})

    def to_dict(self) -> dict[str, Any]:
        """The entries of a `config.json` that diffusers opens as well."""
        return write_config(self, "AutoencoderTiny")


class TinyBlock(nn.Module):
    """Three convolutions beside what they are given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(inner[0], nn.ReLU(), inner[1], nn.ReLU(), inner[2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] to latents (B, Z, h, w)."""

    def __init__(self, c: TinyConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (width, blocks) in enumerate(zip(c.encoder_block_out_channels, c.num_encoder_blocks, strict=True)):
            first = nn.Conv2d(c.in_channels, width, 3, padding=1)
            layers.append(first if i == 0 else nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            layers += [TinyBlock(width) for _ in range(blocks)]
        layers.append(nn.Conv2d(c.encoder_block_out_channels[-1], c.latent_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x + 1) / 2)


class TinyDecoder(nn.Module):
    """Latents (B, Z, h, w) to (B, 3, H, W), about [-1, 1]."""

    def __init__(self, c: TinyConfig) -> None:
        super().__init__()
        last = len(c.num_decoder_blocks) - 1
        widths = c.decoder_block_out_channels
        layers: list[nn.Module] = [nn.Conv2d(c.latent_channels, widths[0], 3, padding=1), nn.ReLU()]
        for i, (width, blocks) in enumerate(zip(widths, c.num_decoder_blocks, strict=True)):
            layers += [TinyBlock(width) for _ in range(blocks)]
            if i < last:
                layers += [
                    nn.Upsample(scale_factor=2, mode="nearest"),
                    nn.Conv2d(width, width, 3, padding=1, bias=False),
                ]
            else:
                layers.append(nn.Conv2d(width, c.out_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(torch.tanh(z / BOUND) * BOUND) * 2 - 1


@dataclass(frozen=True)
class TinyEncoderOutput:
    """What `encode` returns: the latent (B, Z, h, w)."""

    latents: Tensor


class AutoencoderTiny(Coder):
    """Pictures (B, 3, H, W) in [-1, 1] to latents (B, Z, h, w) and back; parameters named as diffusers' are."""

    def __init__(self, config: TinyConfig) -> None:
        Network.__init__(self)
        self.config = config
        self.tile: int | None = None
        self.slicing = False
        self._sample_size, self._factor = TILE, config.factor
        self.encoder, self.decoder = TinyEncoder(config), TinyDecoder(config)  # type: ignore[assignment]
        self.quant_conv = self.post_quant_conv = nn.Identity()

    def encode(self, x: Tensor) -> TinyEncoderOutput:
        """The raw latent of a picture (B, 3, H, W); H and W must be multiples of f."""
        return TinyEncoderOutput(self._encoded(x))

    def decode(self, z: Tensor) -> DecoderOutput:
        """The picture (B, 3, H, W) of a raw latent (B, Z, h, w)."""
        return DecoderOutput(self._decoded(z))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct a picture: (B, 3, H, W) -> (B, 3, H, W)."""
        return self.decode(self.encode(x).latents).sample

    def to_latents(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents for diffusion, (z - shift) * scale: (B, 3, H, W) -> (B, Z, h, w); nothing is drawn."""
        return (self.encode(x).latents - self.config.shift_factor) * self.config.scaling_factor

    def to_pixels(self, z: Tensor) -> Tensor:
        """Pictures of diffusion latents, z / scale + shift decoded: (B, Z, h, w) -> (B, 3, H, W)."""
        return self.decode(z / self.config.scaling_factor + self.config.shift_factor).sample
