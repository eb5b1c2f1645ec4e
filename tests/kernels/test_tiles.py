"""Attention in bfloat16 on tiles against float64; tiles made of AVX2 instructions (emulated/ has the real ones)."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato import kernels
from sfumato.kernels import library
from sfumato.kernels.attention import fused, quicker
from sfumato.kernels.library import TILES, Library
from tests.kernels.conftest import needs_library
from tests.kernels.test_attention import LAYOUTS, difference, exact, tensors

pytestmark = needs_library
BOUND = 2**-8  # of the largest value, which is what rounding the answer may cost
dispatch = importlib.import_module("sfumato.kernels.attention")  # the package names its function the same


@pytest.fixture(autouse=True)
def tiles(emulated_tiles: Library, monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setattr(library, "_open", lambda: (emulated_tiles, "emulated"))
    return emulated_tiles


def halves(q: tuple[int, ...], keys: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    q_, k, v = (t.bfloat16() for t in tensors(q, keys, width, seed))
    return q_, k, v


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 100), st.integers(1, 90)),
    keys=st.integers(1, 300),
    width=st.integers(1, 90),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    kind=st.sampled_from(["none", "causal", "boolean", "additive", "half additive"]),
    scale=st.sampled_from([None, 0.1, -0.1]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_it_is_attention(
    shape: tuple[int, int, int, int], keys: int, width: int, layouts: tuple[str, ...], kind: str, scale: float | None,
    threads: int, seed: int,
) -> None:  # fmt: skip
    q, k, v = (LAYOUTS[layout](t) for layout, t in zip(layouts, halves(shape, keys, width, seed), strict=True))
    g = torch.Generator().manual_seed(seed)
    additive = torch.randn(shape[1], shape[2], keys, generator=g).masked_fill(
        torch.rand(shape[1], shape[2], keys, generator=g) < 0.3, -math.inf
    )
    mask = {
        "boolean": torch.rand(shape[0], 1, shape[2], keys, generator=g) < 0.6,
        "additive": additive,
        "half additive": additive.bfloat16(),
    }.get(kind)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = fused(q, k, v, mask, kind == "causal", scale)
    finally:
        torch.set_num_threads(before)
    wanted = exact(q, k, v, mask, kind == "causal", shape[3] ** -0.5 if scale is None else scale)
    assert got.shape == wanted.shape and got.dtype == torch.bfloat16
    assert difference(got, wanted, v) < BOUND


@pytest.mark.parametrize("width", [40, 64, 80, 88, 128, 160])
@pytest.mark.parametrize("keys", [77, 200])
def test_the_models_widths(width: int, keys: int) -> None:
    q, k, v = halves((1, 2, 200, width), keys, width)
    assert difference(fused(q, k, v), exact(q, k, v, scale=width**-0.5), v) < BOUND


def test_sharp_flat_hidden_and_no_numbers() -> None:
    q, k, v = halves((1, 4, 40, 8), 300, 8)
    q[:, 0] *= 100
    q[:, 1] = 0
    got = fused(q, k, v)
    assert difference(got, exact(q, k, v, scale=8**-0.5), v) < BOUND
    assert difference(fused(q, k, v, scale=0.0), v.double().mean(2, keepdim=True).expand(got.shape), v) < BOUND
    mask = torch.ones(40, 300, dtype=torch.bool)
    mask[2] = False
    assert torch.equal(fused(q, k, v, mask)[0, :, 2], torch.zeros(4, 8, dtype=torch.bfloat16))
    q[0, 2, 3, 1] = math.nan
    k[0, 3, 299, 0] = math.nan
    got = fused(q, k, v)
    assert got[0, 2, 3].isnan().all() and got[0, 3].isnan().all()
    assert not got[0, :2].isnan().any() and not got[0, 2, 4:].isnan().any()


def test_who_answers(tiles: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quicker one in a trial, the kernel where its instruction set was asked for, PyTorch without such units."""
    half, single = halves((2, 8, 256, 40), 77, 40), tensors((2, 8, 256, 40), 77, 40)
    for answer in (True, False):
        monkeypatch.setattr(dispatch, "quicker", lambda *_, answer=answer: answer)
        assert kernels.attention_pays(*half) is answer and kernels.attention_pays(*single)
    monkeypatch.setattr(library, "_open", lambda: (Library(tiles.handle, TILES, None, asked=True), "asked for"))
    assert kernels.attention_pays(*half) and not kernels.attention_pays(*halves((2, 8, 16, 40), 77, 40))
    monkeypatch.setattr(library, "_open", lambda: (Library(tiles.handle, 2, None), "AVX512"))
    assert not kernels.attention_pays(*half)


def test_a_trial_draws_no_random_numbers() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    assert isinstance(quicker(1, 80, 77, 40, 40, torch.get_num_threads()), bool)
    assert torch.equal(torch.rand(3), wanted)
