"""The pictures of docs/gallery.md, made by the built-in model: `python benchmarks/gallery.py [NAME...]`.

Each is a sheet of small pictures with what they were asked for below them, in docs/images/gallery/.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import sfumato
from sfumato.evaluate.sheet import contact_sheet
from sfumato.images import grid
from sfumato.pipelines.pipeline import Pipeline

HOME = Path(__file__).resolve().parents[1] / "docs" / "images" / "gallery"
QUALITY = 85
BLUE = "on a light blue background"


def labelled(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int) -> Image.Image:
    """A sheet with a label below each picture."""
    return contact_sheet([np.asarray(picture.convert("RGB")) for picture in pictures], labels, columns)


def things(pipe: Pipeline) -> Image.Image:
    """What the model draws best."""
    prompts = (
        "a strawberry on a light blue background",
        "a pink star on a yellow background",
        "a gift on a green background",
        "a rainbow",
        "a penguin on a blue background",
        "three apples on a yellow background",
        "a red car on a light blue background",
        "a sunflower on a light blue background",
        "a blue heart on a pink background",
        "a red balloon on a light green background",
        "a castle on a purple background, flat style",
        "a fox on a light green background, sticker style",
    )
    return labelled(pipe(prompts, seed=40, num_inference_steps=20).images, prompts, 6)


def styles(pipe: Pipeline) -> Image.Image:
    """The same things in the styles of the training pictures."""
    names = ("3d", "flat", "retro", "outline")
    prompts = [f"{thing}, {name} style" for thing in ("a mushroom", "a heart", "a cat") for name in names]
    return labelled(pipe(prompts, seed=2, num_inference_steps=20).images, prompts, len(names))


def seeds(pipe: Pipeline) -> Image.Image:
    """What the noise decides."""
    prompts = ("a fox on a yellow background", "a house on a light green background")
    pictures = [image for prompt in prompts for image in pipe(prompt, seed=0, num_images_per_prompt=6).images]
    return labelled(pictures, [f"seed {seed}" for _ in prompts for seed in range(6)], 6)


def samplers(pipe: Pipeline) -> Image.Image:
    """Samplers side by side, with few steps and with more."""
    names = ("euler", "ddim", "heun", "dpmpp_2m", "unipc", "euler_a", "dpmpp_2m_sde", "lcm")
    pictures, labels = [], []
    for steps in (3, 20):
        for name in names:
            options = {"seed": 2, "num_inference_steps": steps, "sampler": name}
            pictures += pipe(f"a strawberry {BLUE}", **options).images
            labels.append(f"{name}, {steps} steps")
    return labelled(pictures, labels, len(names))


def guidance(pipe: Pipeline) -> Image.Image:
    """The weight of the prompt."""
    scales = (1, 2, 3.5, 5, 8, 14)
    prompts = ("a fox on a yellow background", f"a sunflower {BLUE}")
    pictures = [pipe(prompt, seed=40, guidance_scale=scale).images[0] for prompt in prompts for scale in scales]
    return labelled(pictures, [f"guidance {scale:g}" for _ in prompts for scale in scales], len(scales))


def sketch() -> Image.Image:
    """A strawberry in four shapes."""
    drawn = Image.new("RGB", (128, 128), "lightblue")
    draw = ImageDraw.Draw(drawn)
    draw.polygon([(64, 112), (26, 50), (102, 50)], fill="crimson")
    draw.ellipse([26, 30, 66, 66], fill="crimson")
    draw.ellipse([62, 30, 102, 66], fill="crimson")
    draw.polygon([(40, 36), (64, 18), (88, 36), (64, 46)], fill="green")
    return drawn


def strengths(pipe: Pipeline) -> Image.Image:
    """How far an image is left."""
    image, shares = sketch(), (0.2, 0.4, 0.6, 0.8, 1.0)
    pictures, labels = [], []
    for thing in ("a strawberry", "a heart", "a pizza"):
        pictures += [image, *(pipe(f"{thing} {BLUE}", image=image, strength=s, seed=3).images[0] for s in shares)]
        labels += [f"for {thing}", *(f"strength {share:g}" for share in shares)]
    return labelled(pictures, labels, 6)


def inpainting(pipe: Pipeline) -> Image.Image:
    """Another thing in the place of a balloon."""
    picture = pipe(f"a red balloon {BLUE}", seed=40).images[0]
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).ellipse([16, 8, 112, 104], fill=255)
    things = ("a yellow star", "a sunflower", "a blue heart", "a penguin", "a tulip", "a gift")
    changed = [pipe(f"{thing} {BLUE}", image=picture, mask=mask, seed=4).images[0] for thing in things]
    return labelled([picture, mask, *changed], ["the picture", "the mask", *things], 8)


def outpainting(pipe: Pipeline) -> Image.Image:
    """Room at one side, with something in it."""
    wishes = (
        (f"a red balloon {BLUE}", f"a rainbow {BLUE}", (128, 0, 0, 0)),
        ("a small star in the top left corner", "three small stars", (0, 128, 0, 0)),
    )
    pictures = []
    for first, then, sides in wishes:
        begun = pipe(first, seed=40, num_inference_steps=10).images[0]
        wide = pipe(then, image=begun, outpaint=sides, seed=1, num_inference_steps=10).images[0]
        pictures += [begun, wide]
    return grid(pictures, 2)


def variations(pipe: Pipeline) -> Image.Image:
    """From the noise of one seed to that of another."""
    shares = (0, 0.2, 0.4, 0.6, 0.8, 1)
    pictures = [
        pipe("a fox on a yellow background", seed=1, variation_seed=5, variation_strength=share).images[0]
        for share in shares
    ]
    return labelled(pictures, [f"variation {share:g}" for share in shares], 6)


SHEETS: dict[str, Callable[[Pipeline], Image.Image]] = {
    "things": things,
    "styles": styles,
    "seeds": seeds,
    "samplers": samplers,
    "guidance": guidance,
    "strengths": strengths,
    "inpainting": inpainting,
    "outpainting": outpainting,
    "variations": variations,
}


def main(names: Sequence[str]) -> None:
    """Make the named sheets, or all."""
    unknown = set(names) - set(SHEETS)
    if unknown:
        raise SystemExit(f"no picture {sorted(unknown)[0]!r}; known: {', '.join(SHEETS)}")
    HOME.mkdir(parents=True, exist_ok=True)
    pipe = sfumato.load(device="cpu", precision="float32")
    for name in names or SHEETS:
        path = HOME / f"{name}.jpg"
        SHEETS[name](pipe).save(path, quality=QUALITY, optimize=True)
        print(f"{path} {path.stat().st_size // 1024} KB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
