from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from pydantic import ValidationError

from sfumato.pipelines.pipeline import Pipeline
from sfumato.pipelines.request import MAX_SEED, Request, parse
from sfumato.presets import MINI, SD1, SD2, Preset, detect, model_folder


def test_what_is_left_open_comes_from_the_preset() -> None:
    request = parse(prompt="a cat", guidance_scale=3.0).resolved(MINI)
    assert (request.width, request.height, request.num_inference_steps) == (128, 128, 20)
    assert (request.guidance_scale, request.sampler) == (3.0, "dpmpp_2m")
    assert request.seed is not None and 0 <= request.seed < 2**32
    assert request.resolved(SD1) == request, "a resolved request stays as it is"


def test_each_picture_has_a_request_of_its_own() -> None:
    singles = parse(prompt="a cat", seed=40, num_images=3).singles()
    assert [(r.seed, r.num_images) for r in singles] == [(40, 1), (41, 1), (42, 1)]
    with pytest.raises(ValueError, match="no seed yet"):
        parse(prompt="a cat").singles()


def test_json_brings_the_request_back() -> None:
    request = parse(prompt="ein Käfer 🐞", seed=MAX_SEED, eta=0.5, sampler="ddim")
    assert Request.model_validate_json(request.model_dump_json()) == request


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampler": "dpm2m"}, r"unknown sampler 'dpm2m'; did you mean .*'dpmpp_2m'.* known: .*euler"),
        ({"spacing": "karas"}, r"unknown spacing 'karas'; did you mean 'karras'\? known: .*trailing"),
        ({"num_inference_steps": 0}, r"num_inference_steps = 0: input should be greater than or equal to 1"),
        ({"num_inference_steps": 1001}, r"num_inference_steps = 1001: .*less than or equal to 1000"),
        ({"guidance_scale": float("nan")}, r"guidance_scale = nan"),
        ({"seed": -1}, r"seed = -1: .*greater than or equal to 0"),
        ({"seed": MAX_SEED, "num_images": 2}, r"largest seed"),
        ({"width": "wide"}, r"width = 'wide': input should be a valid integer"),
        ({"prompt": "  "}, r"the prompt is blank"),
        ({"prompt": ""}, r"prompt = ''"),
        ({"step": 5}, r"unknown option 'step'; .*known: prompt"),
        ({"num_images": 0, "seed": -1}, r"seed = -1.*; num_images = 0"),
    ],
)
def test_errors_name_value_and_mend(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(**({"prompt": "a cat"} | fields))


def test_requests_are_frozen() -> None:
    with pytest.raises(ValidationError):
        parse(prompt="a cat").prompt = "a dog"  # type: ignore[misc]


def test_every_field_is_described_and_the_pipeline_takes_it() -> None:
    schema = Request.model_json_schema()
    assert all(field.get("description") for field in schema["properties"].values())
    assert schema["additionalProperties"] is False
    taken = {n.replace("num_images_per_prompt", "num_images") for n in inspect.signature(Pipeline.__call__).parameters}
    assert set(Request.model_fields) - {"model"} <= taken


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, sfumato, sfumato.cli, sfumato.pipelines.request; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("width", "side", "preset"), [(256, 128, MINI), (768, 512, SD1), (1024, 768, SD2), (1024, 512, SD2)]
)
def test_presets_are_told_by_the_context(width: int, side: int, preset: Preset) -> None:
    found = detect(width, side, "leading")
    assert (found.name, found.width, found.height, found.spacing) == (preset.name, side, side, "leading")


def test_unknown_models_say_what_to_give() -> None:
    with pytest.raises(FileNotFoundError, match="no model folder 'nope'; give a folder or a built-in model: mini"):
        model_folder("nope")
