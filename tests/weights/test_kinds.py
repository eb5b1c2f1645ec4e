"""Models that look alike are opened as what they are called, from files and folders, and come back so."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sfumato.diffusion.scheduler import Scheduler
from sfumato.pipelines.pipeline import Pipeline
from sfumato.presets import Kind
from sfumato.presets.xl import SDXL_LIGHTNING
from sfumato.weights import single
from sfumato.weights.folder import load_folder, save_folder
from sfumato.weights.kinds import names
from sfumato.weights.model import load_model, save_model
from sfumato.weights.parts import preset_of
from sfumato.weights.report import report

from ..tiny_xl import tiny_xl
from .tiny_models import TINY, random_parts

TINIES = tuple(TINY.values())
LIGHTNING = SDXL_LIGHTNING.num_inference_steps


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny file of the base model's shapes, without a note of this package's."""
    path = tmp_path_factory.mktemp("files") / "plain.safetensors"
    single.save_single(random_parts(TINY["sdxl"]), path, note=False)
    return path


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.weights.model.load_single", partial(single.load_single, presets=TINIES))


def linked(bare: Path, folder: Path, name: str, **metadata: str) -> Path:
    """The same weights under another name, or with metadata."""
    path = folder / name
    if metadata:
        save_file(load_file(bare), path, {key.replace("__", "."): text for key, text in metadata.items()})
    else:
        path.symlink_to(bare)
    return path


@pytest.mark.parametrize(
    ("name", "metadata", "expected", "steps", "sampler"),
    [
        ("sd_xl_base_1.0.safetensors", {}, "sdxl", 25, "dpmpp_2m"),
        ("sd_xl_turbo_1.0_fp16.safetensors", {}, "sdxl-turbo", 1, "euler_a"),
        ("sdxl_lightning_8step.safetensors", {}, "sdxl-lightning", 8, "euler"),
        ("model.safetensors", {"modelspec__title": "SDXL Lightning 4-step"}, "sdxl-lightning", 4, "euler"),
        ("model.safetensors", {"modelspec__architecture": "stable-diffusion-xl-v1-base"}, "sdxl", 25, "dpmpp_2m"),
    ],
)
def test_a_file_is_what_it_is_called(
    bare: Path, tmp_path: Path, name: str, metadata: dict[str, str], expected: str, steps: int, sampler: str
) -> None:
    found = single.load_single(linked(bare, tmp_path, name, **metadata), presets=TINIES)
    assert (found.preset.name, found.preset.num_inference_steps, found.preset.sampler) == (expected, steps, sampler)
    assert found.preset.guidance_scale == (5 if expected == "sdxl" else 1)
    assert (found.kind is None) == (expected == "sdxl")
    trailing = found.scheduler.spacing == "trailing"
    assert trailing == (expected in ("sdxl-turbo", "sdxl-lightning"))


def test_a_files_name_settles_the_prediction(tmp_path: Path) -> None:
    """The Turbo of Stable Diffusion 2 looks like the model that predicts v, and does not."""
    single.save_single(random_parts(TINY["sd21-base"]), tmp_path / "sd_turbo.safetensors", note=False)
    save_file(load_file(tmp_path / "sd_turbo.safetensors"), tmp_path / "plain.safetensors")
    save_file(load_file(tmp_path / "sd_turbo.safetensors"), tmp_path / "turbo.safetensors")
    plain, turbo = (single.load_single(tmp_path / f"{name}.safetensors", presets=TINIES) for name in ("plain", "turbo"))
    assert (plain.preset.name, plain.preset.prediction) == ("sd21", "v_prediction")
    assert (turbo.preset.name, turbo.preset.prediction) == ("sd-turbo", "epsilon")
    asked = single.load_single(tmp_path / "plain.safetensors", presets=TINIES, kind="sd21-base")
    assert (asked.preset.name, asked.preset.prediction) == ("sd21-base", "epsilon")
    both = single.load_single(tmp_path / "turbo.safetensors", presets=TINIES, prediction="v")
    assert (both.preset.name, both.preset.prediction) == ("sd-turbo", "v_prediction")


def test_a_word_overrules_a_name_in_one_line(bare: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turbo = linked(bare, tmp_path, "my_turbo.safetensors")
    with caplog.at_level(logging.WARNING):
        pipe = Pipeline.from_pretrained(turbo, "float32", "cpu")
    assert pipe.preset.num_inference_steps == 1 and pipe.source["preset"] is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"{turbo} is taken for a model of its own by the file's name, 1 step with guidance 1 unless told otherwise; if "
        "it is not, say --preset sdxl"
    )
    caplog.clear()
    pipe = Pipeline.from_pretrained(turbo, "float32", "cpu", preset="sdxl")
    assert pipe.preset.num_inference_steps == 25 and pipe.source["preset"] == "sdxl"
    pipe = Pipeline.from_pretrained(linked(bare, tmp_path, "x.safetensors"), "float32", "cpu", preset="sdxl-lightning")
    assert pipe.preset.num_inference_steps == LIGHTNING and pipe.scheduler.spacing == "trailing"
    assert not caplog.records
    with pytest.raises(
        ValueError, match="preset 'sd15' is none of the models that this one looks like: sdxl, sdxl-turbo"
    ):
        load_model(turbo, preset="sd15")


