"""Models of few steps: without guidance each step is one question, half the work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sfumato.diffusion.scheduler import Scheduler
from sfumato.pipelines.pipeline import Pipeline
from sfumato.presets.xl import SDXL, SDXL_HYPER, SDXL_LCM, SDXL_LIGHTNING, SDXL_TURBO
from sfumato.weights.parts import Components

from ..tiny_xl import tiny_xl

PROMPT = "a red car"


@pytest.fixture(scope="module")
def parts() -> Components:
    return tiny_xl()


@pytest.mark.parametrize(
    ("preset", "expected"),
    [(SDXL_TURBO, [1]), (SDXL_LIGHTNING, [1] * 4), (SDXL_LCM, [1] * 4), (SDXL_HYPER, [1] * 8), (SDXL, [2] * 3)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_rows_that_the_network_is_shown(parts: Components, rows: list[int], preset: Any, expected: list[int]) -> None:
    pipe = Pipeline(replace(parts, scheduler=Scheduler.from_config(preset.scheduler)))
    mine = pipe.preset
    pipe.preset = replace(preset, denoiser=mine.denoiser, vae=mine.vae, text=mine.text, text_2=mine.text_2)
    steps = 3 if preset is SDXL else None
    pipe(PROMPT, height=32, width=32, seed=3, num_inference_steps=steps, output_type="latent")
    assert rows == expected
    rows.clear()
    pipe(PROMPT, height=32, width=32, seed=3, num_inference_steps=2, guidance_scale=3.0, output_type="latent")
    assert rows == [2, 2]  # with guidance, twice the work
