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
