"""The small pixel model behind `sfumato restore`: a U-Net that is told a first guess of the picture that it draws.

It is trained on crops of composed scenes that it sees degraded in the four ways, by random amounts, and as a
diffusion model: it sees the picture under noise beside the guess (Saharia et al. 2022, Palette). It learns all
icons but those of `held_out_codes`, on which restoration is measured.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.data.icons import IconSet
from sfumato.data.scenes import Composer, concepts
from sfumato.diffusion.degrade import Blur, Degradation, LowRes, Missing, Noise
from sfumato.diffusion.path import VPPath, add_noise, betas
from sfumato.images import to_unit
from sfumato.models.pixels import Fold, Hinted
from sfumato.models.unet import UNet, UNetConfig
from sfumato.pipelines.restore import WEIGHTS
from sfumato.train.loop import Loop, LoopConfig, Progress
from sfumato.train.objectives import uniform
from sfumato.train.vae import crops, draw_pool
from sfumato.weights.safe import write_tensors

FACTOR = 2
SCHEDULE = "squaredcos_cap_v2"
EVERY = 10  # of the icons that no concept names, each tenth is held out
CONFIG = UNetConfig.from_dict(
    {
        "_class_name": "UNet2DModel",
        "in_channels": (3 + 4 + 6) * FACTOR**2 + 1,
        "out_channels": 3 * FACTOR**2,
        "block_out_channels": [32, 64, 96],
        "down_block_types": ["DownBlock2D"] * 3,
        "up_block_types": ["UpBlock2D"] * 3,
        "layers_per_block": 1,
        "attention_head_dim": 32,
        "norm_num_groups": 8,
    }
)
LOOP = LoopConfig(1900, 16, lr=2e-3, warmup=20, cooldown=1500, ema=0.995, weight_decay=0.0, save_every=100)
CROP = {0: 32}
FLOOR = 0.05  # of a squared error to which another is relative
LAYOUTS = {"single": 0.6, "corner": 0.05, "beside": 0.15, "above": 0.1, "copies": 0.1}


def held_out_codes(icons: IconSet) -> set[str]:
    """Code points of the icons that training never shows, in any style."""
    return set(sorted({icon.code for icon in icons.icons} - set(concepts()))[::EVERY])


def learned(icons: IconSet) -> dict[str, str]:
    """Code point -> label of the icons that it does show."""
    held = held_out_codes(icons)
    return {icon.code: icon.label for icon in icons.icons if icon.code not in held}


def degradations(side: int, rng: np.random.Generator) -> list[tuple[Degradation, float]]:
    """One of each kind with the deviation of its noise, by random amounts, for square crops."""
    known = torch.from_numpy((rng.random((1, 1, side, side)) > rng.uniform(0.1, 0.95)).astype(np.float32))
    small = lambda: float(rng.uniform(0, 0.2)) if rng.random() < 0.3 else 0.0  # noqa: E731
    return [
        (Noise(), float(np.exp(rng.uniform(np.log(0.04), np.log(1.3))))),
        (Missing(known), small()),
        (Blur(float(rng.uniform(0.6, 4.0))), small()),
        (LowRes(int(rng.choice([2, 4]))), small()),
    ]


def hints(x: Tensor, fold: Fold, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
    """What is told of pictures (B, 3, H, W), a quarter of them degraded in each way: (B, C', H / f, W / f)."""
    told = []
    for part, (degradation, noise) in zip(x.tensor_split(4), degradations(x.shape[-1], rng), strict=True):
        seen = degradation.forward(part)
        seen = seen + noise * torch.randn(seen.shape, generator=generator)
        told.append(fold.hint(degradation.guess(seen, noise), degradation.sharpness(part), noise))
    return torch.cat(told)


def train_restorer(
    icons: IconSet,
    folder: Path,
    loop: LoopConfig = LOOP,
    crop: dict[int, int] = CROP,
    pool: int = 1500,
    config: UNetConfig = CONFIG,
    progress: Progress | None = None,
) -> UNet:
    """Train in `folder` (resumed when it holds a checkpoint) and return the averaged network for `Hinted`.

    crop: step -> side of the random crops from that step on. pool: scenes drawn beforehand.
    """
    torch.manual_seed(loop.seed)
    net = UNet(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    nn.init.zeros_(net.conv_out.weight)
    path, fold = VPPath(betas(SCHEDULE, 1000)), Fold(FACTOR)
    hinted = Hinted(net, fold)
    composer = Composer(icons, nouns=learned(icons), weights=LAYOUTS, styled=0.9)
    pictures: list[np.ndarray] = []

    def losses(step: int) -> dict[str, Tensor]:
        if not pictures:  # drawn at the first step, so that a finished stage costs nothing
            pictures.append(draw_pool(composer, pool, loop.seed))
        rng = np.random.default_rng((loop.seed, step, 5))
        generator = torch.Generator().manual_seed(loop.seed * 1_000_003 + step)
        side = crop[max(start for start in crop if start <= step)]
        x0 = to_unit(torch.from_numpy(crops(pictures[0], loop.batch_size, side, rng))).contiguous()
        hint = hints(x0, fold, rng, generator)
        x0 = fold.to_latents(x0)
        eps = torch.randn(x0.shape, generator=generator)
        t = (uniform(len(x0), generator) * path.num_train_timesteps).floor()
        points = path.at(t.long())
        x = add_noise(x0, eps, points)
        mean, left = hinted.ground(x, points.alpha, points.sigma, hint)
        target = (x0 - mean) / left
        error = (hinted.rest(x, t, mean, left, hint) - target).square().mean((1, 2, 3))  # (B,)
        # Relative to what there was to say: a good guess leaves little, and it is not to count for little.
        loss = (error / (target.square().mean((1, 2, 3)) + FLOOR)).mean()
        return {"loss": loss, "mse": error.mean()}

    return Loop(net, losses, loop, folder, "restorer").run(progress)


def save_restorer(unet: UNet, path: Path) -> None:
    """Write the network in float16, with all that is needed to open it in the file's metadata."""
    about = {"unet": unet.config.to_dict(), "schedule": SCHEDULE, "factor": FACTOR}
    write_tensors(path, unet.state_dict(), torch.float16, {"restorer": json.dumps(about)})


def main() -> None:
    """`python -m sfumato.train.restorer ICONS`: train the pixel model that the package ships."""
    import argparse
    import sys

    parser = argparse.ArgumentParser(prog="python -m sfumato.train.restorer", description=main.__doc__)
    parser.add_argument("icons", type=Path, help="folder made by `sfumato data icons`")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="weights file [default: the package's own]")
    parser.add_argument("--folder", type=Path, default=Path("runs/restorer"), help="checkpoint and log")
    asked = parser.parse_args()

    def progress(_: str, step: int, steps: int, numbers: dict[str, float]) -> None:
        sys.stderr.write(f"\rstep {step} of {steps}, loss {numbers['loss']:.3f} ")

    save_restorer(train_restorer(IconSet(asked.icons), asked.folder, progress=progress), asked.out)


if __name__ == "__main__":
    main()
