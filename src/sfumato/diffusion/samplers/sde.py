"""Samplers that add noise on the way: ancestral steps and solvers of the reverse SDE."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import numpy as np
from torch import Tensor

from ..path import Point
from .base import Noise, Steps, Straight, ancestral, between, increment, move, quadrature, renoise, sampler
from .classic import heun_step
from .logsnr import extrapolated


@sampler("ddpm", order=1, stochastic=True)
def ddpm(x: Tensor, grid: Sequence[Point], noise: Noise, variance: Literal["small", "large"] = "small") -> Steps:
    """Ancestral sampling (Ho et al. 2020, algorithm 2).

    variance: of the noise: the posterior's ("small"), or on a variance-preserving path beta ("large").
    """
    for a, b in pairwise(grid):
        x, x0 = yield x, a
        down, up = ancestral(a, b)
        x = move(x, x0, a, down)
        if up > 0:
            std = up if variance == "small" else math.sqrt(1 - (a.alpha / b.alpha) ** 2)
            x = x + std * noise(x)
    return x


@sampler("euler_a", order=1, stochastic=True)
def euler_a(x: Tensor, grid: Sequence[Point], noise: Noise, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """Euler with ancestral noise, as in k-diffusion; s_noise scales the noise that is added."""
    for a, b in pairwise(grid):
        x, x0 = yield x, a
        down, up = ancestral(a, b, eta)
        x = move(x, x0, a, down)
        if up > 0:
            x = x + up * s_noise * noise(x)
    return x


@sampler("dpm2_a", order=2, stochastic=True)
def dpm2_a(x: Tensor, grid: Sequence[Point], noise: Noise, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """dpm2 with ancestral noise, as in k-diffusion."""
    line = Straight(grid)
    for a, b in pairwise(grid):
        x, x0 = yield x, a
        down, up = ancestral(a, b, eta)
        if down.sigma == 0 or a.alpha == 0:
            x = move(x, x0, a, down)
        else:
            m = between(a, down)
            x_m, x0_m = yield move(x, x0, a, m), m
            x = line.advance(x, line.slope(x_m, x0_m, m), a, down)
        if up > 0:
            x = x + up * s_noise * noise(x)
    return x


@sampler("dpmpp_2s_a", order=2, stochastic=True)
def dpmpp_2s_a(x: Tensor, grid: Sequence[Point], noise: Noise, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """DPM-Solver++(2S) (Lu et al. 2022, algorithm 1) with ancestral noise, as in k-diffusion."""
    for a, b in pairwise(grid):
        x, x0 = yield x, a
        down, up = ancestral(a, b, eta)
        if down.sigma > 0 and a.alpha > 0:
            m = between(a, down)
            _, x0 = yield move(x, x0, a, m), m
        x = move(x, x0, a, down)
        if up > 0:
            x = x + up * s_noise * noise(x)
    return x


@sampler("dpmpp_sde", order=2, stochastic=True)
def dpmpp_sde(x: Tensor, grid: Sequence[Point], noise: Noise, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """SDE-DPM-Solver++(2S) as in k-diffusion (after Lu et al. 2022, section 5), on one Brownian path.

    The noise of the whole step is made of that of its halves, each carried to the end.
    """
    for a, b in pairwise(grid):
        x, x0 = yield x, a
        down, up = ancestral(a, b, eta)
        if b.sigma == 0 or a.alpha == 0:
            x = move(x, x0, a, down)
            x = x + up * s_noise * increment(noise, x, a, b) if up > 0 else x
            continue
        m = between(a, b)
        (down_m, up_m), (carried, up_b) = ancestral(a, m, eta), ancestral(m, b, eta)
        first = increment(noise, x, a, m)
        _, x0 = yield move(x, x0, a, down_m) + up_m * s_noise * first, m
        parts = up_m * carried.sigma / m.sigma, up_b
        both = parts[0] * first + parts[1] * increment(noise, x, m, b)
        whole = math.hypot(*parts)  # up, when eta is 1
        x = move(x, x0, a, down) + (up / whole * s_noise * both if whole > 0 else 0)
    return x


@sampler("dpmpp_2m_sde", order=1, stochastic=True)
def dpmpp_2m_sde(
    x: Tensor,
    grid: Sequence[Point],
    noise: Noise,
    eta: float = 1.0,
    s_noise: float = 1.0,
    rule: Literal["midpoint", "heun"] = "midpoint",
    euler_at_final: bool = False,
    brownian: bool = False,
) -> Steps:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, section 5): dpmpp_2m with noise, scaled by eta.

    brownian: noise comes from the picture's Brownian path, which other numbers of steps share.
    """
    old, before = None, grid[0]
    for i, (a, b) in enumerate(pairwise(grid)):
        x, x0 = yield x, a
        if euler_at_final and i == len(grid) - 2:
            old = None
        h = b.log_snr - a.log_snr
        down = Point(b.t, b.alpha, b.sigma * math.exp(-eta * h) if eta > 0 else b.sigma)
        up = math.sqrt(max(b.sigma**2 - down.sigma**2, 0.0))
        x = move(x, extrapolated(x0, old, (before, a, b), (1 + eta) * h, rule), a, down)
        if up > 0:
            x = x + up * s_noise * (increment(noise, x, a, b) if brownian else noise(x))
        old, before = x0, a
    return x


