"""Depth models in folders and files: the estimator and how its pictures are prepared; folders also with diffusers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionDepth2ImgPipeline
from safetensors.torch import load_file, save_file

from sfumato.models.depth import DepthEstimator, DPTProcessorConfig
from sfumato.models.dpt import DPT_HYBRID, DPT_LARGE, DPTConfig
from sfumato.weights.dpt import midas_map
from sfumato.weights.folder import load_folder, save_folder
from sfumato.weights.layouts import DEPTH, PROCESSOR
from sfumato.weights.model import load_model, save_model
from sfumato.weights.parts import Components, network
from sfumato.weights.report import report
from sfumato.weights.source import open_weights
from tests.conftest import tiny_task
from tests.weights.tiny_models import TINY_DEPTH

QKV = ("query", "key", "value")


@pytest.fixture(scope="module")
def parts() -> Components:
    torch.manual_seed(0)
    estimator = DepthEstimator(TINY_DEPTH, DPTProcessorConfig(size=(64, 64), resample=3)).eval()
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


# Names and shapes that MiDaS' published files have.
LANDMARKS: dict[str, dict[str, tuple[int, ...]]] = {
    "hybrid": {
        "pretrained.model.cls_token": (1, 1, 768),
        "pretrained.model.pos_embed": (1, 577, 768),
        "pretrained.model.patch_embed.backbone.stem.conv.weight": (64, 3, 7, 7),
        "pretrained.model.patch_embed.backbone.stem.norm.bias": (64,),
        "pretrained.model.patch_embed.backbone.stages.0.blocks.0.downsample.conv.weight": (256, 64, 1, 1),
        "pretrained.model.patch_embed.backbone.stages.1.blocks.0.downsample.norm.weight": (512,),
        "pretrained.model.patch_embed.backbone.stages.2.blocks.8.conv2.weight": (256, 256, 3, 3),
        "pretrained.model.patch_embed.proj.weight": (768, 1024, 1, 1),
        "pretrained.model.blocks.11.attn.qkv.weight": (2304, 768),
        "pretrained.model.blocks.0.mlp.fc1.bias": (3072,),
        "pretrained.model.norm.weight": (768,),
        "pretrained.act_postprocess3.0.project.0.weight": (768, 1536),
        "pretrained.act_postprocess3.3.weight": (768, 768, 1, 1),
        "pretrained.act_postprocess4.4.weight": (768, 768, 3, 3),
        "scratch.layer1_rn.weight": (256, 256, 3, 3),
        "scratch.layer4_rn.weight": (256, 768, 3, 3),
        "scratch.refinenet4.resConfUnit2.conv2.bias": (256,),
        "scratch.refinenet1.resConfUnit1.conv1.weight": (256, 256, 3, 3),
        "scratch.refinenet1.out_conv.weight": (256, 256, 1, 1),
        "scratch.output_conv.0.weight": (128, 256, 3, 3),
        "scratch.output_conv.4.weight": (1, 32, 1, 1),
    },
    "large": {
        "pretrained.model.patch_embed.proj.weight": (1024, 3, 16, 16),
        "pretrained.model.blocks.23.norm2.weight": (1024,),
        "pretrained.act_postprocess1.4.weight": (256, 256, 4, 4),
        "pretrained.act_postprocess2.3.bias": (512,),
    },
}


@pytest.mark.parametrize(("name", "config"), [("hybrid", DPT_HYBRID), ("large", DPT_LARGE)])
def test_the_table_of_midas_is_bijective(name: str, config: DPTConfig) -> None:
    table, ours = midas_map(config), network(config).state_dict()
    assert sorted(table.ours) == sorted(ours)
    theirs = table.save(ours)
    assert len(theirs) == len(table.rows) and {n: tuple(theirs[n].shape) for n in LANDMARKS[name]} == LANDMARKS[name]
    back = table.load(theirs)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in ours.items()}
    for extra in ("scratch.refinenet4.resConfUnit1.conv1.weight", "pretrained.model.head.bias"):
        assert table.is_extra(extra)
    assert not table.is_extra("scratch.refinenet3.resConfUnit1.conv1.weight")


def test_an_estimator_comes_back_from_one_file(parts: Components, tmp_path: Path) -> None:
    """Also with the layers that MiDaS' files have and no one reads."""
    path = tmp_path / "depth.safetensors"
    save_model(parts, path)
    assert_same(load_model(path).depth_estimator, parts.depth_estimator)
    found = report(path)
    assert not found.missing and not found.unknown and "depth_estimator" in {part.name for part in found.parts}
    prefix = "depth_model.model."
    tensors = load_file(path)
    q, k, v = (parts.depth_estimator.dpt.encoder.layer[1].attention.attention.get_submodule(n) for n in QKV)  # type: ignore[union-attr]
    fused = tensors[prefix + "pretrained.model.blocks.1.attn.qkv.weight"]
    assert torch.equal(fused, torch.cat([q.weight, k.weight, v.weight]))  # type: ignore[list-item]
    unread = {"scratch.refinenet4.resConfUnit1.conv1.bias": 16, "pretrained.model.head.weight": 5}
    note = {"sfumato.model": open_weights(path).metadata["sfumato.model"]}
    save_file(tensors | {prefix + n: torch.zeros(size) for n, size in unread.items()}, path, note)
    assert_same(load_model(path).depth_estimator, parts.depth_estimator)
    save_file(tensors | {prefix + "scratch.strange.weight": torch.zeros(1)}, path, note)
    with pytest.raises(ValueError, match=r"1 unknown: depth_model\.model\.scratch\.strange\.weight"):
        load_model(path)


def test_a_base_supplies_an_estimator(parts: Components, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    save_model(replace(parts, depth_estimator=None), path)
    assert not any(name.startswith("depth_model.") for name in load_file(path))
    assert load_model(path).depth_estimator is None
    assert_same(load_model(path, base=saved).depth_estimator, parts.depth_estimator)
