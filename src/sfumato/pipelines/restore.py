"""`restore`: a picture from a noisy, holed, blurred or small one, sampled from what the model knows of pictures.

Two kinds of model can do it:

* the pixel model that comes with the package. It sees the degraded picture's first guess beside the noisy picture,
  and without noise in what was seen, each step puts that back in exactly (`Projected`).
* any latent model, with a prompt: gradients lead it to what was seen (`Descended`). Its autoencoder's error stays.

Deviations of noise are on the scale of pictures from 0 to 1 for callers, and twice as large inside.
H W picture height and width, h w latent height and width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import ceil, log2
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sfumato.allocator import kept
from sfumato.cond import Cond
from sfumato.diffusion.degrade import DEGRADATIONS, Blur, Degradation, LowRes, Missing, Noise
from sfumato.diffusion.drive import Run, drive
from sfumato.diffusion.estimate import noise_level, put_back
from sfumato.diffusion.guidance import CFG, Guidance, Plain
from sfumato.diffusion.path import VPPath, betas
from sfumato.diffusion.posterior import Descended, Projected
from sfumato.diffusion.scheduler import Scheduler
from sfumato.images import to_pil, to_tensor
from sfumato.models.clip import CLIPTextModel
from sfumato.models.pixels import Fold, Hinted
from sfumato.models.unet import UNet, UNetConfig
from sfumato.pipelines.inputs import open_picture
from sfumato.prepare import prepare
from sfumato.text.encode import encode_prompts
from sfumato.text.tokenizer import ClipTokenizer
from sfumato.weights.parts import HasComponents
from sfumato.weights.safe import load_module
from sfumato.weights.source import open_weights

WEIGHTS = Path(__file__).parents[1] / "assets" / "restorer.safetensors"
LOUD = 0.3  # a deviation, from 0 to 1, above which pixels by themselves say too little
REMAINS = 0.4  # of the noise's deviation in a smaller picture that was restored
FAINT = 0.01  # the least deviation, from 0 to 1, that is taken for noise where nobody said what is wrong
SPREAD = 0.02  # deviation of what the network leaves open; what was seen under louder noise changes little
STEPS = 1  # of the pixel model, as measured best
LATENT_STEPS = 50
LATENT_STRENGTH = 0.3  # how far a latent model leaves the first guess; further is worse, as measured
LIMITS = (-1.0, 1.0)  # black and white, at which a file cuts noise off
KINDS = ("auto", *DEGRADATIONS)


@dataclass(frozen=True)
class Damage:
    """What is wrong with a picture: a name in DEGRADATIONS, its operator, the deviation of the noise (0 to 1)."""

    name: str
    operator: Degradation
    noise: float


@dataclass(frozen=True)
class Restoration:
    """The restored picture, and what was taken to be wrong with the other."""

    image: Image.Image
    damage: Damage


@dataclass(frozen=True)
class PixelModel:
    """The pixel model: its network, how pictures are folded for it, and its noise levels."""

    unet: UNet
    fold: Fold
    scheduler: Scheduler

    @torch.no_grad()
    def __call__(self, seen: Tensor, damage: Damage, seed: int = 0, steps: int | None = None) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of what is seen of them; sides that the fold's factor divides.

        Where noise is loud, half the size has half of it: that picture is restored and enlarged, and the mean of it
        and of what is made of the whole one is nearer than either.
        steps: 1 gives the mean of what is possible, more a sample of it, which measures worse; None takes STEPS.
        """
        if damage.name == "noise" and damage.noise > LOUD:
            half = Damage("noise", damage.operator, damage.noise / 2)
            small = self(F.avg_pool2d(seen, 2), half, seed, steps)
            large = self(small, Damage("lowres", LowRes(2), REMAINS * half.noise), seed, steps)
            return (large + self._restored(seen, damage, seed, steps)) / 2
        return self._restored(seen, damage, seed, steps)

    def _restored(self, seen: Tensor, damage: Damage, seed: int, steps: int | None) -> Tensor:
        fold, noise, operator = self.fold, 2 * damage.noise, damage.operator
        guess = operator.guess(seen, noise)
        hint = fold.hint(guess, operator.shown(seen), operator.sharpness(guess), noise)
        guidance: Guidance = Plain(Cond(concat=hint))
        if damage.name != "noise":  # with noise alone the hint has said all that was seen
            guidance = Projected(guidance, operator, seen, noise, fold.to_pixels, fold.to_latents, SPREAD)
        plan = self.scheduler.plan(steps or STEPS)
        draw = partial(_drawn, torch.Generator().manual_seed(seed))
        x = draw(hint[:, : fold.config.latent_channels]) * plan.init_scale
        run = Run.begin(plan.sampler, x, plan.grid, draw, guidance, self.scheduler.prediction)
        return fold.to_pixels(drive([run], self._net)[0])

    def _net(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.concat is not None
        points = self.scheduler.path.at(t.round().long())
        return Hinted(self.unet, self.fold).x0(x, t, points.alpha, points.sigma, cond.concat)


@lru_cache(1)
def load_pixel_model(path: Path = WEIGHTS) -> PixelModel:
    """The model in a file that `python -m sfumato.train.restorer` wrote; FileNotFoundError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"no pixel model in {path}; train one with: python -m sfumato.train.restorer ICONS")
    with open_weights(path) as file:
        about = json.loads(file.metadata["restorer"])
    config = UNetConfig.from_dict(about["unet"])
    unet = load_module(lambda: UNet(config), path, torch.float32)
    unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    prepare(unet)
    path_of_noise = VPPath(betas(about["schedule"], 1000))
    return PixelModel(unet, Fold(about["factor"]), Scheduler(path_of_noise, "ddim", "sample", "trailing"))


def restore(
    picture: str | Path | Image.Image,
    degradation: str = "auto",
    *,
    noise: float | None = None,
    mask: str | Path | Image.Image | None = None,
    blur: float | None = None,
    scale: int | None = None,
    prompt: str = "",
    guidance_scale: float = 1.0,
    steps: int | None = None,
    seed: int = 0,
    pipe: HasComponents | None = None,
) -> Restoration:
    """The picture without its degradation: `noise`, `missing` pixels, `blur`, or low resolution (`lowres`).

    degradation: "auto" takes what the other arguments say: a mask or transparent pixels, a blur, a scale; else noise.
    noise:       deviation of the noise on the scale from 0 to 1; None estimates it from the picture.
    mask:        white where pixels are missing; without it they are the transparent ones.
    blur:        deviation of the Gaussian blur in pixels. scale: 2 or 4, by how much to enlarge.
    prompt:      what the picture shows, for a latent model.
    steps:       network evaluations; None takes STEPS or LATENT_STEPS.
    pipe:        the latent model to do it with; None takes the pixel model, which reads no prompt.

    Raises ValueError or FileNotFoundError for values that are not allowed, saying which are.
    """
    if pipe is None and prompt:
        raise ValueError("the pixel model reads no prompt; leave it out, or name a latent model such as mini")
    image = open_picture(str(picture) if isinstance(picture, Path) else picture, "picture")
    seen = to_tensor([_opaque(image)])
    name = _kind(degradation, image, mask, blur, scale, seen, noise)
    known = _known(image, mask) if name == "missing" else None
    level = _level(seen, known) if noise is None and (name in ("noise", "missing")) else noise or 0.0
    if not 0 <= level <= 10:
        raise ValueError(f"noise = {level:g}; give a deviation from 0 to 10, on the scale of pictures from 0 to 1")
    factor = load_pixel_model().fold.config.factor if pipe is None else pipe.vae.config.factor
    unit = factor if name != "lowres" else max(1, factor // (scale or 2))
    if name == "noise" and level > LOUD:
        unit *= 2 ** ceil(log2(level / LOUD))
    height, width = seen.shape[2:]
    seen, known = _filled_up(seen, unit), None if known is None else _filled_up(known, unit)
    damage = Damage(name, _operator(name, known, blur, scale), 0.0 if level < 1 / 512 else level)
    if damage.noise and name in ("noise", "missing"):
        deviation = 2 * damage.noise
        seen = put_back(seen, damage.operator.guess(seen, deviation), deviation, LIMITS)
    if known is not None:
        seen = seen * known
    if pipe is None:
        with kept():
            x = load_pixel_model()(seen, damage, seed, steps)
    else:
        x = restore_latent(pipe, seen, damage, prompt, guidance_scale, steps or LATENT_STEPS, seed)
    grown = (scale or 2) if name == "lowres" else 1
    return Restoration(to_pil(x[:, :, : height * grown, : width * grown])[0], damage)


def restore_latent(
    pipe: HasComponents,
    seen: Tensor,
    damage: Damage,
    prompt: str = "",
    guidance_scale: float = 1.0,
    steps: int = LATENT_STEPS,
    seed: int = 0,
    step_scale: float = 1.0,
) -> Tensor:
    """Pictures (1, 3, H, W) of what is seen of them, by a latent model that gradients lead there.

    It starts from the latent of the first guess under as much noise as hides the guess's errors.
    Raises ValueError for models that need more than a text.
    """
    weight = pipe.denoiser  # its device and dtype
    seen = seen.to(weight.device)
    told = _told(pipe, [prompt, ""] if guidance_scale != 1 else [prompt])
    inner: Guidance = Plain(told[0]) if len(told) == 1 else CFG(told[0], told[1], guidance_scale)
    guess = damage.operator.guess(seen, 2 * damage.noise).clamp(-1, 1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        z = pipe.vae.to_latents(guess.to(weight.dtype), generator).float()
    draw = partial(_drawn, generator)
    plan = pipe.scheduler.plan(steps, "ddim")
    sampler, grid = plan.sampler, plan.grid[round((1 - LATENT_STRENGTH) * steps) :]
    x = grid[0].alpha * z + grid[0].sigma * draw(z)

    def decode(latent: Tensor) -> Tensor:
        return pipe.vae.to_pixels(latent.to(weight.dtype)).float()

    def net(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return pipe.denoiser(x.to(weight.dtype), t, cond).float()

    guidance = Descended(inner, damage.operator, seen, 2 * damage.noise, decode, scale=step_scale)
    frozen = [p for part in (pipe.denoiser, pipe.vae) for p in part.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        (z,) = drive([Run.begin(sampler, x, grid, draw, guidance, pipe.scheduler.prediction)], net)
    finally:
        for p in frozen:
            p.requires_grad_(True)
    with torch.no_grad():
        return decode(z)


def _drawn(generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard noise, drawn on the CPU so that it is the same on every device."""
    return torch.randn(like.shape, generator=generator).to(like.device)


def _told(pipe: HasComponents, prompts: Sequence[str]) -> list[Cond]:
    tower, tokenizer = pipe.text_encoder, pipe.tokenizer
    if tower is None and not any(prompts):
        return [Cond() for _ in prompts]
    if not isinstance(tower, CLIPTextModel) or not isinstance(tokenizer, ClipTokenizer):
        raise ValueError(f"{pipe.pipeline} does not read prompts as Stable Diffusion does; name such a model")
    if pipe.denoiser.config.in_channels != pipe.denoiser.config.out_channels:
        raise ValueError(f"{pipe.pipeline} wants a picture beside the prompt; name a text-to-image model")
    with torch.no_grad():
        return [encode_prompts(tokenizer, tower, [prompt]) for prompt in prompts]


def _kind(
    degradation: str,
    image: Image.Image,
    mask: str | Path | Image.Image | None,
    blur: float | None,
    scale: int | None,
    seen: Tensor,
    noise: float | None,
) -> str:
    """The name of the degradation; ValueError for an unknown one, or one of which too little is said."""
    if degradation not in KINDS:
        raise ValueError(f"unknown degradation {degradation!r}; known: {', '.join(KINDS)}")
    holes = mask is not None or ("A" in image.getbands() and np.asarray(image.getchannel("A")).min() < 128)
    said = {"missing": holes, "blur": blur is not None, "lowres": scale is not None}
    if scale is not None and scale not in (2, 4):
        raise ValueError(f"scale = {scale}; give 2 or 4")
    if degradation == "auto":
        given = [name for name, is_said in said.items() if is_said]
        if len(given) > 1:
            raise ValueError(f"what is given speaks for {' and '.join(given)}; say which with degradation")
        if not given and noise is None and _level(seen) < FAINT:
            raise ValueError(
                f"the picture has no noise to speak of ({_level(seen):.3f}); "
                "give a mask, a blur or a scale, or say degradation = noise with its deviation"
            )
        return given[0] if given else "noise"
    needs = {"missing": "a mask, or a picture with transparent pixels", "blur": "blur, its deviation in pixels"}
    if degradation in needs and not said[degradation]:
        raise ValueError(f"degradation = {degradation} needs {needs[degradation]}")
    return degradation


def _level(seen: Tensor, known: Tensor | None = None) -> float:
    """The deviation of a picture's noise on the scale from 0 to 1."""
    return noise_level(seen, known, LIMITS) / 2


def _operator(name: str, known: Tensor | None, blur: float | None, scale: int | None) -> Degradation:
    if name == "missing":
        assert known is not None
        return Missing(known)
    if name == "blur":
        assert blur is not None
        return Blur(blur)
    return LowRes(scale or 2) if name == "lowres" else Noise()


def _opaque(image: Image.Image) -> Image.Image:
    """The picture's colours, whatever its transparency."""
    return image.convert("RGBA").convert("RGB")


def _known(image: Image.Image, mask: str | Path | Image.Image | None) -> Tensor:
    """1 where a pixel is known, (1, 1, H, W); ValueError for a mask of another size, or one of nothing or all."""
    if mask is None:
        levels = 255 - np.asarray(image.getchannel("A"))
    else:
        opened = open_picture(str(mask) if isinstance(mask, Path) else mask, "mask")
        if opened.size != image.size:
            raise ValueError(
                f"the mask has {opened.width}x{opened.height} pixels and the picture {image.width}x{image.height}; "
                "give a mask of the picture's size"
            )
        levels = np.asarray(opened.convert("L"))
    known = torch.from_numpy((levels <= 127).astype(np.float32))[None, None]
    if not known.any():
        raise ValueError("every pixel is missing; leave some black in the mask")
    return known


def _filled_up(x: Tensor, unit: int) -> Tensor:
    """The picture with its last rows and columns repeated until `unit` divides its sides."""
    bottom, right = (-side % unit for side in x.shape[2:])
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x
