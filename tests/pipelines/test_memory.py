from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sfumato.pipelines import memory
from sfumato.pipelines.pipeline import Pipeline
from sfumato.weights.mapped import FileRanges
from sfumato.weights.model import save_model


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which pages were written")
def test_pages_go_between_stages_and_changes_stay(
    tiny_pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tiny_pipe, tmp_path / "model")
    released = []
    own = memory.release_unwritten
    monkeypatch.setattr(memory, "release_unwritten", lambda weight: (released.append(own(weight)), released[-1])[1])
    pictures = []
    for large in (2**28, 0):
        monkeypatch.setattr(memory, "LARGE", large)
        pipe = Pipeline.from_pretrained(tmp_path / "model", "float32", "cpu", memory="fast")
        with torch.no_grad():
            mapped = FileRanges()
            weight = next(w for w in pipe.denoiser.parameters() if w.ndim == 2 and w in mapped)
            weight += 0.01
        pictures += [pipe("a red apple", num_inference_steps=2, seed=0, output_type="pt").images for _ in range(2)]
        assert bool(released) == (large == 0)
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)


def test_halves_of_an_autoencoder_are_laid_out_when_they_are_called(tiny_pipe: Pipeline) -> None:
    weights = [half.conv_in.weight for half in (tiny_pipe.vae.encoder, tiny_pipe.vae.decoder)]
    laid_out = lambda: [weight.is_contiguous(memory_format=torch.channels_last) for weight in weights]  # noqa: E731
    tiny_pipe.lay_out()
    assert laid_out() == [False, False]
    picture = tiny_pipe("a red apple", num_inference_steps=1, seed=0).images[0]
    assert laid_out() == [False, True]
    tiny_pipe("a red apple", image=picture, num_inference_steps=2, seed=0)
    assert laid_out() == [True, True] and tiny_pipe.vae.encoder.conv_in.weight is weights[0]
    tiny_pipe.set_memory("balanced")
    assert not any("forward" in module.__dict__ for module in tiny_pipe.vae.modules())
