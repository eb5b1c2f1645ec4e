"""What people hand to the front doors by mistake: one line that names the value, what is allowed and the mend."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sfumato

SHORT: dict[str, Any] = {"prompt": "a red apple", "num_inference_steps": 2}
DRAWING = Image.effect_noise((32, 32), 90)


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> sfumato.StableDiffusionPipeline:
    """The door for text, on the tiny folder."""
    return sfumato.StableDiffusionPipeline.from_pretrained(str(tiny_folder))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": 3}, "prompt = 3; give a text, or a list of texts"),
        ({"negative_prompt": [None]}, r"negative_prompt = \[None\]; give a text, or a list of texts"),
        ({"num_inference_steps": -3}, "num_inference_steps = -3: input should be greater than or equal to 1"),
        ({"num_images_per_prompt": -1}, "num_images_per_prompt = -1; give 1 or more"),
        ({"height": 33}, "height = 33 is not a multiple of 4; the nearest that is: 32"),
        ({"guidance_scale": float("nan")}, "guidance_scale = nan; give a number up to 1000"),
        ({"guidance_rescale": 2}, "guidance_rescale = 2; give 0 to 1"),
        ({"eta": 5}, "eta = 5; give 0 to 1"),
        ({"generator": 3}, "generator = 3; give a torch.Generator, or a list of them"),
        ({"generator": []}, "generator is an empty list; give one generator, or as many as pictures"),
        ({"callback_on_step_end": 3}, "callback_on_step_end = 3; give a function"),
        ({"clip_skip": 9}, "clip_skip 9 is out of range; this text encoder has 2 layers: 0..1"),
    ],
)
def test_arguments(pipe: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        pipe(**SHORT | wrong)
    assert "\n" not in str(error.value)


def test_pictures(pipe: Any, tmp_path: Path) -> None:
    DRAWING.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:600])
    image, inpaint = sfumato.StableDiffusionImg2ImgPipeline, sfumato.StableDiffusionInpaintPipeline

    def cut() -> Image.Image:
        return Image.open(tmp_path / "cut.png")

    huge = Image.new("1", (12_000, 12_000))
    for door, pictures, message in (
        (image, {"image": DRAWING, "strength": 2}, "strength = 2: input should be less than or equal to 1"),
        (image, {"image": huge}, "image has 12000x12000 pixels; at most 8192 a side are taken, so make it smaller"),
        (image, {"image": Image.new("RGB", (0, 0))}, "image has 0x0 pixels, which is nothing; give a picture"),
        (image, {"image": cut()}, "image: .*cut.png cannot be read: image file is truncated"),
        (inpaint, {"image": DRAWING}, "needs a mask_image; give a picture that is white where to repaint"),
        (inpaint, {"image": DRAWING, "mask_image": cut()}, "mask_image: .*cut.png cannot be read"),
        (inpaint, {"image": DRAWING, "mask_image": huge}, "mask_image has 12000x12000 pixels"),
        (inpaint, {"image": cut(), "mask_image": DRAWING, "padding_mask_crop": 3}, "image: .*cut.png cannot be read"),
        (inpaint, {"image": DRAWING, "mask_image": DRAWING, "padding_mask_crop": 2.5}, "padding_mask_crop = 2.5; give"),
        (inpaint, {"image": DRAWING, "mask_image": DRAWING, "masked_image_latents": 3}, "are int; give a tensor"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            door.from_pipe(pipe)(**SHORT, **pictures)  # type: ignore[attr-defined]
        assert "\n" not in str(error.value)


def test_a_prompt_of_ten_thousand_words_is_cut_and_said_in_short(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), torch.no_grad():
        pipe(**SHORT | {"prompt": "word " * 10_000}, output_type="latent")
    (said,) = (record.getMessage() for record in caplog.records if "cut off" in record.getMessage())
    assert said.startswith("the prompt is longer than 16 tokens; cut off: ") and len(said) < 300
