"""Products and convolutions by the kernel against float64, on this processor's instructions and on emulated ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.kernels import Product, layer_norm, product
from tests.kernels.conftest import needs_library

pytestmark = [needs_library, pytest.mark.usefixtures("real_and_emulated")]
BOUND = 1e-5  # of the largest value
SIDES = st.integers(1, 40)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(got: Tensor, wanted: Tensor) -> None:
    found = float((got.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1))
    print(f"largest difference {found:.1e} of the largest value")
    assert got.shape == wanted.shape and found < BOUND


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 130), wide=SIDES, deep=st.integers(1, 900), packed=st.booleans(), more=st.booleans())
def test_rows_times_a_matrix(
    rows: int, wide: int, deep: int, packed: bool, more: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "PACKED_UP_TO", 2**30 if packed else 0)
    x, weight = drawn(0, 1, rows, deep), drawn(1, wide, deep) / deep**0.5
    bias, add = (drawn(2, wide), drawn(3, 1, rows, wide)) if more else (None, None)
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    check(Product(weight).linear(x, bias, add), wanted if add is None else wanted + add)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pictures=st.integers(1, 3), height=st.integers(3, 14), width=st.integers(3, 14), ins=SIDES, outs=SIDES,
    form=st.sampled_from([(3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 1, 0), (5, 1, 2)]), doubled=st.booleans(),
    packed=st.booleans(),
)  # fmt: skip
def test_convolutions(
    pictures: int,
    height: int,
    width: int,
    ins: int,
    outs: int,
    form: tuple[int, int, int],
    doubled: bool,
    packed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(product, "PACKED_UP_TO", 2**30 if packed else 0)
    kernel, stride, padding = form
    x = drawn(0, pictures, ins, height, width).contiguous(memory_format=torch.channels_last)
    weight, bias = drawn(1, outs, ins, kernel, kernel) / (ins * kernel**2) ** 0.5, drawn(2, outs)
    seen = F.interpolate(x, scale_factor=2.0, mode="nearest") if doubled else x
    wanted = F.conv2d(seen.double(), weight.double(), bias.double(), stride, padding)
    add = drawn(3, *wanted.shape).contiguous(memory_format=torch.channels_last)
    got = Product(weight, stride, padding, doubled).convolution(x, bias, add)
    assert got.is_contiguous(memory_format=torch.channels_last)
    check(got, wanted + add)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_work(threads: int) -> None:
    x, weight, before = drawn(0, 2, 70, 300), drawn(1, 90, 300), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(Product(weight).linear(x), F.linear(x.double(), weight.double()))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("width", [1, 7, 8, 48, 100])
def test_layer_norm(width: int) -> None:
    x, weight, bias = 5 + drawn(0, 3, 4, width), drawn(1, width), drawn(2, width)
    wanted = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5)
    check(layer_norm(x, weight, bias, 1e-5), wanted)


def test_other_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no product kernel for weights of torch\.float64 on cpu"):
        Product(torch.zeros(2, 2, dtype=torch.float64))
