"""The attention kernel against float64, on this processor's instructions and on emulated ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato import kernels
from sfumato.kernels.attention import fused
from tests.kernels.conftest import needs_library

pytestmark = [needs_library, pytest.mark.usefixtures("real_and_emulated")]
BOUND = 2e-5  # of the largest value
LAYOUTS = {
    "heads first": lambda t: t,
    "heads inside": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "width first": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every other number": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    "one head for all": lambda t: t[:, :1].expand(t.shape),
}


def exact(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float = 1
) -> Tensor:
    """softmax(scale * q k^T + mask) v in float64; 0 for a query that sees nothing."""
    q, k, v = q.double(), k.double(), v.double()
    scores = scale * q @ k.transpose(2, 3)
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    return torch.nan_to_num(torch.softmax(scores, dim=-1)) @ v


def difference(got: Tensor, wanted: Tensor, v: Tensor) -> float:
    found = float((got.double() - wanted).abs().max() / v.double().abs().max())
    print(f"largest difference {found:.1e} of the largest value")
    return found


def tensors(q: tuple[int, ...], keys: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    B, N, _, D = q
    return (torch.randn(q, generator=g), torch.randn(B, N, keys, D, generator=g),
            torch.randn(B, N, keys, width, generator=g))  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 70), st.integers(1, 90)),
    keys=st.integers(1, 420),
    width=st.integers(1, 90),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    kind=st.sampled_from(["none", "causal", "boolean", "additive", "padding"]),
    scale=st.sampled_from([None, 0.1, 1.0]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_it_is_attention(
    shape: tuple[int, int, int, int], keys: int, width: int, layouts: tuple[str, ...], kind: str, scale: float | None,
    threads: int, seed: int,
) -> None:  # fmt: skip
    q, k, v = (LAYOUTS[layout](t) for layout, t in zip(layouts, tensors(shape, keys, width, seed), strict=True))
    g = torch.Generator().manual_seed(seed)
    mask = {
        "boolean": torch.rand(shape[0], 1, shape[2], keys, generator=g) < 0.6,
        "additive": torch.randn(shape[1], shape[2], keys, generator=g).masked_fill(
            torch.rand(shape[1], shape[2], keys, generator=g) < 0.3, -math.inf
        ),
        "padding": (torch.arange(keys) < max(1, keys // 2)).expand(shape[2], keys),
    }.get(kind)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = fused(q, k, v, mask, kind == "causal", scale)
    finally:
        torch.set_num_threads(before)
    wanted = exact(q, k, v, mask, kind == "causal", shape[3] ** -0.5 if scale is None else scale)
    assert got.shape == wanted.shape and got.dtype == torch.float32
    assert difference(got, wanted, v) < BOUND


@pytest.mark.parametrize("shape, keys", [((1, 1, 40, 512), 300), ((2, 8, 64, 160), 77), ((1, 2, 500, 40), 500)])
def test_the_models_shapes(shape: tuple[int, int, int, int], keys: int) -> None:
    q, k, v = tensors(shape, keys, shape[3])
    assert difference(fused(q, k, v), exact(q, k, v, scale=shape[3] ** -0.5), v) < BOUND


def test_sharp_and_flat_scores() -> None:
    """One key far above the others, all keys alike, and a maximum that comes last."""
    q, k, v = tensors((1, 3, 33, 8), 400, 8)
    q[:, 0] *= 100
    q[:, 1] = 0
    k[:, 2] *= torch.linspace(0, 30, 400)[:, None]
    assert difference(fused(q, k, v, scale=1.0), exact(q, k, v), v) < 2e-4  # scores of 1e3 are good to 6e-5 themselves
    assert difference(fused(q, k, v, scale=1.0)[:, 1], v[:, 1].double().mean(1, keepdim=True), v) < 1e-6


def test_a_query_that_sees_nothing_gets_zero() -> None:
    q, k, v = tensors((1, 1, 5, 8), 9, 8)
    mask = torch.ones(5, 9, dtype=torch.bool)
    mask[2] = False
    got = fused(q, k, v, mask)
    assert torch.equal(got[0, 0, 2], torch.zeros(8)) and difference(got, exact(q, k, v, mask, scale=8**-0.5), v) < BOUND


def test_what_is_not_a_number_shows() -> None:
    q, k, v = tensors((1, 2, 20, 8), 30, 8)
    q[0, 0, 3, 1] = math.nan
    k[0, 1, 29, 0] = math.nan
    got = fused(q, k, v)
    assert got[0, 0, 3].isnan().all() and got[0, 1].isnan().all()
    assert not got[0, 0, :3].isnan().any() and not got[0, 0, 4:].isnan().any()


def test_bfloat16_is_read_and_written() -> None:
    q, k, v = (t.bfloat16() for t in tensors((2, 2, 37, 40), 77, 24))
    got = fused(q, k, v)
    assert got.dtype == torch.bfloat16
    assert difference(got, exact(q, k, v, scale=40**-0.5), v) < 2**-8  # the rounding of the answer


def test_threads_and_neighbours_change_nothing() -> None:
    q, k, v = tensors((3, 2, 200, 40), 130, 40)
    before = torch.get_num_threads()
    answers = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        answers.append(fused(q, k, v, is_causal=True))
    torch.set_num_threads(before)
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    assert torch.equal(fused(q[1:2], k[1:2], v[1:2], is_causal=True), answers[0][1:2])


def test_the_answer_joins_its_heads_without_a_copy() -> None:
    got = kernels.attention(*tensors((2, 4, 72, 40), 77, 40))
    assert got.transpose(1, 2).is_contiguous()


def test_where_pytorch_is_as_good_it_answers() -> None:
    assert kernels.attention_pays(*tensors((2, 8, 4096, 40), 77, 40))
    assert not kernels.attention_pays(*tensors((2, 8, 64, 160), 64, 160))
    assert not kernels.attention_pays(*tensors((1, 1, 256, 512), 256, 512))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(1, 2, 9, 7)}, r"give \(B, N, L, D\)"),
        ({"v": torch.zeros(1, 2, 9, 8, dtype=torch.float64)}, "use float32 or bfloat16"),
        ({"mask": torch.zeros(5, 9, dtype=torch.int64)}, "use bool or float32"),
        ({"mask": torch.ones(5, 9, dtype=torch.bool), "is_causal": True}, "not both"),
    ],
)
def test_what_it_cannot_take_is_refused(change: dict[str, Tensor], message: str) -> None:
    q, k, v = tensors((1, 2, 5, 8), 9, 8)
    with pytest.raises(ValueError, match=message):
        fused(**{"q": q, "k": k, "v": v, **change})
