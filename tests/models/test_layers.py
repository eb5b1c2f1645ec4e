"""The layers whose mathematics is written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.models.layers import GroupNorm, GroupNormBySums, sinusoidal

from .parity import assert_close


def case(size: int, silu: bool, dtype: torch.dtype) -> tuple[GroupNorm, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    norm = GroupNorm(4, 8, eps=1e-5, silu=silu).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(8, generator=generator))
        norm.bias.copy_(torch.randn(8, generator=generator))
    x = 3 * torch.randn(3, 8, size, size, generator=generator, dtype=dtype) + 2
    grad = torch.randn(3, 8, size, size, generator=generator, dtype=dtype)
    return norm, x.contiguous(memory_format=torch.channels_last), grad


def reference(norm: GroupNorm, x: Tensor, silu: bool) -> Tensor:
    h = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(h) if silu else h


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("size", [5, 32])
def test_group_norm_by_sums_is_group_norm(size: int, silu: bool) -> None:
    norm, x, grad = case(size, silu, torch.float32)
    x.requires_grad_()
    out = norm(x)
    assert "GroupNormBySums" in str(out.grad_fn)
    parameters = (x, norm.weight, norm.bias)
    ours = torch.autograd.grad(out, parameters, grad)
    expected = reference(norm, x, silu)
    theirs = torch.autograd.grad(expected, parameters, grad)
    assert_close("output", out, expected, 1e-6)
    for name, a, b in zip(("x", "weight", "bias"), ours, theirs, strict=True):
        assert_close(f"gradient of {name}", a, b, 1e-5)
    with torch.no_grad():
        assert_close("inference", norm(x), expected, 1e-6)


@pytest.mark.parametrize("silu", [True, False])
def test_gradient_of_group_norm_by_sums_is_that_of_finite_differences(silu: bool) -> None:
    norm, x, _ = case(3, silu, torch.float64)

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return GroupNormBySums.apply(x, weight, bias, norm.num_groups, norm.eps, silu)

    assert torch.autograd.gradcheck(f, (x.requires_grad_(), norm.weight, norm.bias))


def test_group_norm_is_right_when_the_mean_is_far_from_zero() -> None:
    norm, x, _ = case(5, True, torch.float32)
    x = x + 50
    expected = reference(norm.double(), x.double(), True)
    assert_close("mean 50, deviation 3", norm.float()(x).double(), expected, 1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grad", [True, False])
def test_group_norm_leaves_its_input_alone(layout: torch.memory_format, grad: bool) -> None:
    norm, x, _ = case(5, True, torch.float32)
    x = x.contiguous(memory_format=layout)
    before = x.clone()
    with torch.set_grad_enabled(grad):
        out = norm(x)
    assert torch.equal(x, before)
    assert out.is_contiguous(memory_format=layout)


def test_groups_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="norm_num_groups = 3 does not divide 8 channels"):
        GroupNorm(3, 8, eps=1e-5)


def test_sinusoidal_runs_from_1_to_one_ten_thousandth() -> None:
    t = torch.tensor([0.0, 2.0, 731.25])
    features = sinusoidal(t, 8, flip_sin_to_cos=True, freq_shift=1)
    rates = torch.tensor([1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3), 1e-4])
    angles = t[:, None] * rates
    assert_close("cosines first", features, torch.cat([angles.cos(), angles.sin()], dim=1))
    swapped = sinusoidal(t, 8, flip_sin_to_cos=False, freq_shift=1)
    assert torch.equal(swapped, torch.cat([features[:, 4:], features[:, :4]], dim=1))
    assert sinusoidal(t, 7, flip_sin_to_cos=True, freq_shift=0).shape == (3, 7)
