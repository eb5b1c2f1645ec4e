"""First stage: the KL autoencoder, trained on crops of composed scenes (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.data.scenes import Composer
from sfumato.images import to_unit
from sfumato.models.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.models.layers import ResnetBlock2D
from sfumato.train.loop import Loop, LoopConfig, Progress


@dataclass(frozen=True)
class VAELoss:
    """Weights of the autoencoder's loss beside L1 on pixels.

    square:   of the mean squared error.
    gradient: of the L1 distance between the differences of neighbouring pixels, which keeps edges sharp.
    kl:       of the divergence from the standard normal, in nats a latent number.
    """

    square: float = 1.0
    gradient: float = 0.5
    kl: float = 3e-4

    def __call__(self, model: AutoencoderKL, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """x (B, 3, H, W) in [-1, 1] -> named scalars."""
        y, dist = model(x, generator)
        error = y - x
        l1 = error.abs().mean()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = dist.kl().sum() / dist.mean.numel()
        mse = error.square().mean()
        loss = l1 + self.square * mse + self.gradient * edges + self.kl * kl
        return {"loss": loss, "l1": l1, "mse": mse, "kl": kl}


def draw_pool(composer: Composer, count: int, seed: int) -> np.ndarray:
    """`count` composed scenes, uint8 (count, 128, 128, 3); the same for the same seed."""
    rng = np.random.default_rng(seed)
    return np.stack([composer.draw(composer.sample(rng), rng) for _ in range(count)])


def crops(pool: np.ndarray, count: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """Random square crops of random pictures of the pool, uint8 (count, side, side, 3)."""
    limit = pool.shape[1] - side
    rows = zip(rng.integers(len(pool), size=count), *rng.integers(limit + 1, size=(2, count)), strict=True)
    return np.stack([pool[i, y : y + side, x : x + side] for i, y, x in rows])


@torch.no_grad()
def start_linear(model: AutoencoderKL) -> None:
    """Initialise so that training starts from a nearly linear network that keeps the picture's variance.

    The last convolution of every residual block is zero (Goyal et al. 2017, section 5.1), every other one has
    unit gain and no bias. PyTorch's own start shrinks the picture threefold a layer and drowns it in biases;
    this one finds the principal colours and edges within some hundred steps and adds detail from there.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
    log_variance = slice(model.config.latent_channels, None)
    if isinstance(model.quant_conv, nn.Conv2d) and model.quant_conv.bias is not None:
        model.quant_conv.weight[log_variance] = 0.0
        model.quant_conv.bias[log_variance] = -6.0  # little noise at first: deviation 0.05


def train_vae(
    config: AutoencoderConfig,
    composer: Composer,
    loop: LoopConfig,
    folder: Path,
    loss: VAELoss = VAELoss(),
    crop: Mapping[int, int] | None = None,
    pool: int = 3000,
    progress: Progress | None = None,
) -> AutoencoderKL:
    """Train the autoencoder in `folder` (resumed when it holds a checkpoint) and return its averaged weights.

    crop: step -> side of the random crops from that step on. Small crops make many cheap steps while the principal
    colours and shapes are learned, large ones teach what lies around a pixel; by default 32, from half way on 64.
    pool: scenes drawn beforehand. The returned model's latents are standardised: see `standardise`.
    """
    torch.manual_seed(loop.seed)
    model = AutoencoderKL(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    start_linear(model)
    pictures: list[np.ndarray] = []

    sides = dict(crop or {0: 32, loop.steps // 2: 64})

    def losses(step: int) -> dict[str, Tensor]:
        if not pictures:  # drawn at the first step, so that a finished stage costs nothing
            pictures.append(draw_pool(composer, pool, loop.seed))
        rng = np.random.default_rng((loop.seed, step))
        side = sides[max(start for start in sides if start <= step)]
        x = to_unit(torch.from_numpy(crops(pictures[0], loop.batch_size, side, rng)))
        return loss(model, x, torch.Generator().manual_seed(step))

    trained = Loop(model, losses, loop, folder, "vae").run(progress)
    return standardise(trained, draw_pool(composer, 256, loop.seed + 1))


@torch.no_grad()
def standardise(model: AutoencoderKL, pictures: np.ndarray) -> AutoencoderKL:
    """Fold a shift and scale of each latent channel into the 1x1 convolutions around the latent.

    Afterwards every channel of `encode` has mean 0 and deviation 1 over `pictures`, the pictures that `decode`
    makes are unchanged, and the config's scaling_factor is 1. Diffusion then needs no per-channel constants,
    which a Stable Diffusion folder has no place for.
    """
    channels = model.config.latent_channels
    z = torch.cat([model.encode(to_unit(torch.from_numpy(p))).latent_dist.mode() for p in np.array_split(pictures, 16)])
    mean, std = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
    before, after = model.quant_conv, model.post_quant_conv
    assert isinstance(before, nn.Conv2d) and before.bias is not None
    assert isinstance(after, nn.Conv2d) and after.bias is not None
    before.weight[:channels] /= std[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()  # the log variance follows the scale
    after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
    after.weight *= std[None, :, None, None]
    return model