def test_what_a_file_is_goes_into_a_folder_and_another_file(bare: Path, tmp_path: Path) -> None:
    loaded = load_model(linked(bare, tmp_path, "some_hyper_2steps.safetensors"))
    assert loaded.kind == Kind("sdxl-hyper", 2, "the file's name")
    save_model(loaded, tmp_path / "folder")
    save_model(loaded, tmp_path / "one.safetensors")
    for path in (tmp_path / "folder", tmp_path / "one.safetensors"):
        back = load_model(path)
        assert back.kind == Kind("sdxl-hyper", 2, "its own note") and preset_of(back).num_inference_steps == 2, path
        assert load_model(path, preset="sdxl").kind == Kind("custom", None, "the word of --preset")
        assert report(path).alike == "by its own note"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folders") / "plain"
    save_folder(tiny_xl(), path)
    return path


@pytest.mark.parametrize(
    ("place", "evidence", "steps"),
    [
        ("sdxl-base", "", 25),
        ("Some-Lightning-8step", "the folder's name", 8),
        ("models--stabilityai--sdxl-turbo/snapshots/0a1b2c", "its name on the hub", 1),
    ],
)
def test_a_folder_is_what_it_is_called(folder: Path, tmp_path: Path, place: str, evidence: str, steps: int) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(folder)
    loaded = load_folder(path)
    assert (loaded.kind.evidence if loaded.kind else "") == evidence
    preset = preset_of(loaded)
    assert preset.num_inference_steps == steps and (preset.spacing == "trailing") == bool(evidence)
    found = report(path)
    assert found.alike == (f"by {evidence}" if evidence else "")
    assert found.preset is not None and found.preset.num_inference_steps == steps


def test_what_a_network_was_made_from_says_it(folder: Path, tmp_path: Path) -> None:
    """The entry that diffusers writes into configurations; and a note that is damaged."""
    save_folder(load_folder(folder), tmp_path / "mine")
    config = tmp_path / "mine" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": "stabilityai/sdxl-turbo"}))
    loaded = load_folder(tmp_path / "mine")
    assert loaded.kind == Kind("sdxl-turbo", None, "what its unet was made from")
    save_folder(loaded, tmp_path / "again")
    index = tmp_path / "again" / "model_index.json"
    entries = json.loads(index.read_text())
    assert entries["_sfumato_preset"] == {"name": "sdxl-turbo", "steps": None}
    index.write_text(json.dumps({**entries, "_sfumato_preset": 7}))
    with pytest.raises(ValueError, match=r"again: the preset that it notes is 7"):
        load_folder(tmp_path / "again")


@pytest.mark.filterwarnings("ignore")
def test_diffusers_passes_over_the_note(folder: Path, tmp_path: Path) -> None:
    import diffusers

    save_folder(replace(load_folder(folder), kind=Kind("sdxl-lcm")), tmp_path / "noted")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(str(tmp_path / "noted"))
    assert pipe.unet.config.cross_attention_dim == 40


def test_the_base_model_with_trailing_steps_is_not_taken_for_another(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = random_parts(replace(TINY["sdxl"], denoiser=replace(TINY["sdxl"].denoiser, cross_attention_dim=2048)))
    save_folder(replace(parts, scheduler=Scheduler.from_config(SDXL_LIGHTNING.scheduler)), tmp_path / "mine")
    with caplog.at_level(logging.WARNING):
        pipe = Pipeline.from_pretrained(tmp_path / "mine", "float32", "cpu")
    assert pipe.preset.name == "sdxl" and pipe.preset.num_inference_steps == 25
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("if it is sdxl-lightning, which looks the same, say --preset sdxl-lightning")
    assert (
        Pipeline.from_pretrained(tmp_path / "mine", "float32", "cpu", preset="sdxl-lightning").preset.guidance_scale
        == 1
    )


def test_names_of_a_place(tmp_path: Path) -> None:
    cached = tmp_path / "models--stabilityai--sdxl-turbo" / "snapshots" / "a1" / "sd_xl.safetensors"
    assert names(cached, "file") == {"the file's name": "sd_xl", "its name on the hub": "stabilityai--sdxl-turbo"}
    assert names(tmp_path / "a.b", "folder") == {"the folder's name": "a.b"}
