from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sfumato.pipelines.pipeline import Pipeline
from sfumato.weights.folder import Components, load_folder, save_folder

NETWORKS = ("unet", "vae", "text_encoder")


def test_a_folder_comes_back_as_it_was_saved(tiny_parts: Components, tiny_folder: Path) -> None:
    saved, loaded = tiny_parts, load_folder(tiny_folder)
    for part in NETWORKS:
        a, b = getattr(saved, part), getattr(loaded, part)
        assert a.config == b.config
        worst = max(float((x - y).detach().abs().max()) for x, y in zip(a.parameters(), b.parameters(), strict=True))
        assert worst == 0, f"{part}: {worst}"
    texts = ["a red apple on a green background"]
    assert torch.equal(saved.tokenizer(texts), loaded.tokenizer(texts))
    assert saved.scheduler.plan(7).grid == loaded.scheduler.plan(7).grid
    assert loaded.scheduler.prediction == "v_prediction"


def test_half_precision_files_are_found_and_converted(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    save_folder(load_folder(tiny_folder), folder, torch.float16)
    for part in NETWORKS:
        (path,) = (folder / part).glob("*.safetensors")
        path.rename(path.with_suffix(".fp16.safetensors"))
    whole, half = load_folder(tiny_folder), load_folder(folder)
    for x, y in zip(whole.unet.parameters(), half.unet.parameters(), strict=True):
        assert y.dtype == torch.float32
        difference = float((x.half().float() - y).detach().abs().max())
        assert difference == 0, difference


@pytest.mark.parametrize("part", NETWORKS)
def test_missing_weights_say_what_lies_there(tiny_folder: Path, tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    (weights,) = (folder / part).glob("*.safetensors")
    weights.rename(folder / part / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=rf"{part} has none of .*it holds: .*pytorch_model.bin; pickled"):
        load_folder(folder)


def test_folders_of_other_kinds_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model folder"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"not a model folder: it has no model_index\.json"):
        load_folder(tmp_path)
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="describes a 'FluxPipeline'; this version opens"):
        load_folder(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index\.json is not valid JSON"):
        load_folder(folder)


def test_weights_of_another_config_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 48}))
    with pytest.raises(ValueError, match=r"does not fit UNet as its config describes it; .* of another shape"):
        load_folder(folder)


def test_a_pipeline_saves_what_it_opened(tiny_pipe: Pipeline, tiny_folder: Path, tmp_path: Path) -> None:
    tiny_pipe.save_pretrained(tmp_path / "again")
    files = sorted(p.relative_to(tiny_folder) for p in tiny_folder.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    for file in files:
        assert (tiny_folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
