from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError

from sfumato.pipelines.inputs import open_picture
from sfumato.pipelines.pipeline import Pipeline, load
from sfumato.pipelines.request import MAX_SEED, Request, parse
from sfumato.presets.classic import MINI, SD15


def test_what_is_left_open_comes_from_the_preset() -> None:
    request = parse(prompt="a cat", guidance_scale=3.0).resolved(MINI)
    assert (request.width, request.height, request.num_inference_steps) == (128, 128, 20)
    assert (request.guidance_scale, request.sampler) == (3.0, "dpmpp_2m")
    assert request.seed is not None and 0 <= request.seed < 2**32
    assert request.resolved(SD15) == request, "a resolved request stays as it is"


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
        ({"spacing": "karas"}, r"unknown spacing 'karas'; did you mean 'karras'.* known: .*trailing"),
        ({"num_inference_steps": 0}, r"num_inference_steps = 0: input should be greater than or equal to 1"),
        ({"num_inference_steps": 1001}, r"num_inference_steps = 1001: .*less than or equal to 1000"),
        ({"guidance_scale": float("nan")}, r"guidance_scale = nan"),
        ({"seed": -1}, r"seed = -1: .*greater than or equal to 0"),
        ({"seed": MAX_SEED, "num_images": 2}, r"largest seed"),
        ({"width": "wide"}, r"width = 'wide': input should be a valid integer"),
        ({"image": 3}, r"3 is no picture; give a file's path or a PIL image"),
        ({"mask": ""}, r"'' is no picture"),
        ({"strength": 1.5}, r"strength = 1.5: .*less than or equal to 1"),
        ({"noise_level": 351}, r"noise_level = 351: .*less than or equal to 350"),
        ({"prompt_rule": "forge"}, r"unknown weighting rule 'forge'; known: a1111, comfy, none"),
        ({"prediction": "w"}, r"unknown prediction 'w'; known: epsilon, v_prediction"),
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
    opening = set(inspect.signature(load).parameters)
    assert set(Request.model_fields) <= taken | opening and not taken & opening


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, sfumato, sfumato.cli, sfumato.pipelines.request; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pictures_in_json() -> None:
    request = parse(image=Path("a/b.png"), mask=Image.new("L", (4, 2)), embeddings="one.pt, two")
    assert (request.image, request.embeddings) == ("a/b.png", ("one.pt", "two"))
    assert request.model_dump()["mask"] is request.mask, "in memory it stays a picture"
    written = json.loads(request.model_dump_json())
    assert written["image"] == "a/b.png"
    assert written["mask"].startswith("<picture in memory, 4x2 L, sha256 ")
    with pytest.raises(ValueError, match=r"mask was <picture in memory, 4x2 L, .* give that picture again as mask"):
        open_picture(parse(**written).mask, "mask")


@pytest.mark.parametrize(
    ("sampler", "spacing", "expected"),
    [
        ("DPM++ 2M Karras", None, ("dpmpp_2m", "karras")),
        ("Euler a", "Automatic", ("euler_a", None)),
        ("DPMSolverMultistepScheduler", "trailing", ("dpmpp_2m", "trailing")),
        ("uni_pc_bh2", None, ("unipc", None)),
    ],
)
def test_names_of_other_programs_become_the_registered_ones(
    sampler: str, spacing: str | None, expected: tuple[str, str | None]
) -> None:
    request = parse(prompt="an apple", sampler=sampler, spacing=spacing)
    assert (request.sampler, request.spacing) == expected
