"""Products in 8 bits: near, off unless asked for, and refused in one line where they gain nothing."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from sfumato.approximate import Rounded, rounded
from sfumato.approximate.int8 import has_kernels
from sfumato.pipelines.pipeline import Pipeline
from sfumato.runtime import choose

from ..tiny_sd3 import tiny_sd3

needs_kernels = pytest.mark.skipif(
    not has_kernels(), reason="products in 8 bits are for x86-64 processors and PyTorch with oneDNN"
)


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline(tiny_sd3(), choose("cpu", "float32"), model="tiny-sd3")


def latents(pipe: Pipeline, **options: object) -> Tensor:
    found = pipe("a red apple", seed=3, num_inference_steps=3, output_type="latent", **options).images
    assert isinstance(found, Tensor)
    return found


@needs_kernels
def test_a_layer_is_near_and_sees_other_weights() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48), torch.randn(2, 40, 64)
    way = Rounded(layer)
    way.switch.on = True
    with torch.inference_mode():
        for change in (None, 0.5, -1.5):
            if change is not None:
                layer.weight.data = layer.weight.data * change
            exact = layer(x)
            found = float((way(x) - exact).norm() / exact.norm())
            print(f"{change}: {found:.1e} of the norm")
            assert 0 < found < 0.04
        assert torch.equal(way(x[:, :2]), layer(x[:, :2]))  # too few rows
    assert torch.equal(way(x), layer(x))  # gradients
    for other in (copy.deepcopy(way), pickle.loads(pickle.dumps(way))):
        with torch.inference_mode():
            assert not other.switch.on and torch.equal(other(x), layer(x))


@needs_kernels
def test_only_what_asks_is_rounded(pipe: Pipeline) -> None:
    nn.init.normal_(pipe.transformer.proj_out.weight, std=0.1)
    exact = latents(pipe)
    near = latents(pipe, int8=True)
    found = float((near - exact).abs().max() / exact.abs().max())
    print(f"largest difference {found:.1e} of the largest value")
    assert 0 < found < 0.2
    assert torch.equal(latents(pipe), exact) and torch.equal(latents(pipe, int8=True), near)
    with ThreadPoolExecutor(4) as pool:
        both = list(pool.map(lambda wanted: latents(pipe, int8=wanted), (True, False) * 2))
    assert all(torch.equal(a, b) for a, b in zip(both, (near, exact) * 2, strict=True))


@needs_kernels
def test_what_gains_nothing_says_so(pipe: Pipeline, tiny_pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"^int8 is not for .* here: it is for transformers, .*; leave it out$"):
        latents(tiny_pipe, int8=True)
    with pytest.raises(ValueError, match="no int8: it is for transformers"):
        rounded(tiny_pipe.unet)
    pipe.set_memory("low")
    with pytest.raises(ValueError, match=r"these come and go; take --memory fast; leave it out$"):
        latents(pipe, int8=True)
    half = Pipeline(tiny_sd3(), choose("cpu", "bfloat16"), model="tiny-sd3")
    with pytest.raises(ValueError, match="for CPUs in float32, and this runs on cpu in bfloat16"):
        latents(half, int8=True)
