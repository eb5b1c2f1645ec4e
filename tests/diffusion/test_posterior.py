"""Posterior guidances against the closed form for normally distributed pictures, and gradients in the driver."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sfumato.cond import Cond
from sfumato.diffusion import Driver, Plain, Point, Run, get_sampler, make_grid
from sfumato.diffusion.degrade import Degradation
from sfumato.diffusion.guidance import Guidance, needs_gradients
from sfumato.diffusion.posterior import Descended, Projected

from .oracle import VP
from .test_degrade import ALL, SHAPE, dense

MEAN, SPREAD, NOISE = 0.1, 0.4, 0.2


def denoised(x: Tensor, point: Point) -> Tensor:
    """E[x0 | x] of pictures whose numbers are independent, of mean MEAN and deviation SPREAD."""
    data = (point.alpha * SPREAD) ** 2
    return MEAN + point.alpha * SPREAD**2 / (data + point.sigma**2) * (x - point.alpha * MEAN)


def expected(x: Tensor, point: Point, degradation: Degradation, y: Tensor) -> Tensor:
    """E[x0 | x, y] of the same pictures by dense linear algebra: precisions add."""
    matrix = dense(degradation)
    unit = torch.eye(x.numel(), dtype=torch.float64)
    precision = unit / SPREAD**2 + unit * (point.alpha / point.sigma) ** 2 + matrix.T @ matrix / NOISE**2
    told = MEAN / SPREAD**2 + point.alpha / point.sigma**2 * x.flatten() + matrix.T @ y.flatten() / NOISE**2
    return torch.linalg.solve(precision, told).view(x.shape)


def drawn(seed: int, shape: Sequence[int] = SHAPE) -> Tensor:
    """Standard noise in float64."""
    return torch.randn(tuple(shape), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("t", [20.0, 400.0, 900.0])
@pytest.mark.parametrize("name", ALL)
def test_projected_is_the_conditional_mean_of_normal_pictures(name: str, t: float) -> None:
    degradation, point, x = ALL[name], VP.point(t), drawn(0)
    y = degradation.forward(MEAN + SPREAD * drawn(1))
    guidance = Projected(Plain(Cond()), degradation, y, NOISE, spread=SPREAD, limit=100.0)
    found = guidance.combine(x, point, [denoised(x, point)])
    apart = (found - expected(x, point, degradation, y)).abs().max().item()
    print(f"{name} at {t}: {apart}")
    assert apart < 2e-5 if name == "blur" else apart < 1e-10  # a blur does without its finest waves


@pytest.mark.parametrize("t", [20.0, 400.0, 900.0])
@pytest.mark.parametrize("name", ["noise", "missing"])
def test_descended_is_the_conditional_mean_where_seen_pixels_are_independent(name: str, t: float) -> None:
    degradation, point = ALL[name], VP.point(t)
    y = degradation.forward(MEAN + SPREAD * drawn(1))
    x = drawn(0).requires_grad_()
    guidance = Descended(Plain(Cond()), degradation, y, NOISE, spread=SPREAD)
    found = guidance.combine(x, point, [denoised(x, point)])
    apart = (found - expected(x.detach(), point, degradation, y)).abs().max().item()
    print(f"{name} at {t}: {apart}")
    assert apart < 1e-10


@pytest.mark.parametrize("name", ["missing", "lowres"])
def test_without_noise_what_was_seen_is_kept(name: str) -> None:
    degradation, point, x = ALL[name], VP.point(500.0), drawn(0)
    y = degradation.forward(0.3 * drawn(1))
    found = Projected(Plain(Cond()), degradation, y).combine(x, point, [denoised(x, point)])
    apart = (degradation.forward(found) - y).abs().max().item()
    print(apart)
    assert apart < 1e-12


class Net:
    """The denoiser above, saying v."""

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        point = VP.point(float(t[0]))
        x0 = denoised(x, point)
        return (point.alpha * x - x0) / point.sigma


def run(guidance: Guidance, sampler: str = "heun", steps: int = 40) -> Run:
    grid = make_grid(VP, "karras", steps)
    return Run.begin(get_sampler(sampler), drawn(7), grid, lambda x: torch.zeros_like(x), guidance, "v_prediction")


def guidances() -> list[Guidance]:
    """One without gradients, two with."""
    y = [ALL[name].forward(MEAN + SPREAD * drawn(1)) for name in ("missing", "noise")]
    inner = Plain(Cond())
    return [
        Projected(inner, ALL["missing"], y[0], NOISE, spread=SPREAD, limit=100.0),
        Descended(inner, ALL["missing"], y[0], NOISE, spread=SPREAD),
        Descended(inner, ALL["noise"], y[1], NOISE, spread=SPREAD),
    ]


def test_the_driver_traces_those_that_ask_for_gradients_alone() -> None:
    assert [needs_gradients(g) for g in guidances()] == [False, True, True]
    driver = Driver(Net())
    runs = [run(g) for g in guidances()]
    for r in runs:
        driver.add(r)
    while driver.active:
        driver.turn()
    assert not any(r.result.requires_grad for r in runs if r.result is not None)
    # Both kinds say the same here, so they end at the same picture.
    assert runs[0].result is not None and runs[1].result is not None
    apart = (runs[0].result - runs[1].result).abs().max().item()
    print(f"{apart}; {driver.calls} calls")
    assert apart < 1e-10
    assert driver.calls == 3 * runs[0].total


def test_the_samples_are_those_of_the_posterior() -> None:
    """The flow of normal data keeps each number's place in its distribution: mean + deviation * standard noise."""
    (result,) = [run(g, steps=200) for g in guidances()[2:]]
    driver = Driver(Net())
    driver.add(result)
    while driver.active:
        driver.turn()
    y = ALL["noise"].forward(MEAN + SPREAD * drawn(1))
    share = SPREAD**2 / (SPREAD**2 + NOISE**2)
    mean, deviation = MEAN + share * (y - MEAN), SPREAD * (1 - share) ** 0.5
    assert result.result is not None
    apart = (result.result - (mean + deviation * drawn(7))).abs().max().item()
    print(apart)
    assert apart < 2e-2
