from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import sfumato
from sfumato.presets import BUILT_IN
from sfumato.presets.classic import SD15, SD21
from sfumato.previews import SD, Preview, factors_of, fit
from sfumato.weights.parts import Components


def test_a_linear_autoencoder_is_found_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 4, 5, 6, generator=generator)
    matrix, offset = torch.randn(4, 3, generator=generator), torch.randn(3, generator=generator)
    x = torch.einsum("bchw,cr->brhw", z, matrix) + offset.view(1, 3, 1, 1)
    factors, error = fit(z, x.repeat_interleave(8, 2).repeat_interleave(8, 3))
    worst = max(
        float((torch.tensor(factors.rows) - matrix).abs().max()), float((factors.rgb(z) - x).abs().max()), error
    )
    print(f"largest difference {worst:.1e}")
    assert worst < 1e-4


def test_whose_latents_are_known(tiny_parts: Components) -> None:
    assert factors_of(SD15.vae) is SD and factors_of(SD21.vae) is SD
    assert factors_of(tiny_parts.vae.config) is None
    assert factors_of(replace(SD15.vae, scaling_factor=0.5)) is None


def test_unknown_latents_are_decoded(tiny_parts: Components) -> None:
    z = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ((tiny_parts.vae.to_pixels(z)[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)
    shown = Preview(tiny_parts.vae).picture(z)
    assert shown.size == (24, 32)
    assert np.array_equal(np.asarray(shown), expected.numpy().astype(np.uint8))


@pytest.mark.skipif(not BUILT_IN["mini"].is_dir(), reason="the built-in model is not in this installation")
def test_the_map_of_the_built_in_model_shows_its_pictures() -> None:
    pipe = sfumato.load("mini", "float32", "cpu")
    output = pipe("a red apple on a blue background", seed=40, num_inference_steps=8, output_type="latent")
    assert isinstance(output.images, torch.Tensor)
    preview = Preview(pipe.vae)
    shown = np.asarray(preview.picture(output.images), dtype=np.float64)
    exact = ((pipe.decode(output.images)[0] / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    error = float(np.sqrt(np.square(shown - exact).mean()))
    print(f"root mean square error {error:.1f} of 255")
    assert preview.factors is not None and shown.shape == (128, 128, 3) and error < 40
