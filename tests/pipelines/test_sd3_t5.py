"""What becomes of T5: left out, there while it reads, or there all the time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sfumato.models.t5 import T5EncoderModel
from sfumato.pipelines import fit, keeping
from sfumato.pipelines.pipeline import Pipeline, load
from sfumato.pipelines.request import Request
from sfumato.weights.folder import save_folder
from sfumato.weights.mapped import FileRanges
from sfumato.weights.model import load_model, save_model
from sfumato.weights.streaming import Residence

from ..models.parity import assert_close
from ..tiny_sd3 import tiny_sd3

PROMPT = "a red fox jumps over"
TOLD: dict[str, Any] = {"seed": 3, "height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a folder."""
    place = tmp_path_factory.mktemp("t5")
    save_folder(tiny_sd3(), place, torch.float16)
    return place


@pytest.fixture(autouse=True)
def tiny_weights_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "Residence", partial(Residence, smallest=1))


def latents(pipe: Pipeline) -> torch.Tensor:
    images = pipe(PROMPT, **TOLD).images
    assert isinstance(images, torch.Tensor)
    return images


def t5(pipe: Pipeline) -> T5EncoderModel:
    assert isinstance(pipe.text_encoder_3, T5EncoderModel)
    return pipe.text_encoder_3


def ready(pipe: Pipeline) -> set[torch.dtype]:
    """The dtypes of T5's matrices as they are now."""
    return {p.dtype for p in t5(pipe).parameters() if p.ndim == 2}


@pytest.mark.parametrize("memory", ["fast", "balanced", "low"])
def test_pictures_are_the_same_wherever_t5_is(folder: Path, memory: str) -> None:
    expected = latents(load(folder, "float32", memory="fast"))
    for how, after in (("cpu", torch.float16), ("keep", torch.float32)):
        pipe = load(folder, "float32", memory=memory, t5=how)
        assert_close(f"{memory}, t5 {how}", latents(pipe), expected)
        assert pipe.memory == memory
        assert ready(pipe) == {after}
        assert pipe.resolve(Request(prompt=PROMPT))[0].t5 == how


def test_it_reads_from_its_file_before_the_network_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(folder, "float32", memory="fast", t5="cpu")
    events: list[str] = []
    mapped = FileRanges()
    assert all(p in mapped for p in t5(pipe).parameters() if p.ndim == 2)

    def net(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        events.append(f"net, T5 in {ready(pipe)}")
        return torch.zeros_like(x)

    monkeypatch.setattr(pipe, "net", net)
    t5(pipe).register_forward_hook(lambda *_: events.append("T5"))
    latents(pipe)
    assert events[:2] == ["T5", "T5"] and set(events[2:]) == {"net, T5 in {torch.float16}"}


def test_it_stays_in_one_file_as_well(folder: Path, tmp_path: Path) -> None:
    """From the file of a whole model, and from that of T5 beside the folder of a model that came without."""
    whole = load_model(folder, None)
    save_model(whole, tmp_path / "one.safetensors")
    expected = latents(load(folder, "float32", memory="fast"))
    for memory in ("fast", "low"):
        pipe = load(tmp_path / "one.safetensors", "float32", memory=memory, t5="cpu")
        mapped = FileRanges()
        assert ready(pipe) == {torch.float16} and all(p in mapped for p in t5(pipe).parameters() if p.ndim == 2)
        assert_close(f"one file, {memory}", latents(pipe), expected)
    tensors = {n: t for n, t in load_file(tmp_path / "one.safetensors").items() if "t5xxl" not in n}
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        save_file(tensors, tmp_path / "without.safetensors", file.metadata())
    parts = load_model(tmp_path / "without.safetensors", base=folder, t5="cpu")
    assert parts.text_encoder_3 is not None and {p.dtype for p in parts.text_encoder_3.parameters()} == {torch.float16}
    assert {p.dtype for p in parts.denoiser.parameters()} == {torch.float32}


def test_off_reads_nothing_of_it(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = latents(Pipeline(replace(load_model(folder), text_encoder_3=None, tokenizer_3=None)))
    weights = folder / "text_encoder_3" / "model.safetensors"
    aside = weights.rename(tmp_path / "aside")
    try:
        pipe = load(folder, "float32", t5="off")
    finally:
        aside.rename(weights)
    assert pipe.text_encoder_3 is pipe.tokenizer_3 is None
    assert [r.message for r in caplog.records if "came without T5" in r.message]
    assert_close("t5 off", latents(pipe), expected)


def test_the_way_can_be_changed_and_the_model_saved(folder: Path, tmp_path: Path) -> None:
    pipe = load(folder, "float32", memory="low", t5="cpu")
    expected = latents(pipe)
    pipe.set_memory("fast")
    assert_close("from low to fast", latents(pipe), expected)
    assert ready(pipe) == {torch.float16}
    pipe.save_pretrained(tmp_path)
    names = "text_encoder_3/model.safetensors"
    assert (tmp_path / names).read_bytes() == (folder / names).read_bytes()
    kept = load(folder, "float32", memory="fast", t5="keep")
    kept.set_memory("low")
    assert ready(kept) == {torch.float32}


def test_estimates_know_where_it_is() -> None:
    parts = tiny_sd3()
    weighs = fit.load(parts.text_encoder_3, 4)  # type: ignore[arg-type]
    usual, cpu, keep = (
        {memory: fit.estimate(parts, Request(t5=how), memory, torch.float32) for memory in fit.MEMORY}
        for how in (None, "cpu", "keep")
    )
    assert usual["fast"] - cpu["fast"] == weighs.weights - weighs.largest and keep["fast"] == usual["fast"]
    assert keep["low"] - cpu["low"] == weighs.weights - weighs.largest


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("off", "t5 = off is for models that read T5, and .* reads none; leave it out"),
        ("gpu", "unknown t5 'gpu'; did you mean 'cpu'. known: off, cpu, keep"),
    ],
)
def test_what_does_not_fit_is_said(tiny_folder: Path, how: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tiny_folder, t5=how)


def test_it_must_be_there_where_it_is_wanted(tmp_path: Path) -> None:
    save_folder(tiny_sd3(t5=False), tmp_path)
    with pytest.raises(ValueError, match="t5 = cpu, but this model came without T5"):
        load(tmp_path, t5="cpu")
