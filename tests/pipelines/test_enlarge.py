"""Large pictures, variations, prompt matrices, and what happens when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sfumato.cond import Cond
from sfumato.models.autoencoder import AutoencoderKL
from sfumato.models.depth import DepthEstimator
from sfumato.models.dpt import DPTConfig
from sfumato.pipelines.enlarge import Windows, slerp
from sfumato.pipelines.inputs import open_picture
from sfumato.pipelines.matrix import columns_of, prompts_of
from sfumato.pipelines.memory import RowByRow
from sfumato.pipelines.pipeline import Pipeline
from sfumato.pipelines.request import parse

PROMPT = "a red apple on a blue background"
Make = Callable[[str], Pipeline]


def made(pipe: Pipeline, prompt: str = PROMPT, **fields: Any) -> Tensor:
    images = pipe(prompt, **({"seed": 5, "num_inference_steps": 3, "output_type": "pt"} | fields)).images
    assert isinstance(images, Tensor)
    return images


def drawn(width: int = 32, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 20), (21, 13), (6, 30)])
def test_windows_average_to_the_whole(height: int, width: int) -> None:
    """A network that looks at single pixels says the same in windows; each window is small."""
    sizes = []

    def net(x: Tensor, t: Tensor, cond: Cond, perturb: str | None = None) -> Tensor:
        sizes.append(tuple(x.shape[2:]))
        assert cond.concat is not None and perturb == "some"
        return x * t.view(-1, 1, 1, 1) + cond.concat

    x, concat = torch.randn((2, 2, 4, height, width), generator=torch.Generator().manual_seed(0))
    t, cond = torch.tensor([3.0, 5.0]), Cond(concat=concat)
    out = Windows(net, 8)(x, t, cond, "some")
    assert difference(out, net(x, t, cond, "some")) < 1e-5
    assert max(max(size) for size in sizes[:-1]) <= 8 and len(sizes[:-1]) >= (max(height, width) > 8) * 3


@pytest.mark.parametrize(
    ("task", "fields"), [("text", {"width": 96, "height": 40}), ("upscale", {"image": drawn(24, 10)})]
)
def test_large_pictures_in_windows(pipe_for: Make, task: str, fields: dict[str, Any]) -> None:
    pipe = pipe_for(task)
    seen: list[int] = []
    pipe.unet.register_forward_hook(lambda module, args, out: seen.append(max(args[0].shape[2:])))
    whole = made(pipe, **fields)
    tiled = made(pipe, **fields, tile=32)
    assert max(seen) == 24 and seen[-1] == 8 and tiled.shape == whole.shape == (1, 3, 40, 96)
    assert difference(tiled, whole) > 1e-4
    assert isinstance(pipe.vae, AutoencoderKL) and pipe.vae.tile is None, "as it was"
    small = {"width": 32, "height": 32} if task == "text" else {"image": drawn(8, 8)}
    assert torch.equal(made(pipe, **small, tile=32), made(pipe, **small)), "nothing to cut"


@pytest.mark.parametrize(("upscaler", "strength"), [("latent", 0.7), ("lanczos", 0.4)])
def test_high_resolution_in_two_goes(pipe_for: Make, upscaler: str, strength: float) -> None:
    pipe, seen = pipe_for("text"), []

    def report(step: Any) -> None:
        seen.append((step.done, step.total, step.x0.shape[3]))

    fields = {"hires_scale": 1.5, "hires_upscaler": upscaler, "num_inference_steps": 10}
    output = pipe(PROMPT, seed=5, callback=report, **fields)
    again = int(10 * strength)
    assert seen == [(i + 1, 10 + again, 8 if i < 10 else 12) for i in range(10 + again)]
    (image,), (request,) = output.images, output.requests
    assert image.size == (48, 48) and request.hires_strength == strength and (request.width, request.seed) == (32, 5)
    assert pipe.generate(request).images[0].tobytes() == image.tobytes()  # type: ignore[union-attr]
    small = made(pipe, num_inference_steps=10)
    large = torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1)[None].float()
    shrunk = torch.nn.functional.interpolate(large, size=32, mode="area")
    assert difference(shrunk, small) < difference(shrunk, made(pipe, seed=6, num_inference_steps=10)) or strength > 0.5


def test_high_resolution_among_others(pipe_for: Make, parts_for: Callable[[str], Any]) -> None:
    shared = Pipeline(pipe_for("text"), None, batch=4)
    requests = [parse(prompt=PROMPT, seed=i, num_inference_steps=4, hires_scale=s) for i, s in enumerate((2, None, 2))]
    together = shared.generate(requests).images
    assert [image.size for image in together] == [(64, 64), (32, 32), (64, 64)]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"pictures of the sizes .* are no tensor; take output_type='pil'"):
        shared.generate(requests, output_type="pt")


def test_variations_lie_on_the_arc_between_two_seeds(pipe_for: Make) -> None:
    low, high = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    assert difference(slerp(0.0, low, high), low) < 1e-5 and difference(slerp(1.0, low, high), high) < 1e-5
    middle = slerp(0.5, low, high)
    # A1111's formula, written out for one column of one channel.
    a, b = low[1, :, 2], high[1, :, 2]
    omega = torch.acos((a / a.norm() * b / b.norm()).sum())
    assert difference(middle[1, :, 2], (torch.sin(omega / 2) / torch.sin(omega)) * (a + b)) < 1e-5
    assert difference(slerp(0.3, low, low), low) < 1e-6, "no arc to go along"

    pipe = pipe_for("text")
    first, second = made(pipe), made(pipe, seed=9)
    assert torch.equal(made(pipe, variation_seed=9, variation_strength=0), first)
    assert difference(made(pipe, variation_seed=9, variation_strength=1), second) < 1e-4
    near, far = (made(pipe, variation_seed=9, variation_strength=s) for s in (0.1, 0.6))
    assert 0 < difference(near, first) < difference(far, first)
    output = pipe(PROMPT, seed=5, variation_strength=0.1, num_images_per_prompt=2, num_inference_steps=1)
    one, two = output.requests
    assert (one.seed, two.seed) == (5, 5) and two.variation_seed == one.variation_seed + 1  # type: ignore[operator]
    with pytest.raises(ValueError, match="variation_seed = 9 is the seed of a variation; give variation_strength"):
        made(pipe, variation_seed=9)


def test_prompt_matrices(pipe_for: Make) -> None:
    assert prompts_of("a cat| red |in snow") == ["a cat", "a cat, red", "a cat, in snow", "a cat, red, in snow"]
    assert prompts_of("a [red|blue] cat") == ["a [red|blue] cat"]
    assert (columns_of("a"), columns_of("a|b"), columns_of("a|b|c"), columns_of("a|b|c|d")) == (1, 2, 2, 4)
    with pytest.raises(ValueError, match="9 optional parts, which makes 512 prompts; give at most 8"):
        prompts_of("a|" + "|".join("bcdefghij"))
    pipe = pipe_for("text")
    output = pipe("a cat|red", prompt_matrix=True, seed=3, num_images_per_prompt=2, num_inference_steps=1)
    told = [(r.prompt, r.seed, r.prompt_matrix) for r in output.requests]
    assert told == [(p, s, False) for p in ("a cat", "a cat, red") for s in (3, 4)]


def test_depth_is_estimated_where_the_model_can(pipe_for: Make) -> None:
    pipe = pipe_for("depth")
    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        backbone_out_indices=(0, 1, 2, 3), neck_hidden_sizes=(8, 8, 8, 8), fusion_hidden_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    pipe.depth_estimator = DepthEstimator(config).eval()
    image = drawn(40, 24)
    estimated = made(pipe, image=image)
    picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    depth = pipe.depth_estimator.predict(picture)[0, 0]
    given = made(pipe, image=image, depth=Image.fromarray(depth.numpy()))
    assert difference(estimated, given) < 1e-4
    assert difference(estimated, made(pipe, image=image, depth=drawn(40, 24))) > 1e-3


# What happens when memory runs out ----------------------------------------------------------------


def test_a_picture_too_large_for_the_autoencoder(
    pipe_for: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = pipe_for("text")
    fields = {"image": drawn(64, 64), "strength": 0.4}
    whole = made(pipe, **fields)
    for name, most in (("_decode_tile", 8), ("_encode_tile", 32)):
        real = getattr(AutoencoderKL, name)

        def limited(self: AutoencoderKL, x: Tensor, real: Any = real, most: int = most) -> Tensor:
            if max(x.shape[2:]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
            return real(self, x)

        monkeypatch.setattr(AutoencoderKL, name, limited)
    with caplog.at_level(logging.WARNING):
        tiled = made(pipe, **fields)
    assert [r.message for r in caplog.records] == [
        "out of memory: the autoencoder works in tiles of 32 pixels from now on"
    ]
    assert tiled.shape == whole.shape and float((tiled - whole).abs().mean()) < 0.1


def test_a_batch_too_large_for_the_network(pipe_for: Make, caplog: pytest.LogCaptureFixture) -> None:
    pipe, sizes = Pipeline(pipe_for("text"), None, batch=4), []
    fields = {"num_images_per_prompt": 3, "guidance_scale": 4.0}
    whole = made(pipe, **fields)

    def limited(module: Any, args: Any) -> None:
        sizes.append(len(args[0]))
        if len(args[0]) > 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    pipe.unet.register_forward_pre_hook(limited)
    with caplog.at_level(logging.WARNING):
        single = made(pipe, **fields)
    assert difference(single, whole) < 1e-4 and sizes == [6] + [1] * 18
    assert "6 pictures at once are too many; the network gets one from now on" in caplog.text
    assert len(caplog.records) == 1


def test_other_errors_and_hopeless_ones_come_through() -> None:
    for message, rows in (("shapes do not match", 2), ("out of memory", 1)):

        def net(x: Tensor, t: Tensor, cond: Cond, message: str = message) -> Tensor:
            raise RuntimeError(message)

        with pytest.raises(RuntimeError, match=message):
            RowByRow(net)(torch.zeros(rows, 4, 2, 2), torch.zeros(rows), Cond())


# Numbers and pictures that are refused ------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_inference_steps": -3}, "num_inference_steps = -3: .*greater than or equal to 1"),
        ({"strength": 1.2}, "strength = 1.2: .*less than or equal to 1"),
        (
            {"prompt": "word " * 10_000},
            "prompt has 10000 words and 50000 letters; at most 1500 words",
        ),
        ({"negative_prompt": "x" * 30_000}, "negative_prompt has 1 words and 30000 letters"),
        ({"width": "9" * 5000}, "width = '9999.{0,80}: "),
        ({"width": 33}, "width = 33 is not a multiple of 4; the nearest that is: 32"),
        ({"tile": 10}, "tile = 10; give a multiple of 4 from 32 on; the nearest is 32"),
        ({"tile": 45}, "tile = 45; give a multiple of 4 from 32 on; the nearest is 44"),
        ({"hires_scale": 1}, "hires_scale = 1: .*greater than 1"),
        (
            {"hires_scale": 4, "width": 2048},
            "hires_scale = 4 makes a width of 8192, at most 4096 are made; give at most 2",
        ),
        ({"hires_scale": 2, "hires_upscaler": "esrgan"}, "unknown hires_upscaler 'esrgan'; known: latent, lanczos"),
        ({"hires_scale": 2, "hires_strength": 0.1}, "strength = 0.1 of 3 steps leaves none; give at least 0.3333"),
        ({"hires_strength": 0.5}, "hires_strength = 0.5 is about enlarging; give hires_scale as well"),
        ({"variation_strength": 2}, "variation_strength = 2: .*less than or equal to 1"),
        ({"image": Image.new("1", (12_000, 12_000))}, "image has 12000x12000 pixels; at most 8192 a side are taken"),
    ],
)
def test_bad_numbers(pipe_for: Make, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        made(pipe_for("text"), **({"prompt": PROMPT} | fields))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_bad_files(tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.new("1", (12_000, 12_000)).save(large)
    (tmp_path / "empty.png").touch()
    whole = tmp_path / "whole.png"
    drawn(64, 64).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:5000])
    broken = bytearray(whole.read_bytes())
    broken[200:400] = bytes(200)
    (tmp_path / "broken.png").write_bytes(bytes(broken))
    for name, message in (
        (
            "large",
            r"image: .*large.png has 12000x12000 pixels; at most 8192 a side are taken, so make it smaller first",
        ),
        ("empty", r"image: .*empty.png is empty, 0 bytes long; give a picture"),
        ("cut", r"image: .*cut.png cannot be read: "),
        ("broken", r"image: .*broken.png cannot be read: "),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            open_picture(str(tmp_path / f"{name}.png"), "image")
        assert "\n" not in str(caught.value)
