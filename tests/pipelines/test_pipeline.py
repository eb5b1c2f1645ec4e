from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.diffusion.named import EulerDiscreteScheduler
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.pipelines.making import companies
from sfumato.pipelines.pipeline import Pipeline, Progress
from sfumato.pipelines.request import Request, parse
from sfumato.runtime import as_it_is, choose
from sfumato.weights.folder import Components, load_folder, save_folder

PROMPT = "a red apple on a blue background"


def tensor(pipe: Pipeline, requests: Request | list[Request]) -> torch.Tensor:
    images = pipe.generate(requests, output_type="pt").images
    assert isinstance(images, torch.Tensor)
    return images


def request(**fields: object) -> Request:
    return parse(**({"prompt": PROMPT, "seed": 5, "num_inference_steps": 4} | fields))


def mixed() -> list[Request]:
    """Requests that differ in everything that can differ."""
    return [
        request(num_images=3),
        request(prompt="two green frogs", sampler="heun", guidance_scale=1.0),
        request(sampler="euler_a", num_inference_steps=6, negative_prompt="a cat"),
        request(width=40, height=24, spacing="karras"),
    ]


def test_a_picture_is_the_same_alone_and_among_others(tiny_pipe: Pipeline) -> None:
    """To 50 dB by default; to the last bit at its place among as many, whatever the others are."""
    singles = tiny_pipe.resolve(mixed())
    assert [r.seed for r in singles] == [5, 6, 7, 5, 5, 5]
    assert companies(tiny_pipe, singles) == [(0, 3), (1, 3), (2, 3), (0, 1), (0, 1), (0, 1)]
    together = tiny_pipe.generate(mixed()).images
    for i, single in enumerate(singles):
        (alone,) = tiny_pipe.generate(single).images
        if i < 3:
            assert psnr(alone, together[i]) >= 50, f"picture {i}"
            again = tiny_pipe.generate([single] * 3).images[i]
            assert again.tobytes() == together[i].tobytes(), f"picture {i}"
        else:
            assert alone.tobytes() == together[i].tobytes(), f"picture {i}"


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Decibels between two pictures."""
    square = float(((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2).mean())
    return float("inf") if square == 0 else 10 * math.log10(255**2 / square)


def test_advancing_pictures_together_changes_only_the_rounding(tiny_folder: Path, tiny_pipe: Pipeline) -> None:
    shared = Pipeline(load_folder(tiny_folder), choose("cpu", "float32"), batch=8)
    calls = []
    shared.unet.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    same_size = mixed()[:3]
    difference = float((tensor(shared, same_size) - tensor(tiny_pipe, same_size)).abs().max())
    assert difference < 1e-4, difference
    # Heun's 7 evaluations are the most; rows of 3 guided, 1 plain and 1 guided picture share the first.
    assert len(calls) == 7 and calls[0] == 9


def test_a_recipe_makes_the_picture_again(tiny_pipe: Pipeline) -> None:
    output = tiny_pipe(PROMPT, num_images_per_prompt=2, num_inference_steps=3)
    again = tiny_pipe.generate(output.requests).images
    assert again[1].tobytes() == output.images[1].tobytes()
    assert psnr(tiny_pipe.generate(output.requests[1]).images[0], output.images[1]) >= 50
    assert output.requests[0].seed != tiny_pipe(PROMPT, num_inference_steps=1).requests[0].seed, "random seeds"


def test_seeds_and_prompts_matter(tiny_pipe: Pipeline) -> None:
    images = tensor(tiny_pipe, [request(), request(seed=6), request(prompt="a cat left of a red car")])
    assert float((images[0] - images[1]).abs().max()) > 0.01
    assert float((images[0] - images[2]).abs().max()) > 1e-4


def test_the_size_is_the_request_s(tiny_pipe: Pipeline) -> None:
    (image,) = tiny_pipe(PROMPT, width=40, height=24, num_inference_steps=1).images
    assert image.size == (40, 24) and image.mode == "RGB"
    latent = tiny_pipe(PROMPT, width=40, height=24, num_inference_steps=1, output_type="latent").images
    assert isinstance(latent, torch.Tensor) and latent.shape == (1, 4, 6, 10)


def test_lists_of_prompts_keep_their_order(tiny_pipe: Pipeline) -> None:
    output = tiny_pipe([PROMPT, "two green frogs"], seed=3, num_inference_steps=2, num_images_per_prompt=2)
    assert [(r.prompt, r.seed) for r in output.requests] == [
        (PROMPT, 3), (PROMPT, 4), ("two green frogs", 3), ("two green frogs", 4)
    ]  # fmt: skip


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_gives_a_finite_picture(tiny_pipe: Pipeline, sampler: str) -> None:
    images = tensor(tiny_pipe, request(sampler=sampler))
    assert images.shape == (1, 3, 32, 32) and bool(torch.isfinite(images).all())


def test_progress_and_cancelling(tiny_pipe: Pipeline) -> None:
    seen: list[tuple[int, int, int]] = []

    def callback(step: Progress) -> bool:
        seen.append((step.image, step.done, step.total))
        assert step.x0.shape == (1, 4, 8, 8)
        return not (step.image == 1 and step.done == 2)

    output = tiny_pipe(PROMPT, seed=5, num_inference_steps=3, num_images_per_prompt=3, callback=callback)
    assert [i for i, _, _ in seen] == [0, 1, 2, 0, 1, 2, 0, 2] and seen[-2] == (0, 3, 3)
    assert [r.seed for r in output.requests] == [5, 7] and len(output.images) == 2


def test_texts_are_read_once(tiny_pipe: Pipeline) -> None:
    calls = []
    tiny_pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    tiny_pipe([PROMPT, "two green frogs", PROMPT], num_images_per_prompt=3, num_inference_steps=1)
    assert len(calls) == 3, "two prompts and the empty negative one"


def test_a_new_scheduler_brings_its_sampler(tiny_pipe: Pipeline) -> None:
    tiny_pipe.scheduler = EulerDiscreteScheduler.from_config(tiny_pipe.scheduler.config)  # type: ignore[attr-defined]
    output = tiny_pipe(PROMPT, num_inference_steps=2)
    assert output.requests[0].sampler == "euler"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 35}, "width = 35 is not a multiple of 4; the nearest that is: 36"),
        ({"height": 4096 - 1}, "height = 4095 is not a multiple of 4; the nearest that is: 4096"),
        ({"eta": 0.5}, "sampler 'dpmpp_2m' takes no eta; these do: ddim"),
    ],
)
def test_what_the_model_cannot_do_is_refused(tiny_pipe: Pipeline, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_pipe.generate(request(**fields))


def test_wrong_calls_are_refused(tiny_pipe: Pipeline, tiny_parts: Components) -> None:
    with pytest.raises(ValueError, match="unknown output_type 'jpg'; known: pil, pt, latent"):
        tiny_pipe(PROMPT, output_type="jpg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no prompt was given"):
        tiny_pipe([])
    with pytest.raises(ValueError, match=r"noise of shape \(1, 4, 9, 9\) .* needs \(1, 4, 8, 8\)"):
        tiny_pipe.generate(request(), noise=torch.zeros(1, 4, 9, 9))
    with pytest.raises(ValueError, match="batch = 0"):
        Pipeline(tiny_parts, batch=0)


def test_public_names(tiny_folder: Path) -> None:
    for name in sfumato.__all__:
        assert getattr(sfumato, name) is not None
    assert sfumato.StableDiffusionPipeline is not sfumato.Pipeline
    pipe = sfumato.load(tiny_folder, precision="bf16", device="cpu")
    assert pipe.runtime.dtype == torch.bfloat16 and next(pipe.unet.parameters()).dtype == torch.bfloat16
    (image,) = pipe(PROMPT, seed=1, num_inference_steps=2).images
    assert isinstance(image, Image.Image)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sfumato.nothing


def test_runtime_choices() -> None:
    assert choose("cpu", "fp16").dtype == torch.float16
    assert choose("cpu").reason
    assert as_it_is(torch.zeros(1, dtype=torch.float64)).precision == "float64"
    with pytest.raises(ValueError, match="unknown precision 'int8'; known: float32"):
        choose("cpu", "int8")
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        choose("gpu")


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_weights_that_are_not_finite_are_named(tiny_parts: Components, part: str, tmp_path: Path) -> None:
    """Mapped weights are not read for a look at opening; what the networks say is looked at instead."""
    network = getattr(tiny_parts, part)
    name, weight = [(n, p) for n, p in network.named_parameters() if p.ndim == 1][-1]
    with torch.no_grad():
        weight[0] = float("nan")
    save_folder(tiny_parts, tmp_path)
    pipe = Pipeline.from_pretrained(tmp_path, "float32", "cpu")
    with pytest.raises(ValueError, match=f"1 with NaN or infinite numbers: {name}"):
        pipe("a red apple", num_inference_steps=2)
    with pytest.raises(ValueError, match=f"1 with NaN or infinite numbers: {name}"):
        Pipeline.from_pretrained(tmp_path, "bfloat16", "cpu")


def test_an_overflow_blames_the_precision(tiny_parts: Components) -> None:
    with torch.no_grad():
        tiny_parts.unet.conv_out.weight.fill_(1e30)
        tiny_parts.unet.conv_out.bias.fill_(3e38)
    pipe = Pipeline(tiny_parts, choose("cpu", "float32"))
    with pytest.raises(ValueError, match="the U-Net gave NaN or infinite numbers in float32"):
        pipe("a red apple", num_inference_steps=2)
