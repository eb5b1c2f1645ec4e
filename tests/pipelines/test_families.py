"""One request on every family of models: the same words, picture, seed, sampler and size, whatever the network is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import sfumato
from sfumato.images import read_recipe, save, to_pil, to_tensor
from sfumato.pipelines.pipeline import Pipeline
from sfumato.pipelines.request import Request, parse
from sfumato.weights.folder import save_folder
from sfumato.weights.parts import Components

from ..conftest import tiny_components
from ..models.parity import scramble
from ..tiny_sd3 import tiny_sd3
from ..tiny_xl import tiny_xl
from .test_tasks_parity import drawn, masked

SIDE = 32
FAMILIES: Mapping[str, Callable[[], Components] | None] = {
    "sd15": tiny_components,
    "sdxl": tiny_xl,
    "sd3": tiny_sd3,
    "built-in": None,
}
TASKS: Mapping[str, tuple[str, ...]] = {
    "text to image": (),
    "image to image": ("image", "strength"),
    "inpainting": ("image", "mask", "strength", "mask_blur"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A pipeline of each family, opened as its users open it."""
    make, source = FAMILIES[request.param], "mini"
    if make is not None:
        parts = make()
        for seed, part in enumerate((parts.denoiser, *parts.towers.present)):
            scramble(part, seed)  # so that the words matter
        source = str(tmp_path_factory.mktemp(request.param) / "model")
        save_folder(parts, source)
    return sfumato.load(source, precision="float32", device="cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tasks are given besides words, in files, so that recipes can name them."""
    folder = tmp_path_factory.mktemp("pictures")
    drawn(0).save(folder / "image.png")
    masked().save(folder / "mask.png")
    return {"image": folder / "image.png", "mask": folder / "mask.png", "strength": 0.75, "mask_blur": 0}


def wish(task: str, pictures: Mapping[str, Any], prompt: str = "a red apple on a blue background") -> Request:
    return parse(
        prompt=prompt, negative_prompt="two green frogs", seed=7, num_inference_steps=4, guidance_scale=4.0,
        sampler="euler", width=SIDE, height=SIDE, **{name: pictures[name] for name in TASKS[task]},
    )  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_the_same_request(pipe: Pipeline, task: str, pictures: dict[str, Any], tmp_path: Path) -> None:
    made = pipe.generate(wish(task, pictures), output_type="pt")
    first = made.images
    assert isinstance(first, torch.Tensor)
    assert first.shape == (1, 3, SIDE, SIDE) and bool(first.isfinite().all()) and float(first.std()) > 0.01
    other = pipe.generate(wish(task, pictures, "a cat left of a red car"), output_type="pt").images
    difference = float((other - first).abs().max()) * 255
    print(f"{pipe.preset.name}, {task}: another prompt changes {difference:.0f} of 255")
    assert difference > 2
    if task == "inpainting":
        known = slice(None, SIDE // 2)  # what is dark in the mask
        assert torch.equal(to_tensor(to_pil(first * 2 - 1))[..., known], to_tensor([drawn(0)])[..., known])
    path = tmp_path / "picture.png"
    save(to_pil(first * 2 - 1)[0], path, made.requests[0])
    recipe = read_recipe(path)
    assert recipe == made.requests[0]
    afresh = sfumato.load(recipe.model, precision="float32", device="cpu")
    assert torch.equal(afresh.generate(recipe, output_type="pt").images, first)
