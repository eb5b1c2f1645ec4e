"""Skip-layer guidance beside diffusers', and how often networks are asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.models.mmdit import MMDiT
from sfumato.pipelines.pipeline import Pipeline
from sfumato.weights.folder import save_folder

from ..tiny_sd3 import tiny_sd3
from .test_sd3 import NEGATIVE, PROMPT, assert_same, peer, seeded

STEPS = 10


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of each call of a transformer, in order."""
    seen: list[int] = []
    forward = MMDiT.forward

    def counted(self: MMDiT, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(x))
        return forward(self, x, *rest)

    monkeypatch.setattr(MMDiT, "forward", counted)
    yield seen


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(tiny_sd3("sd3.5-medium"))


def pictures(pipe: Pipeline, **told: Any) -> torch.Tensor:
    size = {"height": 32, "width": 32, "num_inference_steps": STEPS, "guidance_scale": 4.0}
    images = pipe(PROMPT, seed=3, output_type="latent", **{**size, **told}).images
    assert isinstance(images, torch.Tensor)
    return images


def test_skipped_layers_are_diffusers(pipe: Pipeline, tmp_path: Path) -> None:
    save_folder(pipe, tmp_path)
    theirs = peer(tmp_path)
    both: dict[str, Any] = {"negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "output_type": "pt"}
    both |= {"guidance_scale": 4.0, "height": 32, "width": 48}
    without = pipe(PROMPT, seed=3, **both).images
    for layers, scale, start, stop in (((1, 2), 2.8, 0.01, 0.2), ((0, 3), 1.5, 0.1, 0.77), ((2,), 2.0, 0.0, 1.0)):
        ours = pipe(PROMPT, seed=3, slg_scale=scale, slg_layers=layers, slg_interval=(start, stop), **both).images
        slg = {"skip_guidance_layers": list(layers), "skip_layer_guidance_scale": scale}
        slg |= {"skip_layer_guidance_start": start, "skip_layer_guidance_stop": stop}
        assert isinstance(ours, torch.Tensor) and isinstance(without, torch.Tensor)
        assert_same(f"blocks {layers} skipped", ours, theirs(PROMPT, generator=seeded(), **both, **slg).images)
        assert float((ours - without).abs().max()) > 3 / 255


def test_layers_are_skipped_between_the_shares_only(pipe: Pipeline, rows: list[int]) -> None:
    told = {"slg_scale": 2.0, "slg_layers": (1,)}
    pictures(pipe, **told)
    assert rows == [2] + [2, 1] + [2] * 8
    rows.clear()
    pictures(pipe, **told, slg_interval=(0.5, 1), pag_scale=1.0, pag_layers=("blocks.0",), guidance_scale=1.0)
    assert rows == [1, 1] * 6 + [1, 1, 1] * 4
    rows.clear()
    pictures(pipe, slg_scale=0.0)
    assert rows == [2] * STEPS


def test_both_perturbations_count(pipe: Pipeline) -> None:
    slg: dict[str, Any] = {"slg_scale": 2.0, "slg_layers": (1,), "slg_interval": (0, 1)}
    pag: dict[str, Any] = {"pag_scale": 1.0, "pag_layers": ("blocks.0",)}
    found = [pictures(pipe, **fields) for fields in ({}, slg, pag, {**slg, **pag})]
    assert min(float((a - b).abs().max()) for i, a in enumerate(found) for b in found[:i]) > 0.01


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, "slg_layers = 7,8,9: no block '7' to skip; this network has 0 to 3"),
        ({"slg_layers": (1,), "slg_interval": (0.11, 0.19)}, "slg_interval = 0.11,0.19 has none of 10 steps inside"),
        ({"slg_layers": (1,), "hires_scale": 1.5}, "slg_interval = 0.01,0.2 has none of 4 steps inside"),
        ({"slg_layers": (1,), "slg_interval": (0.5, 0.1)}, "slg_interval = 0.5,0.1; give two rising shares"),
        ({"slg_layers": ("top",)}, "slg_layers.0 = 'top': input should be a valid integer"),
    ],
)
def test_what_does_not_fit_is_said(pipe: Pipeline, told: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        pictures(pipe, slg_scale=2.0, **told)
    assert "\n" not in str(error.value)


def test_a_unet_has_no_such_blocks(tiny_pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"slg_layers = 7,8,9: .* this network is no transformer and has none"):
        tiny_pipe(PROMPT, slg_scale=2.0)


def test_few_steps_without_guidance_are_half_the_work(rows: list[int]) -> None:
    """As the large Turbo model: its preset's four steps, one question each."""
    from sfumato.presets.sd3 import SD35_LARGE, SD35_LARGE_TURBO

    pipe = Pipeline(tiny_sd3("sd3.5-large"))
    told = {"height": 32, "width": 32, "seed": 3, "output_type": "latent"}
    for preset, expected in ((SD35_LARGE_TURBO, [1] * 4), (SD35_LARGE, [2] * 28)):
        pipe.preset = replace(preset, denoiser=pipe.denoiser.config, vae=pipe.vae.config)
        pipe(PROMPT, **told)  # type: ignore[arg-type]
        assert rows == expected
        rows.clear()
