"""The same folder, the same noise, the same picture as diffusers' StableDiffusionPipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.diffusion import SAMPLERS
from sfumato.pipelines.pipeline import Pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
PROMPT, NEGATIVE = "a red apple on a blue background", "two green frogs"


@pytest.fixture(scope="module")
def peer(tiny_folder: Path) -> Any:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(tiny_folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SDE = {"algorithm_type": "sde-dpmsolver++"}
PEERS: list[tuple[str, str, dict[str, Any]]] = [
    ("euler", "EulerDiscreteScheduler", {}),
    ("euler karras", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("euler_a", "EulerAncestralDiscreteScheduler", {}),
    ("heun", "HeunDiscreteScheduler", {}),
    ("dpm2", "KDPM2DiscreteScheduler", {}),
    ("dpm2_a", "KDPM2AncestralDiscreteScheduler", {}),
    ("lms", "LMSDiscreteScheduler", {}),
    ("plms", "PNDMScheduler", {"skip_prk_steps": True}),
    ("ddim", "DDIMScheduler", {}),
    ("ddpm", "DDPMScheduler", {}),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
    ("dpmpp_2m karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("dpmpp_2s", "DPMSolverSinglestepScheduler", {}),
    ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", SDE),
    ("dpmpp_2m_sde_heun", "DPMSolverMultistepScheduler", SDE | {"solver_type": "heun"}),
    ("unipc", "UniPCMultistepScheduler", {}),
    ("deis", "DEISMultistepScheduler", {}),
    ("lcm", "LCMScheduler", {}),
    ("tcd", "TCDScheduler", {}),
]
# Not here: dpmpp_sde needs a package there, ipndm has a path of its own there (both: diffusion/test_parity.py), and
# these are not there (diffusion/test_peers.py).
ELSEWHERE = {"dpmpp_sde", "ipndm", "dpmpp_2s_a", "dpmpp_3m_sde", "dpm_fast", "dpm_adaptive"}
ELSEWHERE |= {"restart", "er_sde", "res_multistep"}


@pytest.mark.parametrize(("sampler", "name", "options"), PEERS)
def test_the_same_picture(tiny_pipe: Pipeline, peer: Any, sampler: str, name: str, options: dict[str, Any]) -> None:
    """From one seed, without guidance and with it; prints a row of a table of differences in levels of 255."""
    import diffusers

    steps = 8  # a divisor of 1000: elsewhere diffusers' DDIM steps beside its own timesteps
    sampler, *spacing = sampler.split()
    original = {**tiny_pipe.scheduler.config}  # type: ignore[attr-defined]
    peer.scheduler = getattr(diffusers, name).from_config(original, **options)
    both = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": steps}
    # The class for dpmpp_2s has no option for the spacing that the folder wants, but takes timesteps.
    trailing = [1000 * i // steps - 1 for i in range(steps, 0, -1)] if sampler == "dpmpp_2s" else None
    differences = []
    for scale in (1.0, 5.0):
        ours = tiny_pipe(
            **both, guidance_scale=scale, seed=7, sampler=sampler, spacing=(*spacing, None)[0], output_type="pt"
        ).images
        theirs = peer(
            **both,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(7),
            eta=0.3 if sampler == "tcd" else 0.0,  # what ours takes unless it is told
            timesteps=trailing,
            output_type="np",
            height=32,
            width=32,
        ).images
        assert isinstance(ours, torch.Tensor) and float(ours.std()) > 0.01, "an empty picture proves nothing"
        differences.append(float(np.abs(ours.permute(0, 2, 3, 1).numpy() - theirs).max()) * 255)
    off, on = differences
    print(f"| {' '.join([sampler, *spacing])} | {name} {options or ''} | {off:.4f} | {on:.4f} |")
    assert max(differences) <= 2


def test_every_sampler_has_its_peer() -> None:
    """In the table above, or where it says."""
    assert {sampler.split()[0] for sampler, _, _ in PEERS} | ELSEWHERE == set(SAMPLERS)


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
