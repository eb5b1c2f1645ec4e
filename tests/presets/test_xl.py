"""Presets of Stable Diffusion XL, found by their own parts; see `test_alike` for those that look the same."""

from __future__ import annotations

from typing import Any

import pytest

from sfumato.diffusion.scheduler import Scheduler
from sfumato.presets import Kind, of_folder
from sfumato.presets.xl import SDXL, SDXL_HYPER, SDXL_INPAINT, SDXL_LCM, SDXL_REFINER, SDXL_TURBO, XL


@pytest.mark.parametrize("preset", XL, ids=lambda preset: preset.name)
def test_a_preset_is_found_by_its_own_parts(preset: Any) -> None:
    scheduler = Scheduler.from_config(preset.scheduler)
    found = of_folder(
        preset.pipeline,
        preset.denoiser,
        preset.vae,
        (preset.text, preset.text_2),
        scheduler.config,
        scheduler.spacing,
        Kind(preset.name),
    )
    assert found.name == preset.name
    assert found.texts == preset.texts and found.defaults()["sampler"] == preset.sampler


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, SDXL),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, SDXL),
        ({"timestep_spacing": "trailing", "prediction_type": "v_prediction"}, SDXL),
        ({"timestep_spacing": "trailing"}, SDXL),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, SDXL_TURBO),
        ({"_class_name": "LCMScheduler"}, SDXL_LCM),
        ({"_class_name": "TCDScheduler"}, SDXL_HYPER),
    ],
)
def test_what_a_scheduler_alone_says(changes: dict[str, Any], expected: Any) -> None:
    scheduler = Scheduler.from_config({**SDXL.scheduler, **changes})
    texts = SDXL.text, SDXL.text_2
    found = of_folder(SDXL.pipeline, SDXL.denoiser, SDXL.vae, texts, scheduler.config, scheduler.spacing)
    wanted = expected.num_inference_steps, expected.guidance_scale
    assert (found.num_inference_steps, found.guidance_scale) == wanted, found.name


def test_sizes_and_parts() -> None:
    assert (SDXL.width, SDXL.vae.scaling_factor, SDXL.vae.force_upcast) == (1024, 0.13025, True)
    assert SDXL_REFINER.texts == (SDXL.text_2,) and SDXL_INPAINT.denoiser.in_channels == 9
