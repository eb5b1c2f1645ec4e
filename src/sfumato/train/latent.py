"""Second stage: the U-Net on cached latents with text (Rombach et al. 2022, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.cond import Cond
from sfumato.diffusion.path import VPPath, add_noise
from sfumato.diffusion.prediction import get_prediction
from sfumato.diffusion.registry import find
from sfumato.models.layers import Downsample2D, ResnetBlock2D, Transformer2DModel, Upsample2D
from sfumato.models.unet import UNet, UNetConfig
from sfumato.runtime import cpu_has_bfloat16
from sfumato.train import parallel
from sfumato.train.cache import LatentCache
from sfumato.train.loop import Loop, LoopConfig, Progress
from sfumato.train.objectives import DENSITIES, WEIGHTINGS


@dataclass(frozen=True)
class DenoiserLoss:
    """The denoising objective.

    prediction: row of the pair table that the network is trained to say.
    density:    of training times, a name in DENSITIES.
    weighting:  of the squared error, a name in WEIGHTINGS.
    drop_text:  share of samples that see the empty prompt, for classifier-free guidance (Ho & Salimans 2022).
    pure_noise: share of samples that see noise alone at the last time, where sampling starts. The schedule
                leaves a trace of the picture there, and a network that learns to read it paints grey grounds.
    """

    prediction: str = "v_prediction"
    density: str = "uniform"
    weighting: str = "flat"
    drop_text: float = 0.1
    pure_noise: float = 0.02

    def __post_init__(self) -> None:
        """ValueError for a name that is in no table."""
        get_prediction(self.prediction)
        find(DENSITIES, self.density, "density")
        find(WEIGHTINGS, self.weighting, "weighting")

    def __call__(
        self, net: nn.Module, path: VPPath, x0: Tensor, context: Tensor, empty: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """x0 (B, Z, h, w), context (B, L, D), empty (1, L, D) -> named scalars; all chance comes from `generator`."""
        count, device = len(x0), x0.device
        eps = torch.randn(x0.shape, generator=generator).to(device)
        u = DENSITIES[self.density](count, generator)
        last = path.num_train_timesteps - 1
        pure = torch.rand(count, generator=generator) < self.pure_noise
        t = torch.where(pure, last, (u * path.num_train_timesteps).floor()).to(device)  # (B,)
        dropped = (torch.rand(count, generator=generator) < self.drop_text).to(device)
        context = torch.where(dropped[:, None, None], empty, context)
        points = path.at(t)
        x = torch.where(pure.to(device)[:, None, None, None], eps, add_noise(x0, eps, points))
        target = get_prediction(self.prediction).target(x0, eps, points)
        out = net(x, t, Cond(context))
        error = (out.float() - target).square()
        loss = (error * WEIGHTINGS[self.weighting](points)).mean()
        return {"loss": loss, "mse": error.mean()}


@torch.no_grad()
def start_plain(net: UNet) -> None:
    """Initialise so that training starts from the skip path: residual and attention branches add nothing yet.

    Their last layers are zero, and so is the network's, since zero is the target's mean (Dhariwal & Nichol 2021);
    the convolutions outside the branches keep the signal's variance.
    """
    for module in net.modules():
        if isinstance(module, Downsample2D | Upsample2D):
            nn.init.kaiming_normal_(module.conv.weight, nonlinearity="linear")
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            if module.conv_shortcut is not None:
                nn.init.kaiming_normal_(module.conv_shortcut.weight, nonlinearity="linear")
        if isinstance(module, Transformer2DModel):
            nn.init.zeros_(module.proj_out.weight)
    nn.init.kaiming_normal_(net.conv_in.weight, nonlinearity="linear")
    nn.init.zeros_(net.conv_out.weight)


def train_latent(
    config: UNetConfig,
    cache: LatentCache,
    empty: Tensor,
    path: VPPath,
    loop: LoopConfig,
    folder: Path,
    loss: DenoiserLoss = DenoiserLoss(),
    progress: Progress | None = None,
    every: Callable[[int, nn.Module], None] | None = None,
    device: str = "cpu",
) -> UNet:
    """Train the U-Net in `folder` (resumed when it holds a checkpoint) and return its averaged weights.

    empty: text states of the empty prompt, (1, L, D). On devices that multiply bfloat16 the forward pass runs
    under autocast, the weights stay float32.
    """
    torch.manual_seed(loop.seed)
    net = UNet(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    start_plain(net)
    empty = empty.to(device)
    halves = device.startswith("cuda") or cpu_has_bfloat16()

    def losses(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed((loop.seed * 1_000_003 + step) * 1009 + parallel.rank())
        x0, context = cache.batch(parallel.share(loop.batch_size), generator)
        x0 = x0.to(device, memory_format=torch.channels_last, non_blocking=True)
        context = context.to(device, non_blocking=True)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=halves):
            return loss(net, path, x0, context, empty, generator)

    return Loop(net, losses, loop, folder, "unet").run(progress, every)
