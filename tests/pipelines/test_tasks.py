from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sfumato
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.images import read_recipe, save
from sfumato.pipelines import inputs
from sfumato.pipelines.pipeline import Pipeline
from sfumato.pipelines.request import Request, parse
from sfumato.pipelines.start import skipped
from sfumato.runtime import choose
from sfumato.weights.folder import Components

PROMPT, OTHER = "a red apple on a blue background", "two green frogs"
Make = Callable[[str], Pipeline]


def drawn(seed: int = 0, width: int = 32, height: int = 32) -> Image.Image:
    patches = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST)


def half_mask(width: int = 32, height: int = 32) -> Image.Image:
    return Image.fromarray(np.repeat([[0, 255]], height, axis=0).repeat(width // 2, axis=1).astype(np.uint8))


def relief() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).random((24, 20)).astype(np.float32))


GIVEN: dict[str, dict[str, Any]] = {
    "text": {"image": drawn()},
    "inpaint": {"image": drawn(), "mask": half_mask(), "strength": 0.7},
    "depth": {"image": drawn(), "depth": relief()},
    "instruct": {"image": drawn()},
    "upscale": {"image": drawn(0, 8, 8)},
    "ldm-text": {},
    "class": {},
    "unconditional": {},
}
PROMPTS = {"class": "3", "unconditional": ""}


def made(pipe: Pipeline, prompt: str = PROMPT, **fields: Any) -> torch.Tensor:
    images = pipe(prompt, **({"seed": 5, "num_inference_steps": 3, "output_type": "pt"} | fields)).images
    assert isinstance(images, torch.Tensor)
    return images


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("task", GIVEN)
def test_a_task_s_picture_is_the_same_among_others(
    pipe_for: Make, parts_for: Callable[[str], Components], task: str
) -> None:
    pipe = pipe_for(task)
    pipe.batch = 1  # with company, the rounding of matrix products is another
    fields = GIVEN[task] | {"num_images_per_prompt": 2}
    both = made(pipe, PROMPTS.get(task, PROMPT), **fields)
    assert difference(both[0], both[1]) > 1e-3, "seeds matter"
    shared = Pipeline(parts_for(task), choose("cpu", "float32"), batch=4)
    assert difference(made(shared, PROMPTS.get(task, PROMPT), **fields), both) < 1e-4
    again = made(pipe, PROMPTS.get(task, PROMPT), **GIVEN[task], seed=6)
    assert torch.equal(again[0], both[1])


