"""Samplers that extrapolate or integrate exactly in log-SNR: the DPM-Solver family, UniPC, DEIS, RES."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from torch import Tensor

from ..path import Point
from .base import Noise, Steps, lagrange, move, quadrature, sampler, weighted


def extrapolated(
    x0: Tensor,
    old: Tensor | None,
    points: tuple[Point, Point, Point],
    h: float,
    rule: Literal["midpoint", "heun"],
) -> Tensor:
    """x0 extrapolated in log-SNR into the coming step, from itself and the one before (Lu et al. 2022).

    points: before, here, next. h: the step in log-SNR, times 1 + eta when noise is added.
    """
    before, a, b = points
    if old is None or math.isinf(h) or abs(h) < 1e-9:  # a schedule may end in the same place twice
        return x0
    last = a.log_snr - before.log_snr  # infinite after a step from pure noise, which extrapolates nothing
    weight = 0.5 if rule == "midpoint" else -1 / math.expm1(-h) - 1 / h
    return x0 + weight * (b.log_snr - a.log_snr) / last * (x0 - old)


@sampler("dpmpp_2m", order=2)
def dpmpp_2m(
    x: Tensor,
    grid: Sequence[Point],
    noise: Noise,
    rule: Literal["midpoint", "heun"] = "midpoint",
    euler_at_final: bool = False,
) -> Steps:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); a step to sigma 0 is first order by nature.

    euler_at_final: make the last step first order also where the grid ends above sigma 0.
    """
    old, before = None, grid[0]
    for i, (a, b) in enumerate(pairwise(grid)):
        x, x0 = yield x, a
        if euler_at_final and i == len(grid) - 2:
            old = None
        x = move(x, extrapolated(x0, old, (before, a, b), b.log_snr - a.log_snr, rule), a, b)
        old, before = x0, a
    return x


@sampler("dpmpp_2s", order=2)
def dpmpp_2s(
    x: Tensor, grid: Sequence[Point], noise: Noise, alone: bool = False, lower_order_final: bool = False
) -> Steps:
    """DPM-Solver++(2S) (Lu et al. 2022, algorithm 1); every other point of the grid is a midpoint.

    alone: the first point is nobody's start, so its step is of first order. lower_order_final: so is the last.
    """
    rest = list(grid)
    while len(rest) > 1:
        a, m, *after = rest
        x, x0 = yield x, a
        h = after[0].log_snr - a.log_snr if after else math.inf
        if math.isinf(h) or alone or (lower_order_final and len(after) == 1):
            x, rest, alone = move(x, x0, a, m), rest[1:], False
            continue
        _, x0_m = yield move(x, x0, a, m), m
        weight = h / (2 * (m.log_snr - a.log_snr))
        x, rest = move(x, x0 + weight * (x0_m - x0), a, after[0]), rest[2:]
    return x


@sampler("res_multistep", order=2)
def res_multistep(x: Tensor, grid: Sequence[Point], noise: Noise) -> Steps:
    """Refined exponential solver of two steps (Zhang et al. 2023, RES): x0 is linear in log-SNR, integrated exactly.

    In these variables it is dpmpp_2m with the other rule.
    """
    return (yield from dpmpp_2m(x, grid, noise, rule="heun"))


@sampler("deis", order=2)
def deis(x: Tensor, grid: Sequence[Point], noise: Noise, history: int = 2, lower_order_final: bool = False) -> Steps:
    """DEIS (Zhang & Chen 2022, tAB in log rho): eps is a polynomial in log(sigma / alpha), integrated exactly.

    history: how many eps the polynomial goes through, the order after as many steps. lower_order_final: fewer
    in the last steps.
    """
    past: list[tuple[Point, Tensor]] = []  # newest first
    for i, (a, b) in enumerate(pairwise(grid)):
        x, x0 = yield x, a
        if a.alpha == 0:  # pure noise has no log(sigma / alpha)
            x = move(x, x0, a, b)
            continue
        past = [(a, (x - a.alpha * x0) / a.sigma), *past][:history]
        used = past[: len(grid) - 1 - i] if lower_order_final else past
        if b.sigma == 0 or len(used) == 1:
            x = move(x, x0, a, b)
            continue
        where, weight = quadrature(-a.log_snr, -b.log_snr, 16)
        basis = lagrange([-p.log_snr for p, _ in used], where)
        change = weighted([float(np.sum(weight * np.exp(where) * f)) for f in basis], [eps for _, eps in used])
        x = b.alpha * (x / a.alpha + change)
    return x


@sampler("unipc", order=2)
def unipc(
    x: Tensor,
    grid: Sequence[Point],
    noise: Noise,
    solver_order: int = 2,
    variant: Literal["bh1", "bh2"] = "bh2",
    lower_order_final: bool = True,
) -> Steps:
    """UniPC (Zhao et al. 2023, algorithms 5 and 6): each evaluation also corrects the step that led to it.

    solver_order: how many x0 the predictor uses; the corrector adds one. variant: the paper's B(h).
    """
    past: list[tuple[Point, Tensor]] = []  # newest first; what the coming step uses
    begin = foreseen = x
    for i, (a, b) in enumerate(pairwise(grid)):
        x, x0 = yield x, a
        if past:
            x = x + (unified(begin, past, a, variant, x0) - foreseen)  # so that the caller's edits stay
        left = len(grid) - 1 - i if lower_order_final else solver_order
        known = [(p, old) for p, old in past if p.alpha > 0]
        past = [(a, x0), *known][:solver_order]
        past = past[:left] if lower_order_final else past
        begin = x
        x = foreseen = unified(x, past, b, variant)
    return x


def unified(
    x: Tensor, past: Sequence[tuple[Point, Tensor]], b: Point, variant: str, x0_b: Tensor | None = None
) -> Tensor:
    """x at b from the x at the newest of `past`, and with x0 at b the corrected one (Zhao et al. 2023, eq. 3, 9)."""
    (a, x0), *others = past
    h = b.log_snr - a.log_snr
    if math.isinf(h) or h == 0:
        return move(x, x0, a, b)
    nodes = [((p.log_snr - a.log_snr) / h, old - x0) for p, old in others]
    if x0_b is not None:
        nodes.append((1.0, x0_b - x0))
    if not nodes:
        return move(x, x0, a, b)
    whole = math.expm1(-h)
    scale = -h if variant == "bh1" else whole
    phi, targets = -whole / h - 1, []
    for k in range(1, len(nodes) + 1):
        targets.append(phi * math.factorial(k) / scale)
        phi = -phi / h - 1 / math.factorial(k + 1)
    rho = [0.5]  # what the paper takes in place of the solution of one equation
    if len(nodes) > 1:
        rho = np.linalg.solve([[r**k for r, _ in nodes] for k in range(len(nodes))], targets).tolist()
    bend = weighted([w / r for w, (r, _) in zip(rho, nodes, strict=True)], [d for _, d in nodes])
    return move(x, x0 + scale / whole * bend, a, b)
