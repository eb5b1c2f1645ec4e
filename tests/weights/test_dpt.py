"""Depth models in folders: the estimator and how its pictures are prepared, in both directions with diffusers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionDepth2ImgPipeline
from safetensors.torch import load_file

from sfumato.models.bit import BitConfig
from sfumato.models.depth import DepthEstimator, DPTProcessorConfig
from sfumato.models.dpt import DPTConfig
from sfumato.weights.folder import DEPTH, PROCESSOR, load_folder, save_folder
from sfumato.weights.parts import Components
from tests.conftest import tiny_task

TINY = DPTConfig(
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=64,
    backbone_out_indices=(0, 1, 2, 3),
    reassemble_factors=(1, 1, 1, 0.5),
    neck_hidden_sizes=(32, 64, 24, 40),
    fusion_hidden_size=16,
    backbone_config=BitConfig(embedding_size=16, hidden_sizes=(32, 64, 96), depths=(1, 1, 1), num_groups=4),
)


@pytest.fixture(scope="module")
def parts() -> Components:
    torch.manual_seed(0)
    estimator = DepthEstimator(TINY, DPTProcessorConfig(size=(64, 64), resample=3)).eval()
    return replace(tiny_task("depth"), depth_estimator=estimator)


@pytest.fixture(scope="module")
def saved(parts: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("depth") / "model"
    save_folder(parts, path)
    return path


def assert_same(ours: DepthEstimator | None, expected: DepthEstimator | None) -> None:
    assert ours is not None and expected is not None
    assert ours.config == expected.config and ours.processor == expected.processor and not ours.training
    wanted = expected.state_dict()
    assert ours.state_dict().keys() == wanted.keys()
    worst = max(float((tensor - wanted[name]).abs().max()) for name, tensor in ours.state_dict().items())
    print(f"largest difference {worst}")
    assert worst == 0


def test_an_estimator_comes_back_as_it_was_saved(parts: Components, saved: Path) -> None:
    assert_same(load_folder(saved).depth_estimator, parts.depth_estimator)
    half = load_folder(saved, torch.bfloat16).depth_estimator
    assert half is not None and {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_diffusers_opens_what_we_save_and_we_what_it_saves(parts: Components, saved: Path, tmp_path: Path) -> None:
    theirs = StableDiffusionDepth2ImgPipeline.from_pretrained(saved)
    theirs.save_pretrained(tmp_path / "theirs")
    names = load_file(tmp_path / "theirs" / DEPTH / "model.safetensors").keys()
    assert any(name.startswith("neck.fusion_stage.layers.0.residual_layer1.") for name in names)
    assert_same(load_folder(tmp_path / "theirs").depth_estimator, parts.depth_estimator)


def test_a_model_may_come_without_its_estimator(parts: Components, saved: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    save_folder(replace(parts, depth_estimator=None), bare)
    index = json.loads((bare / "model_index.json").read_text())
    assert index[DEPTH] == index[PROCESSOR] == [None, None] and not (bare / DEPTH).exists()
    assert load_folder(bare).depth_estimator is None
    lost = shutil.copytree(saved, tmp_path / "lost")
    shutil.rmtree(lost / PROCESSOR)
    loaded = load_folder(lost).depth_estimator
    assert loaded is not None and loaded.processor == DPTProcessorConfig()
    shutil.rmtree(lost / DEPTH)
    assert load_folder(lost).depth_estimator is None


def test_an_estimator_of_another_kind_is_refused(saved: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(saved, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    index[DEPTH] = ["transformers", "GLPNForDepthEstimation"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="'GLPNForDepthEstimation' for depth_estimator; supported: DPTForDepthEst"):
        load_folder(copy)


def test_models_of_other_tasks_save_no_estimator(parts: Components, tmp_path: Path) -> None:
    plain = replace(tiny_task("text"), depth_estimator=parts.depth_estimator)
    save_folder(plain, tmp_path / "plain")
    assert not (tmp_path / "plain" / DEPTH).exists()
    assert load_folder(tmp_path / "plain").depth_estimator is None