@pytest.mark.parametrize("task", ["text", "inpaint", "upscale"])
def test_bfloat16_is_near_float32(pipe_for: Make, parts_for: Callable[[str], Components], task: str) -> None:
    fields = GIVEN[task] | {"num_inference_steps": 10, "guidance_scale": 4.0}
    exact = made(pipe_for(task), **fields)
    rough = made(Pipeline(parts_for(task), choose("cpu", "bfloat16")), **fields)
    psnr = -10 * float(torch.log10(torch.mean((exact - rough) ** 2)))
    print(f"{task}: bfloat16 at {psnr:.1f} dB of float32")
    assert 30 <= psnr < 100


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        ("text", {"depth": half_mask()}, "has no use for depth; of its kind it takes: .*image, mask, strength"),
        ("text", {"mask": half_mask()}, "mask = <picture in memory, .*> says where to repaint an image; give an image"),
        ("text", {"noise_level": 3}, "has no use for noise_level"),
        ("text", {"strength": 0.5}, "strength = 0.5 says how far to leave an image; give an image as well"),
        ("text", {"image": drawn(), "strength": 0.3}, "strength = 0.3 of 3 steps leaves none; give at least 0.3333"),
        ("text", {"prompt": " "}, "no prompt was given, or the prompt is blank; say what the picture shows"),
        ("text", {"image": "gone.png"}, "image: no picture gone.png"),
        ("text", {"image": __file__}, "image: .*test_tasks.py is not a picture"),
        ("text", {"image": drawn(0, 5000, 8)}, "the image of 5000x8 pixels makes a width of 5000"),
        ("text", {"clip_skip": 2}, "clip_skip 2 is out of range; this text encoder has 2 layers"),
        ("text", {"embeddings": ["gone.pt"]}, "no embedding 'gone.pt'"),
        ("text", {"prompt": "a <lora:gone:0.5>"}, "no lora 'gone'"),
        ("text", {"negative_prompt": "a <lora:some:1>"}, "negative_prompt names the adapter 'some'"),
        ("inpaint", {"image": drawn()}, "needs mask; give a picture"),
        ("inpaint", {}, "needs image and mask; give a picture"),
        ("inpaint", {"image": drawn(), "mask": half_mask(16)}, "the mask has 16x32 pixels and the image 32x32"),
        ("depth", {"image": drawn()}, "needs depth, as it came without an estimator of it; give a picture"),
        ("depth", {"image": drawn(), "depth": half_mask(), "mask": half_mask()}, "has no use for mask"),
        ("depth", {"image": drawn(), "depth": Image.new("L", (8, 8), 7)}, "depth is 7 everywhere"),
        ("instruct", {"image": drawn(), "strength": 0.5}, "has no use for strength; .*: .*image_guidance_scale"),
        ("upscale", {"image": drawn(), "noise_level": 50}, "noise_level = 50; this model knows 0 to 39"),
        ("ldm-text", {"prompt_rule": "comfy"}, "has no use for prompt_rule"),
        ("class", {"prompt": "cat"}, "'cat' is not a class of this model; give a number from 0 to 9"),
        ("class", {"prompt": ""}, "say the class as a number"),
        ("unconditional", {}, "has no use for prompt"),
        (
            "unconditional",
            {"prompt": "", "guidance_scale": 3.0},
            "guidance_scale = 3, but .* has no prompt; leave it out",
        ),
    ],
)
def test_what_a_model_cannot_do_is_said(pipe_for: Make, task: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        made(pipe_for(task), **({"prompt": PROMPT} | fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "image", "asked", "size"),
    [
        ("text", (35, 26), {}, (32, 24)),
        ("text", (35, 26), {"width": 16, "height": 40}, (16, 40)),
        ("text", (40, 20), {"width": 16}, (16, 8)),
        ("text", (40, 20), {"height": 40}, (80, 40)),
        ("upscale", (9, 5), {}, (36, 20)),
        ("upscale", (9, 5), {"width": 16, "height": 16}, (16, 16)),
    ],
)
def test_the_size_follows_the_image(
    pipe_for: Make, task: str, image: tuple[int, int], asked: dict[str, int], size: tuple[int, int]
) -> None:
    output = pipe_for(task)(PROMPT, image=drawn(0, *image), num_inference_steps=2, seed=1, **asked)
    assert output.images[0].size == size
    assert (output.requests[0].width, output.requests[0].height) == size


def test_strength_says_how_much_of_the_image_stays(pipe_for: Make) -> None:
    pipe = pipe_for("text")
    fields = {"image": drawn(), "num_inference_steps": 20, "output_type": "latent"}
    with torch.no_grad():
        z = pipe.vae.to_latents(inputs.picture(drawn(), 32, 32), torch.Generator().manual_seed(5))
    distances = [difference(made(pipe, strength=s, **fields), z) for s in (0.05, 0.5, 1.0)]
    assert distances == sorted(distances) and distances[0] < distances[2] / 2, distances
    assert [skipped(10, s) for s in (0.1, 0.55, 1.0)] == [9, 5, 0]


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_enters_its_grid_midway(pipe_for: Make, sampler: str) -> None:
    seen: list[tuple[int, int]] = []
    image = made(
        pipe_for("text"),
        image=drawn(),
        strength=0.5,
        sampler=sampler,
        num_inference_steps=6,
        callback=lambda step: seen.append((step.done, step.total)),
    )
    assert bool(torch.isfinite(image).all())
    assert seen[-1][0] == len(seen) >= 3
    if sampler in ("ddim", "euler", "dpmpp_2m", "plms"):
        assert seen[-1] == (3, 3), "half of the steps"


def test_the_mask_is_read_where_it_is_bright(pipe_for: Make) -> None:
    mask = inputs.repaint_mask(half_mask().convert("RGB"), 32, 32)
    assert mask.shape == (1, 1, 32, 32) and float(mask[..., :16].sum()) == 0 and bool((mask[..., 16:] == 1).all())
    edge = inputs.repaint_mask(Image.fromarray(np.array([[127, 128]], dtype=np.uint8)), 2, 1)
    assert edge.flatten().tolist() == [0.0, 1.0]


def test_depth_of_any_precision_is_the_same() -> None:
    levels = np.random.default_rng(0).integers(0, 200, (9, 7))
    maps = [Image.fromarray(levels.astype(np.uint8)), Image.fromarray((levels * 256).astype(np.uint16))]
    maps += [Image.fromarray(levels.astype(np.float32) / 50)]
    tensors = [inputs.depth_map(image, 8, 6) for image in maps]
    for tensor in tensors:
        assert tensor.shape == (1, 1, 6, 8) and difference(tensor, tensors[0]) < 1e-5
        assert float(tensor.min()) == -1 and abs(float(tensor.max()) - 1) < 1e-6


def test_a_picture_is_turned_as_its_file_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    drawn(0, 32, 16).save(tmp_path / "a.jpg", exif=exif)
    assert inputs.open_picture(str(tmp_path / "a.jpg"), "image").size == (16, 32)
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    drawn().save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    for name in ("cut.png", "half.png"):
        with pytest.raises(ValueError, match=f"image: .*{name} (is not a picture|cannot be read: )"):
            inputs.open_picture(str(tmp_path / name), "image")


def test_recipes_of_pictures_from_pictures(pipe_for: Make, tmp_path: Path) -> None:
    pipe = pipe_for("inpaint")
    drawn().save(tmp_path / "image.png")
    half_mask().save(tmp_path / "mask.png")
    paths = {"image": tmp_path / "image.png", "mask": tmp_path / "mask.png"}
    output = pipe(PROMPT, **paths, seed=3, num_inference_steps=2)
    save(output.images[0], tmp_path / "made.png", output.requests[0])
    recipe = read_recipe(tmp_path / "made.png")
    assert recipe == output.requests[0] and (recipe.image, recipe.strength) == (str(paths["image"]), 1.0)
    assert pipe.generate(recipe).images[0].tobytes() == output.images[0].tobytes()  # type: ignore[union-attr]

    output = pipe(PROMPT, image=drawn(), mask=half_mask(), seed=3, num_inference_steps=2)
    save(output.images[0], tmp_path / "memory.png", output.requests[0])
    with pytest.raises(ValueError, match=r"image was <picture in memory, 32x32 RGB, sha256 \w+> when .* as image"):
        pipe.generate(read_recipe(tmp_path / "memory.png"))
    given = read_recipe(tmp_path / "memory.png").model_copy(update=paths | {"image": drawn(), "mask": half_mask()})
    assert pipe.generate(given).images[0].tobytes() == output.images[0].tobytes()  # type: ignore[union-attr]


def test_prompts_change_along_the_way(pipe_for: Make) -> None:
    pipe = pipe_for("text")
    first, second = made(pipe, PROMPT), made(pipe, OTHER)
    assert torch.equal(made(pipe, f"[{PROMPT}:{OTHER}:1.0]"), first)
    assert torch.equal(made(pipe, f"[{PROMPT}:{OTHER}:0]"), second)
    changed = made(pipe, f"[{PROMPT}:{OTHER}:1]")
    assert min(difference(changed, first), difference(changed, second)) > 1e-4
    assert difference(made(pipe, f"{PROMPT} BREAK {OTHER}"), first) > 1e-4, "two chunks"


def test_weights_rules_and_clip_skip(pipe_for: Make) -> None:
    pipe = pipe_for("text")
    weighted = "a (red:1.6) apple on a blue background"
    images = [made(pipe, weighted, prompt_rule=rule) for rule in ("a1111", "comfy", "none")]
    images += [made(pipe), made(pipe, clip_skip=1)]
    for i, one in enumerate(images):
        assert all(difference(one, other) > 1e-5 for other in images[:i]), i
    assert torch.equal(made(pipe, weighted), images[0]) and torch.equal(made(pipe, prompt_rule="none"), images[3])


LORA = {
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": 32,
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": 32,
}


@pytest.fixture
def lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An adapter by name in the models folder, which changes both networks."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, width in LORA.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn((4, width), generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn((width, 4), generator=generator)
    (tmp_path / "Lora").mkdir()
    save_file(tensors, tmp_path / "Lora" / "smoke.safetensors")
    monkeypatch.setenv("SFUMATO_MODELS", str(tmp_path))
    return "smoke"


def test_an_adapter_named_in_a_prompt(pipe_for: Make, lora: str) -> None:
    pipe = pipe_for("text")
    weights = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    before = made(pipe)
    tagged = made(pipe, f"{PROMPT}<lora:{lora}:0.8>")
    assert difference(tagged, before) > 1e-3
    assert torch.equal(made(pipe), before), "nothing is left of it"
    assert all(torch.equal(value, weights[name]) for name, value in pipe.unet.state_dict().items())
    mixed = made(pipe, [PROMPT, f"{PROMPT}<lora:{lora}:0.8>", PROMPT])  # type: ignore[arg-type]
    assert torch.equal(mixed[0], before[0]) and torch.equal(mixed[1], tagged[0]) and torch.equal(mixed[2], before[0])
    shared = Pipeline(pipe, None, batch=4)  # type: ignore[arg-type]
    together = made(shared, [PROMPT, f"{PROMPT}<lora:{lora}:0.8>", PROMPT])  # type: ignore[arg-type]
    assert difference(together, mixed) < 1e-4


def test_an_adapter_s_two_weights(pipe_for: Make, lora: str) -> None:
    pipe = pipe_for("text")
    kinds = ("0.8", "te=0.8:unet=0", "te=0:unet=0.8", "0")
    both, text, unet, none = (made(pipe, f"{PROMPT}<lora:{lora}:{weight}>") for weight in kinds)
    assert torch.equal(none, made(pipe))
    assert min(difference(both, text), difference(both, unet), difference(text, unet)) > 1e-4


def test_a_stream_that_is_left_alone_takes_its_adapters_off(pipe_for: Make, lora: str) -> None:
    pipe = pipe_for("text")
    before = made(pipe)
    request = parse(prompt=f"{PROMPT}<lora:{lora}>", seed=1, num_images=3, num_inference_steps=1)
    stream = pipe.stream(request)
    next(stream)
    assert torch.equal(made(pipe), before), "another request in between"
    second = next(stream)[1]
    stream.close()
    assert torch.equal(made(pipe), before)
    assert second.tobytes() == pipe.generate(request).images[1].tobytes()  # type: ignore[union-attr]


def test_learned_words(pipe_for: Make, tmp_path: Path) -> None:
    pipe = pipe_for("text")
    file = tmp_path / "fog.safetensors"
    save_file({"emb_params": torch.randn((2, 32), generator=torch.Generator().manual_seed(0))}, file)
    before = made(pipe, "a fog")
    output = pipe("a fog", seed=5, num_inference_steps=3, embeddings=[str(file)], output_type="pt")
    assert difference(output.images, before) > 1e-4  # type: ignore[arg-type]
    assert torch.equal(made(pipe, "a fog"), before)
    pipe.load_textual_inversion(file)
    assert torch.equal(made(pipe, "a fog"), output.images)  # type: ignore[arg-type]
    recipe = pipe.resolve(Request(prompt="a fog"))[0]
    assert recipe.embeddings == (str(file),)
    with pytest.raises(FileNotFoundError, match="no embedding 'gone'"):
        pipe.load_textual_inversion("gone")


def test_recipes_name_what_a_model_was_opened_with(tiny_folder: Path, tmp_path: Path) -> None:
    options = {"vae": str(tiny_folder / "vae"), "prediction": "eps"}
    pipe = sfumato.load(tiny_folder, "float32", "cpu", **options)  # type: ignore[arg-type]
    assert pipe.scheduler.prediction == "epsilon"
    (request,) = pipe(PROMPT, num_inference_steps=1).requests
    assert (request.model, request.vae, request.base, request.prediction) == (
        str(tiny_folder), str(tiny_folder / "vae"), None, "eps"
    )  # fmt: skip
    with pytest.raises(FileNotFoundError, match="no file "):
        Pipeline.from_single_file(tiny_folder)


def test_networks_may_be_replaced(pipe_for: Make, parts_for: Callable[[str], Components], lora: str) -> None:
    pipe = pipe_for("text")
    tagged = f"{PROMPT}<lora:{lora}:0.5>"
    first = made(pipe, tagged)
    pipe.unet = parts_for("text").unet
    assert difference(made(pipe, tagged), first) < 1e-5  # the new one lies otherwise in memory
