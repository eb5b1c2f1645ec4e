"""The model inside the package: its size, its pictures beside diffusers', and its pictures as they were."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.images import read_recipe
from sfumato.pipelines.pipeline import Pipeline
from sfumato.pipelines.request import Request
from sfumato.presets import BUILT_IN

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
PROMPTS = (
    "a red apple on a blue background",
    "two green frogs, 3d style",
    "a cat left of a red car",
    "a castle on a purple background, flat style",
    "a small fish in the top left corner",
)
SAMPLERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}
GOLDEN = Path(__file__).parent / "data" / "golden"
MB = 1_000_000


@lru_cache(1)
def ours() -> Pipeline:
    return sfumato.load(precision="float32", device="cpu")


@lru_cache(1)
def theirs() -> Any:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        BUILT_IN["mini"], local_files_only=True, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_folder_keeps_its_size() -> None:
    sizes = {p.name: p.stat().st_size for p in BUILT_IN["mini"].rglob("*") if p.is_file()}
    print(f"{sum(sizes.values()) / MB:.1f} MB, largest file {max(sizes.values()) / MB:.1f} MB")
    assert sum(sizes.values()) <= 60 * MB and max(sizes.values()) <= 40 * MB
    assert "README.md" in sizes  # the model card


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_diffusers_makes_the_same_pictures(sampler: str) -> None:
    peer = theirs()
    peer.scheduler = SAMPLERS[sampler].from_config(peer.scheduler.config)
    for seed, prompt in enumerate(PROMPTS):
        noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(seed))
        request = Request(prompt=prompt, num_inference_steps=20, guidance_scale=5.0, sampler=sampler)
        mine = ours().generate(request, noise=noise, output_type="pt").images
        assert isinstance(mine, torch.Tensor)
        other = peer(prompt, num_inference_steps=20, guidance_scale=5.0, latents=noise, output_type="np").images
        difference = 255 * float(np.abs(mine.permute(0, 2, 3, 1).numpy() - other).max())
        print(f"{sampler}, {prompt!r}: largest difference {difference:.4f} of 255")
        assert difference <= 2


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.png")))
def test_pictures_are_as_they_were(name: str) -> None:
    """Stored pictures, each made from the recipe inside it. Other processors round otherwise, hence the tolerance."""
    stored = Image.open(GOLDEN / f"{name}.png")
    request = read_recipe(GOLDEN / f"{name}.png")
    made = ours().generate(request).images[0]
    difference = np.abs(np.asarray(made, dtype=int) - np.asarray(stored, dtype=int))
    print(f"{name}: largest difference {difference.max()}, mean {difference.mean():.4f} of 255")
    assert difference.mean() <= 0.5 and difference.max() <= 24


def test_there_are_stored_pictures() -> None:
    assert len(list(GOLDEN.glob("*.png"))) >= 4
