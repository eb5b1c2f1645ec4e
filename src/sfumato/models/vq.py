"""The autoencoder with a code book between pictures and latents (van den Oord et al. 2017; Esser et al. 2021).

The first latent-diffusion models work in its latents (Rombach et al. 2022, appendix G): the encoder's output goes to
diffusion as it is, and the decoder replaces each latent pixel by the nearest code before it draws.

B batch, H W picture height and width, h w those of the latent, Z latent channels, D width of a code, M codes,
L latent pixels of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.models.autoencoder import Coder, CoderConfig, DecoderOutput
from sfumato.models.config import read_config, write_config

# Options of diffusers' VQModel for which the models of latent diffusion need one value only.
FIXED: dict[str, tuple[Any, ...]] = {"lookup_from_codebook": (False,), "norm_type": ("group",)}
SCORES = 1 << 22  # comparisons of pixels with codes that are held at a time, 16 MiB of float32


@dataclass(frozen=True)
class VQConfig(CoderConfig):
    """The entries of `vqvae/config.json`; defaults are those of diffusers' VQModel but for the scale.

    scaling_factor: 1, as these models were trained and as the published files mean it, which do not say.
    vq_embed_dim: width D of a code; None for latent_channels.
    """

    latent_channels: int = 3
    scaling_factor: float = 1.0
    force_upcast: bool = False
    num_vq_embeddings: int = 256
    vq_embed_dim: int | None = None

    @property
    def code_width(self) -> int:
        """`vq_embed_dim`, or latent_channels where it is None."""
        return self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> VQConfig:
        """Read the entries of a `config.json`; ValueError on an option that is not implemented."""
        return read_config(cls, raw, FIXED)

    def to_dict(self) -> dict[str, Any]:
        """The entries of a `config.json` that diffusers opens as well."""
        return write_config(self, "VQModel")


@dataclass(frozen=True)
class VQEncoderOutput:
    """What `encode` returns: the latent (B, D, h, w), not yet replaced by codes."""

    latents: Tensor


class VectorQuantizer(nn.Module):
    """A code book of M vectors of width D, and the search for the nearest."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, width)
        nn.init.uniform_(self.embedding.weight, -1.0 / codes, 1.0 / codes)

    def forward(self, z: Tensor) -> Tensor:
        """Each latent pixel replaced by its nearest code, (B, D, h, w); gradients pass as if it were not."""
        q = self.embedding(self.nearest(z)).movedim(-1, 1).to(z.dtype)  # (B, D, h, w)
        return z + (q - z).detach() if z.requires_grad else q

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Index of the code nearest to each latent pixel: (B, D, h, w) -> (B, h, w).

        |z - e|^2 = |z|^2 - 2 z.e + |e|^2, of which the first term is the same for all codes. In float32, and a
        few pixels at a time, so that memory does not grow with the picture.
        """
        codes = self.embedding.weight.float()  # (M, D)
        half = codes.square().sum(1) / 2  # (M,)
        pixels = z.movedim(1, -1)  # (B, h, w, D)
        rows = pixels.reshape(-1, codes.shape[1]).float()  # (L, D)
        chunks = rows.split(max(1, SCORES // len(codes)))
        found = [torch.addmm(half, chunk, codes.T, alpha=-1).argmin(1) for chunk in chunks]
        return torch.cat(found).view(pixels.shape[:-1])  # (B, h, w)


class VQModel(Coder):
    """Pictures (B, 3, H, W) in [-1, 1] to latents (B, D, h, w) and back; parameters named as in `vqvae/`.

    `encode` and `decode` are raw; `to_latents` and `to_pixels` apply the config's scale as well.
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config, config.latent_channels)
        self.config = config
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_width, 1)
        self.quantize = VectorQuantizer(config.num_vq_embeddings, config.code_width)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_channels, 1)

    def encode(self, x: Tensor) -> VQEncoderOutput:
        """The raw latent of a picture (B, 3, H, W), between codes; H and W must be multiples of f."""
        return VQEncoderOutput(self._encoded(x))

    def decode(self, z: Tensor) -> DecoderOutput:
        """The picture (B, 3, H, W) of a raw latent (B, D, h, w), whose pixels move to the nearest codes first."""
        return DecoderOutput(self._decoded(self.quantize(z)))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct a picture: (B, 3, H, W) -> (B, 3, H, W)."""
        return self.decode(self.encode(x).latents).sample

    def to_latents(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents for diffusion, z * scale: (B, 3, H, W) -> (B, D, h, w).

        generator: not drawn from, as these latents have no spread; here so that both autoencoders are called alike.
        """
        return self.encode(x).latents * self.config.scaling_factor

    def to_pixels(self, z: Tensor) -> Tensor:
        """Pictures of diffusion latents, z / scale quantised and decoded: (B, D, h, w) -> (B, 3, H, W)."""
        return self.decode(z / self.config.scaling_factor).sample
