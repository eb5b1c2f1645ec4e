"""Repainting parts of pictures with models that were not made for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import sfumato
from sfumato.cond import Cond
from sfumato.diffusion.guidance import Plain
from sfumato.diffusion.keep import Keep
from sfumato.diffusion.path import add_noise
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.images import read_recipe, save
from sfumato.pipelines import masks
from sfumato.pipelines.pipeline import Pipeline
from sfumato.pipelines.request import parse

PROMPT = "a red apple on a blue background"
Make = Callable[[str], Pipeline]


def drawn(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def box_mask(size: tuple[int, int], box: tuple[int, int, int, int], level: int = 255) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(level, box)
    return mask


def levels(image: Any) -> np.ndarray:
    return np.asarray(image).astype(int)


def repainted(pipe: Pipeline, **fields: Any) -> Image.Image:
    (image,) = pipe(PROMPT, **({"seed": 5, "num_inference_steps": 4} | fields)).images
    assert isinstance(image, Image.Image)
    return image


@pytest.fixture(scope="module")
def mini() -> Pipeline:
    return sfumato.load("mini", precision="float32", device="cpu")


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_keeps_what_is_outside(pipe_for: Make, sampler: str) -> None:
    """Before the picture is pasted: the latents outside are those of the picture."""
    pipe, image = pipe_for("text"), drawn()
    with torch.no_grad():
        known = pipe.vae.to_latents(torch.from_numpy(levels(image)).permute(2, 0, 1)[None] / 127.5 - 1, seeded(5))
    out = pipe(
        PROMPT, image=image, mask=box_mask((32, 32), (16, 0, 32, 32)), seed=5, sampler=sampler, num_inference_steps=4,
        strength=0.8, output_type="latent",
    ).images  # fmt: skip
    assert isinstance(out, torch.Tensor) and bool(torch.isfinite(out).all())
    kept, changed = (float((out - known)[..., columns].abs().max()) for columns in (slice(0, 4), slice(4, 8)))
    print(f"{sampler}: outside {kept:.1e}, inside {changed:.2f}")
    assert kept < 1e-5 and changed > 0.05


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("task", ["text", "inpaint"])
@pytest.mark.parametrize(
    "fields",
    [{"mask_blur": 0}, {}, {"only_masked": True, "mask_padding": 4}, {"masked_content": "fill", "strength": 0.7},
     {"masked_content": "noise", "strength": 0.7}, {"masked_content": "nothing", "strength": 0.7}],
)  # fmt: skip
def test_pixels_outside_the_mask_come_back_exactly(pipe_for: Make, task: str, fields: dict[str, Any]) -> None:
    image, mask = drawn(56, 43), box_mask((56, 43), (20, 16, 30, 24))
    out = repainted(pipe_for(task), image=image, mask=mask, **fields)
    assert out.size == image.size, "also where the model cannot make that size"
    reach = 0 if fields.get("mask_blur") == 0 else 14
    free = np.asarray(box_mask((56, 43), (20 - reach, 16 - reach, 30 + reach, 24 + reach))) > 0
    difference = np.abs(levels(out) - levels(image)).max(axis=2)
    assert difference[~free].max() == 0 and (~free).sum() > 300
    assert np.abs(levels(out) - levels(image))[16:24, 20:30].mean() > 5


def test_the_built_in_model_repaints_a_part(mini: Pipeline) -> None:
    image = repainted(mini, num_inference_steps=6)
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).ellipse((24, 24, 104, 104), fill=255)
    fields = {"image": image, "mask": mask, "seed": 5, "num_inference_steps": 6, "mask_blur": 0}
    (out,) = mini("a green frog on a blue background", **fields).images
    kept = np.asarray(mask) == 0
    assert levels(out)[kept].tobytes() == levels(image)[kept].tobytes()
    centre = levels(out)[48:80, 48:80].mean(axis=(0, 1))
    assert centre[1] > centre[0] + 30, f"green, not {centre}"


def test_the_built_in_model_paints_on(mini: Pipeline) -> None:
    image = repainted(mini, num_inference_steps=6)
    (out,) = mini(PROMPT, image=image, outpaint=(32, 16, 0, 8), seed=5, num_inference_steps=4, mask_blur=0).images
    assert out.size == (128 + 48, 128 + 8)
    assert levels(out)[:128, 32:160].tobytes() == levels(image).tobytes()
    blue = levels(out)[:, :32].mean(axis=(0, 1))
    assert blue[2] > blue[0] + 40, f"the background goes on, not {blue}"
    assert parse(outpaint="32,16,0,8").outpaint == (32, 16, 0, 8) and parse(outpaint=8).outpaint == (8,) * 4


def test_one_picture_and_the_same_among_four(mini: Pipeline) -> None:
    shared = Pipeline(mini, None, batch=4)
    seen: list[torch.Tensor] = []
    hook = mini.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    fields = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "pt"}
    four = shared(PROMPT, seed=3, num_images_per_prompt=4, **fields).images
    first = seen[0]
    seen.clear()
    alone = mini(PROMPT, seed=5, **fields).images
    hook.remove()
    assert torch.equal(seen[0][0], first[4]), "the same noise bit for bit"
    psnr = -10 * float(torch.log10(((four[2] - alone[0]) ** 2).mean() + 1e-20))  # type: ignore[index]
    print(f"alone and among four: {psnr:.1f} dB")
    assert psnr >= 50


def test_soft_masks_give_each_pixel_its_share_of_the_way(pipe_for: Make) -> None:
    pipe = pipe_for("text")
    grid = pipe.scheduler.plan(10, "euler").grid
    z, eps = torch.randn((2, 1, 4, 8, 8), generator=seeded(0))
    strength = torch.tensor([0.0, 0.3, 0.5, 1.0]).repeat(2)[None, None, None].expand(1, 1, 8, 8)
    keep = Keep(Plain(Cond()), z, eps, strength, grid)
    for i, point in enumerate(grid[:-1]):
        free = keep.free(point)[0, 0, 0, :4].tolist()
        assert free == [False, i >= 7, i >= 5, True], i
        (query,) = keep.ask(torch.zeros_like(z), point)
        assert torch.equal(query.x[..., 0], add_noise(z, eps, point)[..., 0]) and not query.x[..., 3].any()
    assert keep.combine(z, grid[0], [z + 1]).sub(z)[0, 0, 0, :4].tolist() == [0, 0, 0, 1]


def test_soft_masks_in_pictures(pipe_for: Make) -> None:
    pipe, image = pipe_for("text"), drawn()
    change = []
    for level in (40, 120, 255):
        mask = box_mask((32, 32), (0, 0, 32, 32), level)
        out = repainted(pipe, image=image, mask=mask, soft_mask=True, mask_blur=0, num_inference_steps=10)
        change.append(np.abs(levels(out) - levels(image)).mean())
    assert 0 < change[0] < min(change[1:]) and change[1] != change[2], change
    hard = repainted(pipe, image=image, mask=mask, mask_blur=0, num_inference_steps=10)
    assert hard.tobytes() == out.tobytes(), "white is white"


def test_a_frame_of_a_part_keeps_proportions() -> None:
    assert masks.around((20, 24, 52, 56), (64, 72), (32, 32), 4) == (16, 20, 56, 60)
    assert masks.around((0, 0, 8, 4), (64, 16), (32, 32), 0) == (0, 0, 8, 8)
    assert masks.around((0, 0, 60, 4), (64, 16), (32, 32), 0) == (0, 0, 60, 16), "as far as the picture allows"
    image = drawn(60, 16)
    boxed = masks.letterbox(image, (32, 32))
    left, top, right, bottom = masks.placed((60, 16), (32, 32))
    assert boxed.size == (32, 32) and (left, right, bottom - top) == (0, 32, 8)
    assert np.array_equal(np.asarray(boxed)[0], np.asarray(boxed)[top]), "edges go on"


def test_filling_takes_the_colours_around() -> None:
    image = Image.new("RGB", (40, 30), (200, 20, 20))
    image.paste((20, 20, 200), (20, 0, 40, 30))
    mask = box_mask((40, 30), (4, 8, 36, 22))
    image.paste((0, 255, 0), (4, 8, 36, 22))
    filled = levels(masks.from_around(image, mask))
    assert filled[..., 1].max() < 40, "nothing green is left"
    assert filled[15, 6, 0] > 140 and filled[15, 34, 2] > 140
    untouched = np.asarray(mask) == 0
    assert np.array_equal(filled[untouched], levels(image)[untouched])


def test_recipes_of_repainted_pictures(pipe_for: Make, tmp_path: Path) -> None:
    pipe = pipe_for("text")
    drawn().save(tmp_path / "image.png")
    box_mask((32, 32), (8, 8, 20, 20)).save(tmp_path / "mask.png")
    fields = {"image": tmp_path / "image.png", "mask": tmp_path / "mask.png", "outpaint": (4, 0, 0, 8)}
    output = pipe(PROMPT, **fields, soft_mask=True, seed=3, num_inference_steps=2)
    (request,) = output.requests
    assert (request.strength, request.mask_blur, request.mask_padding, request.width) == (1.0, 4.0, None, 36)
    save(output.images[0], tmp_path / "made.png", request)
    recipe = read_recipe(tmp_path / "made.png")
    assert recipe == request
    assert pipe.generate(recipe).images[0].tobytes() == output.images[0].tobytes()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask": Image.new("L", (32, 32))}, "the mask is black everywhere; what is darker than half"),
        ({"mask": box_mask((32, 32), (0, 0, 9, 9), 90)}, "the mask is black everywhere; what is darker than half"),
        ({"mask": Image.new("L", (31, 32), 255)}, "the mask has 31x32 pixels and the image 32x32"),
        ({"mask": Image.new("L", (0, 32))}, "mask has 0x32 pixels, which is nothing; give a picture"),
        ({"mask_blur": 4}, "mask_blur = 4 is about repainting a part of an image; give mask or outpaint as well"),
        ({"mask": Image.new("L", (32, 32), 255), "mask_padding": 4}, "mask_padding = 4 .* give only_masked as well"),
        ({"mask": Image.new("L", (32, 32), 255), "mask_blur": -1}, "mask_blur = -1: .*greater than or equal to 0"),
        ({"mask": Image.new("L", (32, 32), 255), "masked_content": "fil"}, "'fil'; did you mean 'fill'. known: orig"),
        ({"outpaint": (1, 2)}, "outpaint = 1,2; give one number of pixels, or four for left, right, top and bottom"),
        ({"outpaint": "a"}, "outpaint = 'a'; give one number of pixels, or four"),
        ({"outpaint": 5000}, "outpaint = 5000,5000,5000,5000; .* from 0 to 4096"),
        ({"outpaint": 2100}, "the image of 4232x4232 pixels makes a width of 4232, which is to be 8 to 4096"),
        ({"outpaint": 8, "hires_scale": 2}, "hires_scale enlarges the whole picture, outpaint repaints a part"),
        ({"image": Image.new("RGB", (0, 0))}, "image has 0x0 pixels, which is nothing; give a picture"),
        ({"image": None, "outpaint": 8}, "outpaint = .* says how far an image grows; give an image as well"),
    ],
)
def test_what_cannot_be_repainted_is_said(pipe_for: Make, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        repainted(pipe_for("text"), **({"image": drawn()} | fields))
    assert "\n" not in str(caught.value)
