"""Second stage: the denoiser on cached latents with text (Rombach et al. 2022, section 3.3; Esser et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from sfumato.cond import Cond
from sfumato.diffusion.path import FlowPath, VPPath, add_noise
from sfumato.diffusion.prediction import get_prediction
from sfumato.diffusion.registry import find
from sfumato.models.layers import Downsample2D, ResnetBlock2D, Transformer2DModel, Upsample2D
from sfumato.models.unet import UNet
from sfumato.presets import DenoiserConfig
from sfumato.runtime import cpu_has_bfloat16
from sfumato.train import parallel
from sfumato.train.cache import LatentCache
from sfumato.train.loop import Loop, LoopConfig, Progress
from sfumato.train.objectives import DENSITIES, WEIGHTINGS
from sfumato.weights.parts import NETWORKS, Denoiser


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
        self, net: nn.Module, path: VPPath | FlowPath, x0: Tensor, cond: Cond, empty: Cond, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """x0 (B, Z, h, w), cond of B rows, empty of 1 row -> named scalars; all chance comes from `generator`."""
        count, device = len(x0), x0.device
        eps = torch.randn(x0.shape, generator=generator).to(device)
        u = DENSITIES[self.density](count, generator)
        n, whole = path.num_train_timesteps, isinstance(path, VPPath)  # a flow's time has no steps and ends at n
        pure = torch.rand(count, generator=generator) < self.pure_noise
        t = torch.where(pure, n - 1 if whole else n, (u * n).floor() if whole else u * n).to(device)  # (B,)
        dropped = (torch.rand(count, generator=generator) < self.drop_text).to(device)
        told = [None if p is None or e is None else torch.where(dropped.view(-1, *[1] * (p.ndim - 1)), e, p)
                for p, e in zip(cond.parts, empty.parts, strict=True)]  # fmt: skip
        points = path.at(t)
        x = torch.where(pure.to(device)[:, None, None, None], eps, add_noise(x0, eps, points))
        target = get_prediction(self.prediction).target(x0, eps, points)
        out = net(x, t, Cond(*told))
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
    config: DenoiserConfig,
    cache: LatentCache,
    empty: Cond,
    path: VPPath | FlowPath,
    loop: LoopConfig,
    folder: Path,
    loss: DenoiserLoss = DenoiserLoss(),
    progress: Progress | None = None,
    every: Callable[[int, nn.Module], None] | None = None,
    device: str = "cpu",
    half: float = 0.0,
) -> Denoiser:
    """Train the denoiser in `folder` (resumed when it holds a checkpoint) and return its averaged weights.

    empty: what the empty prompt tells, one row. half: share of the steps on pictures of half the side.
    On devices that multiply bfloat16 the forward pass runs
    under autocast, the weights stay float32.
    """
    torch.manual_seed(loop.seed)
    net = cast(Denoiser, NETWORKS[type(config)](config))
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if isinstance(net, UNet):
        start_plain(net)
    empty = empty.to(device)
    halves = device.startswith("cuda") or cpu_has_bfloat16()

    def losses(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed((loop.seed * 1_000_003 + step) * 1009 + parallel.rank())
        small = half > 0 and torch.rand(1, generator=generator).item() < half
        x0, cond = cache.batch(parallel.share(loop.batch_size), generator, small)
        x0 = x0.to(device, memory_format=torch.channels_last, non_blocking=True)
        cond = cond.to(device)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=halves):
            return loss(net, path, x0, cond, empty, generator)

    name = "unet" if isinstance(net, UNet) else "transformer"
    return Loop(net, losses, loop, folder, name).run(progress, every)
