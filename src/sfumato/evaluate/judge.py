"""The judge: a small convolutional classifier that says which of the concepts a picture shows.

It knows pixels only, and nothing of the generator: its own architecture, training and seeds. It is trained on
single icons of every style, and because a generator's pictures are softer and less regular than drawings, its
lessons are warped, blurred, shrunk and noised as well, so that it reads shapes and not crisp edges.

B crops in a batch, S = 64 pixels a side, N concepts, V drawings (icons, and their recoloured variants).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.data.icons import IconSet
from sfumato.data.scenes import GROUNDS, HUES, Composer, dominating_hue, rotate_hue
from sfumato.evaluate.measure import SIDE, crop_object
from sfumato.files import replacing
from sfumato.images import to_unit
from sfumato.train.loop import Loop, LoopConfig, Progress

WEIGHTS = Path(__file__).parents[1] / "assets" / "judge.safetensors"
STEPS = 1600


class Residual(nn.Module):
    """x + convolution(relu(norm(x)))."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(self.norm(x)))


class Judge(nn.Module):
    """Crops (B, 3, S, S) in [-1, 1] -> logits (B, N); `classes` names them. About 0.7 million parameters."""

    def __init__(self, classes: Sequence[str], widths: Sequence[int] = (24, 48, 96, 192)):
        super().__init__()
        self.classes = tuple(classes)
        layers: list[nn.Module] = []
        for i, (before, width) in enumerate(zip((3, *widths), widths, strict=False)):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False)]  # each halves the side
            if i > 0:
                layers += [Residual(width)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(2 * widths[-1], len(self.classes))

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)  # (B, 192, S/16, S/16)
        return self.head(torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=1))  # (B, N)

    @torch.inference_mode()
    def log_probs(self, crops: Sequence[np.ndarray], batch: int = 64) -> np.ndarray:
        """Log probabilities (B, N) of uint8 crops, each (S, S, 3)."""
        rows = [to_unit(torch.from_numpy(np.stack(crops[i : i + batch]))) for i in range(0, len(crops), batch)]
        return torch.cat([F.log_softmax(self.eval()(x), dim=-1) for x in rows]).numpy()

    def index(self, noun: str) -> int:
        """The place of a concept among the classes; raises ValueError when it is none of them."""
        if noun not in self.classes:
            raise ValueError(f"the judge knows no {noun!r}; it knows {len(self.classes)}: {', '.join(self.classes)}")
        return self.classes.index(noun)


def save_judge(judge: Judge, path: Path) -> None:
    """Write the weights in float16, with the class names in the file's metadata."""
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "classes": json.dumps(judge.classes)})


def load_judge(path: Path = WEIGHTS) -> Judge:
    """Read a judge; raises FileNotFoundError naming the command that trains one."""
    if not path.is_file():
        raise FileNotFoundError(f"no judge in {path}; train one with: python -m sfumato.evaluate.judge ICONS")
    with safe_open(path, framework="pt") as file:
        judge = Judge(json.loads(file.metadata()["classes"]))
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return judge.eval()