@sampler("dpmpp_2m_sde_heun", order=1, stochastic=True)
def dpmpp_2m_sde_heun(x: Tensor, grid: Sequence[Point], noise: Noise, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """dpmpp_2m_sde with the other extrapolation, as in k-diffusion's solver_type "heun"."""
    return (yield from dpmpp_2m_sde(x, grid, noise, eta, s_noise, rule="heun"))


@sampler("dpmpp_3m_sde", order=2, stochastic=True)
def dpmpp_3m_sde(x: Tensor, grid: Sequence[Point], noise: Noise, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """DPM-Solver++(3M) SDE as in k-diffusion: x0 is a parabola in log-SNR, noise comes from one Brownian path."""
    past: list[tuple[Point, Tensor]] = []  # newest first
    for a, b in pairwise(grid):
        x, x0 = yield x, a
        h = b.log_snr - a.log_snr
        bent = x0
        if past and not math.isinf(h) and h > 1e-9:
            bent = x0 + parabola((a, x0), past, h, (1 + eta) * h)
        down = replace(b, sigma=b.sigma * math.exp(-eta * h) if eta > 0 else b.sigma)
        up = math.sqrt(max(b.sigma**2 - down.sigma**2, 0.0))
        x = move(x, bent, a, down)
        if up > 0:
            x = x + up * s_noise * increment(noise, x, a, b)
        past = [(a, x0), *past][:2] if a.alpha > 0 else []
    return x


def parabola(here: tuple[Point, Tensor], past: Sequence[tuple[Point, Tensor]], h: float, h_eta: float) -> Tensor:
    """What derivatives in log-SNR add to x0 in a step of h, when one and two steps back are known.

    h_eta: the step times 1 + eta, over which the exponential decays.
    """
    a, x0 = here
    phi_2 = math.expm1(-h_eta) / h_eta + 1
    r_0 = (a.log_snr - past[0][0].log_snr) / h
    first = (x0 - past[0][1]) / r_0
    if len(past) == 1:
        return phi_2 / -math.expm1(-h_eta) * first
    r_1 = (past[0][0].log_snr - past[1][0].log_snr) / h
    bend = (first - (past[0][1] - past[1][1]) / r_1) / (r_0 + r_1)
    phi_3 = phi_2 / h_eta - 0.5
    return (phi_2 * (first + r_0 * bend) - phi_3 * bend) / -math.expm1(-h_eta)


def er_scale(ratio: float) -> float:
    """The noise scale that the paper recommends, ER-SDE 5 (Cui et al. 2023, appendix)."""
    return ratio * (math.exp(ratio**0.3) + 10)


@sampler("er_sde", order=2, stochastic=True)
def er_sde(
    x: Tensor,
    grid: Sequence[Point],
    noise: Noise,
    stages: int = 3,
    s_noise: float = 1.0,
    phi: Callable[[float], float] = er_scale,
) -> Steps:
    """Extended reverse-time SDE solver of up to three stages (Cui et al. 2023, VP ER-SDE-Solver-3).

    phi: the noise scale, a function of sigma / alpha; the identity gives the ODE.
    """
    past: list[tuple[float, Tensor, Tensor | None]] = []  # newest first: ratio, x0 and its derivative there
    for a, b in pairwise(grid):
        x, x0 = yield x, a
        if b.sigma == 0 or a.alpha == 0:  # all that remains of x is noise, which fresh noise replaces
            x = b.alpha * x0
            x = x + b.sigma * s_noise * noise(x) if b.sigma > 0 else x
            continue
        r = phi(b.ratio) / phi(a.ratio)
        x = b.alpha * (r / a.alpha * x + (1 - r) * x0)
        slope = None
        if past and stages > 1:
            where, weight = quadrature(math.log(b.ratio), math.log(a.ratio), 32)
            ratios = np.exp(where)
            density = weight * ratios / np.array([phi(ratio) for ratio in ratios])
            ds = b.ratio - a.ratio
            slope = (x0 - past[0][1]) / (a.ratio - past[0][0])
            x = x + b.alpha * (ds + phi(b.ratio) * float(density.sum())) * slope
            if past[0][2] is not None and stages > 2:
                curve = (slope - past[0][2]) / ((a.ratio - past[1][0]) / 2)
                bend = ds**2 / 2 + phi(b.ratio) * float((density * (ratios - a.ratio)).sum())
                x = x + b.alpha * bend * curve
        std = b.alpha * math.sqrt(max(b.ratio**2 - (a.ratio * r) ** 2, 0.0))
        if std > 1e-9:
            x = x + std * s_noise * noise(x)
        past = [(a.ratio, x0, slope), *past][:2]
    return x


@sampler("restart", order=2, stochastic=True)
def restart(
    x: Tensor, grid: Sequence[Point], noise: Noise, low: float = 0.1, high: float = 2.0, times: int = 1
) -> Steps:
    """Restart sampling (Xu et al. 2023, algorithm 1): Heun's method that does a part again, on top of the steps.

    Once at the grid's point with sigma / alpha nearest to `low`, it goes back to the one nearest to `high` and comes
    again over the points in between, `times` times, for two evaluations a step. 0.1 and 2 are what the authors take
    for Stable Diffusion at guidance 5 and 8, there twice and over 10 points of their own.
    """
    line = Straight(grid)
    inside = [i for i, p in enumerate(grid) if p.alpha > 0 and p.sigma > 0]
    top, bottom = (min(inside, key=lambda i: abs(math.log(grid[i].ratio / level)), default=0) for level in (high, low))
    for i, (a, b) in enumerate(pairwise(grid)):
        x = yield from heun_step(x, a, b, line)
        for _ in range(times if i + 1 == bottom > top else 0):
            x = renoise(x, grid[bottom], grid[top], noise)
            for c, d in pairwise(grid[top : bottom + 1]):
                x = yield from heun_step(x, c, d, line)
    return x
