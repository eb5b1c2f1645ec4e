"""The same folder, the same noise, the same picture as diffusers' StableDiffusionPipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.pipelines.pipeline import Pipeline
from sfumato.pipelines.request import Request

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
PROMPT, NEGATIVE = "a red apple on a blue background", "two green frogs"


@pytest.fixture(scope="module")
def peer(tiny_folder: Path) -> Any:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(tiny_folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("sampler", "name", "options"),
    [
        ("ddim", "DDIMScheduler", {}),
        ("euler", "EulerDiscreteScheduler", {}),
        ("heun", "HeunDiscreteScheduler", {}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_the_same_picture(
    tiny_pipe: Pipeline, peer: Any, sampler: str, name: str, options: dict[str, Any], scale: float
) -> None:
    import diffusers

    steps = 10  # a divisor of 1000: elsewhere diffusers' DDIM steps beside its own timesteps
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(7))
    request = Request(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=steps,
        guidance_scale=scale,
        sampler=sampler,
        spacing="karras" if options else None,
    )
    output = tiny_pipe.generate(request, noise=noise, output_type="pt")
    assert isinstance(output.images, torch.Tensor)
    original = {**tiny_pipe.scheduler.config}  # type: ignore[attr-defined]
    peer.scheduler = getattr(diffusers, name).from_config(original, **options)
    theirs = peer(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=steps,
        guidance_scale=scale,
        latents=noise.clone(),
        output_type="np",
        height=32,
        width=32,
    ).images
    difference = float(np.abs(output.images.permute(0, 2, 3, 1).numpy() - theirs).max()) * 255
    assert difference <= 2, f"{sampler}: {difference} of 255"


def test_a_folder_saved_by_diffusers_opens(peer: Any, tmp_path: Path, tiny_folder: Path, tiny_pipe: Pipeline) -> None:
    import diffusers

    original = {**tiny_pipe.scheduler.config}  # type: ignore[attr-defined]
    peer.scheduler = diffusers.DDIMScheduler.from_config(original)
    peer.save_pretrained(tmp_path / "theirs")
    pictures = [
        Pipeline.from_pretrained(folder, "float32", "cpu")(
            PROMPT, seed=1, num_inference_steps=3, output_type="pt"
        ).images
        for folder in (tiny_folder, tmp_path / "theirs")
    ]
    ours, theirs = pictures
    assert isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor)
    assert torch.equal(ours, theirs), float((ours - theirs).abs().max())