@dataclass(frozen=True)
class Lessons:
    """Every drawing that the judge learns from.

    drawings: (V, 4, S, S) uint8, colours premultiplied with alpha, the longer side filling the frame.
    groups:   for each concept, for each of its icons, the rows that show it (as drawn first, then recoloured).
    """

    drawings: Tensor
    groups: tuple[tuple[tuple[int, ...], ...], ...]

    @classmethod
    def read(cls, composer: Composer, classes: Sequence[str]) -> Lessons:
        """Collect the composer's icons, with the recoloured variants that it draws."""
        drawings: list[np.ndarray] = []
        groups: dict[str, list[tuple[int, ...]]] = {noun: [] for noun in classes}
        for drawn in composer.by_style.values():
            for noun, icon in drawn:
                rgba = composer.pixels(icon)
                variants = [rgba]
                hue = dominating_hue(rgba)
                if hue is not None:
                    variants += [rotate_hue(rgba, (other - hue) / 360) for other in HUES.values()]
                groups[noun].append(tuple(range(len(drawings), len(drawings) + len(variants))))
                drawings += [_framed(v) for v in variants]
        return cls(torch.from_numpy(np.stack(drawings)), tuple(tuple(groups[noun]) for noun in classes))

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Random drawings (B, 4, S, S) float in [0, 1] and their concepts (B,); recoloured ones half of the time."""
        labels = rng.integers(len(self.groups), size=size)
        rows = []
        for label in labels:
            variants = self.groups[label][rng.integers(len(self.groups[label]))]
            rows.append(variants[0] if rng.random() < 0.5 else variants[rng.integers(len(variants))])
        return self.drawings[rows].float() / 255, torch.from_numpy(labels)


def _framed(rgba: np.ndarray) -> np.ndarray:
    scale = SIDE / max(rgba.shape[:2])
    width, height = (max(1, round(n * scale)) for n in (rgba.shape[1], rgba.shape[0]))
    small = np.asarray(Image.fromarray(rgba).convert("RGBa").resize((width, height), Image.Resampling.BICUBIC))
    frame = np.zeros((SIDE, SIDE, 4), np.uint8)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    frame[top : top + height, left : left + width] = small
    return frame.transpose(2, 0, 1)


def lesson(drawings: Tensor, rng: np.random.Generator) -> Tensor:
    """Drawings (B, 4, S, S) on random grounds as crops (B, 3, S, S) in [-1, 1]: moved, warped, softened."""
    draw = torch.Generator().manual_seed(int(rng.integers(2**62)))
    size = len(drawings)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(shape, generator=draw)  # noqa: E731
    angle, scale = uniform(-0.15, 0.15, size), uniform(0.92, 1.3, size)
    stretch = uniform(0.9, 1.1, size)
    theta = torch.zeros(size, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = scale * angle.cos() * stretch, -scale * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = scale * angle.sin(), scale * angle.cos() / stretch
    theta[:, :, 2] = uniform(-0.15, 0.15, size, 2)
    places = F.affine_grid(theta, [size, 4, SIDE, SIDE], align_corners=False)
    wobble = F.interpolate(torch.randn(size, 2, 5, 5, generator=draw), SIDE, mode="bicubic", align_corners=True)
    places = places + wobble.permute(0, 2, 3, 1) * uniform(0, 0.07, size, 1, 1, 1)
    sprites = F.grid_sample(drawings, places, align_corners=False)
    colours = torch.tensor(list(GROUNDS.values())) / 255
    ground = colours[torch.randint(len(colours), (size,), generator=draw)][:, :, None, None]
    ground = ground + uniform(-0.06, 0.06, size, 3, 1, 1)
    x = sprites[:, :3] + (1 - sprites[:, 3:]) * ground
    gain = uniform(0.85, 1.1, size, 1, 1, 1) * uniform(0.93, 1.07, size, 3, 1, 1)
    return _softened(x * gain, draw).clamp(0, 1) * 2 - 1


def _softened(x: Tensor, draw: torch.Generator) -> Tensor:
    """A quarter left sharp, the rest blurred, shrunk or with coarse colours, by random amounts; then noise."""
    sharp, blurred, shrunk, coarse = x.tensor_split(4)
    passes = int(torch.randint(1, 4, (), generator=draw))
    for _ in range(passes):
        blurred = F.avg_pool2d(blurred, 3, stride=1, padding=1, count_include_pad=False)
    small = int(torch.randint(18, 48, (), generator=draw))
    shrunk = _through(shrunk, small)
    # As a JPEG at low quality does: brightness a little soft, colour at a quarter of the resolution.
    brightness = coarse.mean(1, keepdim=True)
    coarse = _through(brightness, 40) + _through(coarse - brightness, int(torch.randint(8, 24, (), generator=draw)))
    x = torch.cat([sharp, blurred, shrunk, coarse])
    blotches = F.interpolate(torch.randn(len(x), 3, 8, 8, generator=draw), SIDE, mode="bilinear")
    grain = torch.randn(x.shape, generator=draw)
    amount = 0.05 * torch.rand(2, len(x), 1, 1, 1, generator=draw)
    return x + amount[0] * blotches + amount[1] * grain


def _through(x: Tensor, side: int) -> Tensor:
    return F.interpolate(F.interpolate(x, side, mode="area"), x.shape[-1], mode="bilinear")


def train_judge(
    icons: IconSet,
    out: Path,
    folder: Path,
    steps: int = STEPS,
    batch_size: int = 48,
    seed: int = 0,
    progress: Progress | None = None,
) -> Judge:
    """Train a judge on an icon set and write it to `out`; some minutes of one core.

    folder: holds checkpoint and log while training; a run that was stopped goes on from there.
    """
    composer = Composer(icons)
    drawn = {noun for row in composer.by_style.values() for noun, _ in row}
    classes = [noun for noun in composer.nouns.values() if noun in drawn]
    torch.manual_seed(seed)
    judge = Judge(classes)
    lessons = Lessons.read(composer, classes)
    # Batch statistics are no parameters, so weights are not averaged: the rate's fall to zero does that work.
    config = LoopConfig(steps, batch_size, lr=3e-3, warmup=100, cooldown=steps * 3 // 4, weight_decay=0.03,
                        ema=0, save_every=400, seed=seed)  # fmt: skip

    def losses(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((seed, step, 77))
        drawings, labels = lessons.batch(batch_size, rng)
        logits = judge(lesson(drawings, rng))
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        return {"loss": loss, "right": (logits.argmax(1) == labels).float().mean()}

    Loop(judge, losses, config, folder, "judge").run(progress)
    save_judge(judge.eval(), out)
    return judge


@dataclass(frozen=True)
class Accuracy:
    """Shares of `count` scenes whose concept the judge puts first, and among its first five."""

    count: int
    top1: float
    top5: float


def accuracy(judge: Judge, icons: IconSet, count: int = 500, softness: float = 1.0, seed: int = 1000) -> Accuracy:
    """How often the judge is right on composed scenes of one icon, whose answer is known.

    softness: the factor by which the pictures are shrunk and enlarged again first; 1 leaves them as drawn.
    """
    composer = Composer(icons, weights={"single": 0.85, "corner": 0.15})
    rng = np.random.default_rng(seed)
    scenes = [composer.sample(rng) for _ in range(count)]
    crops = [crop_object(soften(composer.draw(scene, rng), softness)) for scene in scenes]
    truth = np.array([judge.index(scene.things[0].noun) for scene in scenes])
    order = judge.log_probs(crops).argsort(axis=1)[:, ::-1]
    return Accuracy(count, float((order[:, 0] == truth).mean()), float((order[:, :5] == truth[:, None]).any(1).mean()))


def soften(picture: np.ndarray, factor: float) -> np.ndarray:
    """A picture (H, W, 3) uint8 shrunk by `factor` and enlarged again."""
    if factor <= 1:
        return picture
    image = Image.fromarray(picture)
    small = image.resize([math.ceil(n / factor) for n in image.size], Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.BICUBIC))


def main() -> None:
    """`python -m sfumato.evaluate.judge ICONS`: train the judge that the package ships, and say how good it is."""
    import argparse
    import sys

    parser = argparse.ArgumentParser(prog="python -m sfumato.evaluate.judge", description=main.__doc__)
    parser.add_argument("icons", type=Path, help="folder made by `sfumato data icons`")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="weights file [default: the package's own]")
    parser.add_argument("--folder", type=Path, default=Path("runs/judge"), help="checkpoint and log")
    parser.add_argument("--steps", type=int, default=STEPS)
    asked = parser.parse_args()
    icons = IconSet(asked.icons)

    def progress(_: str, step: int, steps: int, numbers: dict[str, float]) -> None:
        sys.stderr.write(f"\rstep {step} of {steps}, {numbers['right']:.0%} of the lessons right ")

    train_judge(icons, asked.out, asked.folder, asked.steps, progress=progress)
    judge = load_judge(asked.out)
    for softness in (1.0, 2.0, 3.0):
        found = accuracy(judge, icons, softness=softness)
        line = f"scenes shrunk by {softness:g}: top-1 {found.top1:.1%}, top-5 {found.top5:.1%} of {found.count}"
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
