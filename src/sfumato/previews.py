"""Pictures of what is foreseen on the way: clean latents as RGB, by a linear map where one is known.

A latent pixel says about the colour of the square of pixels that it stands for; four numbers to three, and an offset,
give it away well enough to watch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sfumato.images import to_pil
from sfumato.models.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.models.tiny import AutoencoderTiny
from sfumato.models.vq import VQModel


@dataclass(frozen=True)
class Factors:
    """Latents (scaled, as the U-Net sees them) to RGB in [-1, 1].

    rows:   for each latent channel its share of red, green and blue.
    offset: added to the sum.
    """

    rows: Sequence[tuple[float, float, float]]
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def rgb(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, h, w) of latents (B, C, h, w)."""
        matrix = torch.tensor(self.rows, dtype=torch.float32, device=z.device)  # (C, 3)
        offset = torch.tensor(self.offset, dtype=torch.float32, device=z.device)  # (3,)
        return torch.einsum("bchw,cr->brhw", z.float(), matrix) + offset.view(1, 3, 1, 1)


# Stable Diffusion 1.x and 2.x, by Kevin Turner: https://discuss.huggingface.co/t/23204
SD = Factors(((0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473)))


# The built-in model; benchmarks/preview_factors.py makes the numbers (root mean square error 0.15, in -1 to 1).
MINI = Factors(
    ((0.554, 0.128, 0.062), (-0.137, -0.042, 0.375), (-0.016, -0.377, -0.330), (0.127, -0.090, -0.134)),
    (0.301, 0.174, 0.120),
)


def factors_of(config: object) -> Factors | None:
    """The map for an autoencoder's latents; None where none is known."""
    if not isinstance(config, AutoencoderConfig) or config.latent_channels != 4 or config.factor != 8:
        return None
    if config.scaling_factor == 0.18215 and config.block_out_channels == (128, 256, 512, 512):
        return SD
    if config.scaling_factor == 1.0 and config.block_out_channels == (16, 32, 64, 128):
        return MINI
    return None


class Preview:
    """Pictures of latents: by a linear map where one is known for the autoencoder, else by decoding.

    Either way as large as the finished picture.
    """

    def __init__(self, vae: AutoencoderKL | VQModel | AutoencoderTiny) -> None:
        self.vae = vae
        self.factors = factors_of(vae.config)

    @torch.inference_mode()
    def picture(self, z: Tensor) -> Image.Image:
        """A latent (1, C, h, w) as an RGB picture."""
        if self.factors is None:
            parameter = next(self.vae.parameters())
            return to_pil(self.vae.to_pixels(z.to(parameter.device, parameter.dtype)).float())[0]
        factor = self.vae.config.factor
        (small,) = to_pil(self.factors.rgb(z))
        return small.resize((small.width * factor, small.height * factor), Image.Resampling.BICUBIC)


def fit(z: Tensor, x: Tensor) -> tuple[Factors, float]:
    """The map from latents z (B, C, h, w) to pictures x (B, 3, H, W) with the least squared error, and the error.

    x in [-1, 1]; each latent pixel is compared with the mean of the pixels that it stands for. The error is the root
    of the mean square, in the units of x.
    """
    small = F.adaptive_avg_pool2d(x.double(), (z.shape[2], z.shape[3]))  # (B, 3, h, w)
    given = z.double().permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, C)
    given = torch.cat([given, torch.ones_like(given[:, :1])], dim=1)  # (B h w, C + 1)
    wanted = small.permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, 3)
    found = torch.linalg.lstsq(given, wanted).solution  # (C + 1, 3)
    error = float((given @ found - wanted).square().mean().sqrt())
    rows = [(float(r), float(g), float(b)) for r, g, b in found.tolist()]
    return Factors(tuple(rows[:-1]), rows[-1]), error
