"""The small pixel model behind `sfumato restore`: a U-Net that is told a first guess of the picture that it draws.

It is trained on crops of composed scenes that it sees degraded in the four ways, by random amounts, and as a
diffusion model: it sees the picture under noise beside the guess (Saharia et al. 2022, Palette). Most often that is
pure noise, from which noise and gaps are restored in one step.

Of the icons that no concept names, some are never learned: on `validation_codes` settings were chosen; on
`held_out_codes`, which a hash picks and nobody looked at before, restoration is measured.
"""

from __future__ import annotations

import hashlib
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
EVERY = 10  # of the icons that no concept names, each tenth is for validation
SHARE = 20  # of 256 hashes, those of which are held out
CONFIG = UNetConfig.from_dict(
    {
        "_class_name": "UNet2DModel",
        "in_channels": (3 + 7 + 6) * FACTOR**2 + 1,
        "out_channels": 3 * FACTOR**2,
        "block_out_channels": [32, 64, 96],
        "down_block_types": ["DownBlock2D"] * 3,
        "up_block_types": ["UpBlock2D"] * 3,
        "layers_per_block": 1,
        "attention_head_dim": 32,
        "norm_num_groups": 8,
    }
)
LOOP = LoopConfig(600, 12, lr=2e-3, warmup=50, cooldown=300, ema=0.995, weight_decay=0.0, save_every=100)
CROP = {0: 56}
MARGIN = 8  # of a crop, which only its first guess sees: pictures seldom end where a crop does
ONE_STEP = 0.6  # of the training times, those at pure noise
ROUND = 1.0  # an error, in units of what deviation remains, below which it counts by its square
FLOOR = 0.02  # of an error to which another is relative
LAYOUTS = {"single": 0.6, "corner": 0.05, "beside": 0.15, "above": 0.1, "copies": 0.1}


def validation_codes(icons: IconSet) -> set[str]:
    """Code points of the icons on which settings are chosen; training shows them in no style."""
    return set(sorted({icon.code for icon in icons.icons} - set(concepts()))[::EVERY])


def held_out_codes(icons: IconSet) -> set[str]:
    """Code points of the icons on which restoration is measured: those whose SHA-256 begins low enough."""
    others = {icon.code for icon in icons.icons} - set(concepts()) - validation_codes(icons)
    return {code for code in others if hashlib.sha256(code.encode()).digest()[0] < SHARE}


def learned(icons: IconSet) -> dict[str, str]:
    """Code point -> label of the icons that training does show."""
    never = held_out_codes(icons) | validation_codes(icons)
    return {icon.code: icon.label for icon in icons.icons if icon.code not in never}


def degradations(count: int, side: int, rng: np.random.Generator) -> list[tuple[Degradation, Tensor]]:
    """One of each kind with the deviations of its noise (count, 1, 1, 1), by random amounts, for square crops."""

    def levels(low: float, high: float, never: float) -> Tensor:
        drawn = np.exp(rng.uniform(np.log(low), np.log(high), count)) * (rng.random(count) >= never)
        return torch.from_numpy(drawn.astype(np.float32)).view(-1, 1, 1, 1)

    share = rng.uniform(0.1, 0.95, (count, 1, 1, 1))
    known = torch.from_numpy((rng.random((count, 1, side, side)) > share).astype(np.float32))
    return [
        (Noise(), levels(0.06, 1.2, 0.0)),
        (Missing(known), levels(0.01, 0.3, 0.7)),
        (Blur(float(rng.uniform(0.6, 4.0))), levels(0.01, 0.2, 0.2)),
        (LowRes(int(rng.choice([2, 4]))), levels(0.01, 0.3, 0.7)),
    ]


def hints(x: Tensor, fold: Fold, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
    """What is told of pictures (B, 3, H, W), degraded in each way in turn: (B, C', H / f, W / f).

    B is a multiple of four.
    """
    told = []
    kinds = degradations(len(x) // 4, x.shape[-1], rng)
    for part, (degradation, noise) in zip(x.tensor_split(4), kinds, strict=True):
        seen = degradation.forward(part)
        seen = seen + noise * torch.randn(seen.shape, generator=generator)
        guess = degradation.guess(seen, noise)
        told.append(fold.hint(guess, degradation.shown(seen), degradation.sharpness(part), noise))
    return torch.cat(told)


def busy(pool: np.ndarray, count: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """Random crops, each the less flat one of two."""
    pairs = crops(pool, 2 * count, side, rng).reshape(count, 2, side, side, 3)
    variance = pairs.reshape(count, 2, -1, 3).var(2).sum(-1)  # (count, 2)
    return pairs[np.arange(count), variance.argmax(1)]


def inner(x: Tensor, margin: int) -> Tensor:
    """(B, C, H, W) without its outer rows and columns."""
    return x[..., margin:-margin, margin:-margin]


def smooth(error: Tensor) -> Tensor:
    """The mean error of each picture (B,): by its square where small, by its size beyond (Charbonnier et al. 1994)."""
    return ((error.square() + ROUND**2).sqrt() - ROUND).mean((1, 2, 3))


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
        x0 = to_unit(torch.from_numpy(busy(pictures[0], loop.batch_size, side, rng))).contiguous()
        hint, x0 = (inner(v, MARGIN // FACTOR) for v in (hints(x0, fold, rng, generator), fold.to_latents(x0)))
        eps = torch.randn(x0.shape, generator=generator)
        t = (uniform(len(x0), generator) * path.num_train_timesteps).floor()
        t = torch.where(torch.rand(len(t), generator=generator) < ONE_STEP, path.num_train_timesteps - 1.0, t)
        points = path.at(t.long())
        mean, left = hinted.ground(add_noise(x0, eps, points), points.alpha, points.sigma, hint)
        target = (x0 - mean) / left
        error = hinted.rest(t, mean, left, hint) - target
        # Relative to what there was to say: a good guess leaves little, and it is not to count for little.
        apart = smooth(error) / (smooth(target) + FLOOR)  # (B,)
        return {"loss": apart.mean(), "mse": (left * error).square().mean()}

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
