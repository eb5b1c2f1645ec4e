"""A model in one file: written, recognised by names and shapes alone, and read back bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sfumato.presets.classic import SD15, SD21, SD21_BASE
from sfumato.weights.detect import DENOISER, VAE, identify
from sfumato.weights.model import load_model
from sfumato.weights.note import NOTE
from sfumato.weights.parts import Components
from sfumato.weights.report import bad_numbers, report
from sfumato.weights.single import Single, load_single, save_single
from sfumato.weights.source import open_weights

from .tiny_models import RELEASED, TINY, random_parts

TINIES = tuple(TINY.values())
NAMES = tuple(TINY)


def saved(name: str, folder: Path, note: bool = False, dtype: torch.dtype | None = None) -> tuple[Components, Path]:
    parts = random_parts(TINY[name])
    path = folder / "model.safetensors"
    save_single(parts, path, dtype, note=note)
    return parts, path


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    a, b = ours.state_dict(), theirs.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def assert_same(single: Single, parts: Components) -> None:
    for part, network in single.networks.items():
        assert same(network, getattr(parts, part)), part
    assert single.missing == []


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_recognised_and_read_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    parts, path = saved(name, tmp_path)
    single = load_single(path, None, presets=TINIES)
    assert single.preset.name == name
    assert single.preset.denoiser == parts.denoiser.config and single.preset.vae == parts.vae.config
    assert_same(single, parts)
    assert single.scheduler.config == parts.scheduler.config


def test_the_released_models_are_told_apart() -> None:
    """Each true size gives a signature of its own, but for the pair that differs in its prediction only."""
    from sfumato.weights.signatures import signature_of

    signatures: dict[Any, list[str]] = {}
    for preset in RELEASED:
        texts = tuple(map(signature_of, preset.texts))
        signatures.setdefault((signature_of(preset.denoiser), signature_of(preset.vae), texts), []).append(preset.name)
    assert [names for names in signatures.values() if len(names) > 1] == [["sd21", "sd21-base"]]


@pytest.mark.parametrize(
    ("metadata", "extra", "asked", "expected", "evidence"),
    [
        ({}, {}, None, "sd21", "the family"),
        ({}, {}, "eps", "sd21-base", "as asked"),
        ({"modelspec.prediction_type": "epsilon"}, {}, None, "sd21-base", "modelspec"),
        ({"modelspec.prediction_type": "v"}, {}, None, "sd21", "modelspec"),
        ({}, {"v_pred": torch.zeros(0)}, None, "sd21", "v_pred"),
    ],
)
def test_where_the_prediction_is_read(
    tmp_path: Path,
    metadata: dict[str, str],
    extra: dict[str, torch.Tensor],
    asked: str | None,
    expected: str,
    evidence: str,
) -> None:
    _, path = saved("sd21", tmp_path)
    tensors = load_file(path) | extra
    save_file(tensors, path, {"format": "pt", **metadata})
    found = identify(open_weights(path), asked, TINIES)
    assert found.preset is not None and found.preset.name == expected
    assert evidence in found.evidence


def test_the_step_count_of_the_base_models(tmp_path: Path) -> None:
    _, path = saved("sd21", tmp_path)
    torch.save({"state_dict": load_file(path), "global_step": 875000}, tmp_path / "base.ckpt")
    assert load_single(tmp_path / "base.ckpt", None, presets=TINIES).preset.name == "sd21-base"


def test_a_family_can_be_told_to_predict_v(tmp_path: Path) -> None:
    _, path = saved("sd15", tmp_path)
    single = load_single(path, None, prediction="v", presets=TINIES)
    assert single.preset.prediction == single.scheduler.prediction == "v_prediction"


@pytest.mark.parametrize("name", ["sd15", "ldm-class"])
def test_averaged_weights(tmp_path: Path, name: str) -> None:
    """EMA names as CompVis writes them; taken when asked, or by default where the model was published so."""
    parts, path = saved(name, tmp_path)
    tensors = load_file(path)
    unet = {n: t for n, t in tensors.items() if n.startswith("model.diffusion_model.")}
    shadow = {"model_ema." + n.removeprefix("model.").replace(".", ""): t + 1 for n, t in unet.items()}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    save_file(tensors | shadow | counters, path, {"format": "pt"})
    plain, averaged = (load_single(path, None, ema=ema, presets=TINIES).networks[DENOISER] for ema in (False, True))
    assert same(plain, parts.unet)
    for n, weight in averaged.state_dict().items():
        assert torch.equal(weight, parts.unet.state_dict()[n] + 1)
    default = load_single(path, None, presets=TINIES).networks[DENOISER]
    assert same(default, averaged if name == "ldm-class" else plain)


def test_what_whole_checkpoints_carry_is_passed_over_and_the_unknown_is_named(tmp_path: Path) -> None:
    parts, path = saved("sd15", tmp_path)
    tensors = load_file(path)
    usual = {"betas": torch.zeros(3), "alphas_cumprod": torch.zeros(3), "model_ema.decay": torch.tensor(0.9)}
    usual["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors | usual, path, {"format": "pt"})
    assert_same(load_single(path, None, presets=TINIES), parts)
    save_file(tensors | {"model.diffusion_model.strange.weight": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 unknown: model\.diffusion_model\.strange\.weight"):
        load_single(path, None, presets=TINIES)
    save_file(tensors | {"else.weight": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 unknown: else\.weight"):
        load_single(path, None, presets=TINIES)


def test_a_file_without_a_part_needs_a_base(tmp_path: Path) -> None:
    parts = random_parts(TINY["sd15"])
    save_single(parts, tmp_path / "whole.safetensors")
    tensors = load_file(tmp_path / "whole.safetensors")
    bare = {n.removeprefix("model.diffusion_model."): t for n, t in tensors.items() if n.startswith("model.diff")}
    save_file(bare, tmp_path / "unet.safetensors", {"format": "pt"})
    single = load_single(tmp_path / "unet.safetensors", None, presets=TINIES)
    assert list(single.networks) == [DENOISER] and same(single.networks[DENOISER], parts.unet)
    assert single.missing == [VAE, "text_encoder"]


def test_the_note_brings_any_model_back(tiny_parts: Components, tmp_path: Path) -> None:
    """A model that no preset describes, with a vocabulary of its own, through one file and back."""
    path = tmp_path / "own.safetensors"
    save_single(tiny_parts, path)
    back = load_model(path, None)
    for part in ("unet", "vae", "text_encoder"):
        assert same(getattr(back, part), getattr(tiny_parts, part))
        assert getattr(back, part).config == getattr(tiny_parts, part).config
    assert back.tokenizer is not None and back.tokenizer.vocabulary == tiny_parts.tokenizer.vocabulary  # type: ignore[union-attr]
    assert {**back.scheduler.config, "_use_default_values": 0} == {
        **tiny_parts.scheduler.config,
        "_use_default_values": 0,
    }


def test_a_damaged_note_is_refused(tiny_parts: Components, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_single(tiny_parts, path)
    tensors = load_file(path)
    for note in ("{", "[]", "{}", '{"pipeline": 3}'):
        save_file(tensors, path, {"format": "pt", NOTE: note})
        with pytest.raises(ValueError, match="note"):
            load_single(path)


def test_conversion_changes_the_type_only(tmp_path: Path) -> None:
    parts, path = saved("sd15", tmp_path, dtype=torch.float16)
    single = load_single(path, None, presets=TINIES)
    for part, network in single.networks.items():
        for name, weight in getattr(parts, part).state_dict().items():
            assert torch.equal(network.state_dict()[name], weight.half())


@pytest.mark.parametrize("name", ["sd15", "sd21", "ldm-text", "ldm-class"])
def test_checkpoints_are_read_as_safetensors_are(name: str, tmp_path: Path) -> None:
    parts, path = saved(name, tmp_path)
    torch.save({"state_dict": load_file(path), "epoch": 3, "global_step": 7}, tmp_path / "model.ckpt")
    assert_same(load_single(tmp_path / "model.ckpt", None, presets=TINIES), parts)


def test_a_report_names_what_is_wrong(tmp_path: Path) -> None:
    parts, path = saved("sd15", tmp_path, note=True)
    found = report(path)
    assert found.preset is not None and found.kind == "model" and not found.missing and not found.unknown
    counts = {part.name: part.parameters for part in found.parts}
    assert counts == {n: sum(p.numel() for p in getattr(parts, n).parameters()) for n in counts}
    tensors = load_file(path)
    first = "model.diffusion_model.input_blocks.0.0.bias"
    tensors[first][0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    assert bad_numbers(path) == [first]


def test_presets_by_replace() -> None:
    assert SD21_BASE.prediction == "epsilon" and SD21.prediction == "v_prediction"
    assert SD15.predicting("v_prediction").prediction == "v_prediction" and SD15.prediction == "epsilon"
    assert replace(SD15, name="mine").denoiser is SD15.denoiser
