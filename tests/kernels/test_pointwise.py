"""Group norm with SiLU, and GEGLU, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfumato import kernels
from sfumato.kernels import library
from tests.kernels.conftest import needs_library

RULES = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture(params=["off", pytest.param("real", marks=needs_library), "avx512 emulated"], autouse=True)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "off":
        monkeypatch.setattr(library, "_open", lambda: (None, "off"))
    elif request.param != "real":
        emulated = request.getfixturevalue("emulated")
        monkeypatch.setattr(library, "_open", lambda: (emulated, "emulated"))
    yield request.param


@RULES
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 5),
    width=st.integers(2, 20),
    sides=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    silu=st.booleans(),
    mean=st.sampled_from([0.0, 3.0, -30.0]),
    last=st.booleans(),
)
def test_group_norm(
    instructions: str, batch: int, groups: int, width: int, sides: tuple[int, int], silu: bool, mean: float, last: bool
) -> None:
    C = groups * width
    g = torch.Generator().manual_seed(C)
    x = torch.randn(batch, C, *sides, generator=g) + mean
    if last:
        x = x.to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, C, generator=g)
    got = kernels.group_norm(x, groups, weight, bias, 1e-2, silu)
    n = x.double().reshape(batch, groups, -1)
    n = (n - n.mean(2, keepdim=True)) / (n.var(2, keepdim=True, unbiased=False) + 1e-2).sqrt()
    wanted = n.view(x.shape) * weight.double()[:, None, None] + bias.double()[:, None, None]
    wanted = wanted * torch.sigmoid(wanted) if silu else wanted
    worst = float((got - wanted).abs().max() / (1 + wanted.abs().max()))
    print(f"largest difference {worst:.1e}")
    assert got.stride() == x.stride()
    ours = instructions != "off" and last
    # a mean of m costs its rounding errors over the deviation of 1; PyTorch's sums of squares lose more
    assert worst < (5e-6 if ours else 1e-4) * (1 + abs(mean))


@RULES
@given(rows=st.integers(0, 40), width=st.integers(1, 70), size=st.sampled_from([0.1, 1.0, 8.0]))
def test_geglu(rows: int, width: int, size: float) -> None:
    g = torch.Generator().manual_seed(width)
    x = size * torch.randn(2, rows, 2 * width, generator=g)
    h, gate = x.double().chunk(2, dim=-1)
    got, wanted = kernels.geglu(x), h * F.gelu(gate)
    assert got.shape == wanted.shape
    worst = float(((got - wanted).abs() / (1e-6 + h.abs() * (1 + gate.abs()))).max()) if rows else 0.0
    print(f"largest difference {worst:.1e}")
    assert worst < 5e-7


def test_gelu_and_silu_of_every_size() -> None:
    """From far below to far above 0, and what is not a number stays so."""
    gate = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([-1e18, 1e18, torch.nan])])
    got = kernels.geglu(torch.cat([torch.ones_like(gate), gate])[None])[0]
    assert got[-1].isnan() and not got[:-1].isnan().any()
    wanted = F.gelu(gate.double())
    assert float(((got - wanted)[:-1].abs() / (1 + gate[:-1].abs())).max()) < 5e-7
    x = gate[:4001].view(1, 1, 4001, 1).to(memory_format=torch.channels_last)
    weight, bias = torch.tensor([57.0]), torch.zeros(1)  # back to about -100 ... 100
    got = kernels.group_norm(x, 1, weight, bias, 1e-5, silu=True)
    wanted = F.silu(F.group_norm(x.double(), 1, weight.double(), bias.double(), 1e-5))
    assert float(((got - wanted).abs() / (1 + wanted.abs())).max()) < 5e-6


def test_bfloat16_is_rounded_once(instructions: str) -> None:
    """What the kernels read and write; beside float64, rounding the answer is all that is lost.

    Without them PyTorch rounds in between as well.
    """
    bound = 2**-6 if instructions == "off" else 2**-8
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(n, generator=g).bfloat16() for n in ((2, 12, 5, 9), (12,), (12,)))
    x = x.to(memory_format=torch.channels_last)
    got = kernels.group_norm(x, 3, weight, bias, 1e-5, silu=True)
    wanted = F.silu(F.group_norm(x.double(), 3, weight.double(), bias.double(), 1e-5))
    assert got.dtype == torch.bfloat16 and got.stride() == x.stride()
    assert float(((got - wanted).abs() / (1e-4 + wanted.abs())).max()) < bound
    gates = 3 * torch.randn(7, 2 * 37, generator=g).bfloat16()
    got, (h, gate) = kernels.geglu(gates), gates.double().chunk(2, dim=-1)
    wanted = h * F.gelu(gate)
    assert got.dtype == torch.bfloat16
    assert float(((got - wanted).abs() / (1e-4 + wanted.abs())).max()) < bound
