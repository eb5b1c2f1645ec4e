"""Samplers that diffusers does not have, beside k-diffusion's numbers and the formulas that they come from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path as FilePath

import pytest
import torch
from torch import Tensor

from sfumato.diffusion import SAMPLERS, Path, VEPath
from sfumato.diffusion.grid import karras_levels
from sfumato.diffusion.path import END
from sfumato.diffusion.samplers import Noise

from .oracle import VP, run

REFS = json.loads((FilePath(__file__).parent.parent / "data" / "kdiffusion_refs.json").read_text(encoding="utf-8"))
HIGH, LOW, STEPS = 14.6, 0.03, 10
PATHS = {"ve": VEPath(), "vp": VP}


def wave(k: int) -> Tensor:
    """The reference file's stand-in for noise, (8,)."""
    return math.sqrt(2) * torch.sin(torch.arange(8, dtype=torch.float64) * (0.37 + k) + k)


def model(x: Tensor, sigma: float) -> Tensor:
    """The reference file's clean picture."""
    z = x / math.hypot(1, sigma)
    return torch.tanh(z + z.roll(1) / 2) + 0.3 * z / (1 + sigma)


def waves() -> Noise:
    """Wave 1, wave 2 and so on."""
    numbers = iter(range(1, 1000))
    return lambda x: wave(next(numbers))


def ours(name: str, path: Path, levels: Sequence[float], **options: object) -> tuple[Tensor, int]:
    """The sampler's x / alpha at the end of a path's points of these levels, and how often it asked."""
    grid = [path.at_ratio(level) if level > 0 else END for level in levels]
    asked = []

    def foresee(x: Tensor, a: object) -> Tensor:
        asked.append(a)
        return model(x / a.alpha, a.ratio)

    x = run(partial(SAMPLERS[name].run, **options), HIGH * wave(0) * grid[0].alpha, grid, waves(), foresee)
    return x / grid[-1].alpha, len(asked)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", REFS["samplers"])
def test_samplers_are_those_of_k_diffusion(case: str, path: str) -> None:
    """The same result after as many evaluations, in its coordinates and on a variance-preserving path."""
    entry, (name, *count) = REFS["samplers"][case], case.split()
    levels = [*karras_levels(HIGH, LOW, STEPS), 0.0]
    if name in ("dpm_fast", "dpm_adaptive"):  # from end to end
        levels = karras_levels(HIGH, LOW, int(count[0]) + 1 if name == "dpm_fast" else 2)
    x, asked = ours(name, PATHS[path], levels, **entry.get("options", {}))
    apart = (x - torch.tensor(entry["result"], dtype=torch.float64)).abs().max().item()
    print(f"| {case} | k-diffusion, {path} | {asked} evaluations | {apart:.1e} |")
    assert asked == entry["evaluations"]
    assert apart < 1e-10


def heun_step(x: Tensor, a: float, b: float) -> Tensor:
    """Karras et al. 2022, algorithm 1, on sigma."""
    slope = (x - model(x, a)) / a
    y = x + (b - a) * slope
    return y if b == 0 else x + (b - a) * (slope + (y - model(y, b)) / b) / 2


def restarted(levels: Sequence[float], noise: Noise) -> Tensor:
    """Xu et al. 2023, algorithm 1, with one segment from the level nearest to 2 to that nearest to 0.1, twice."""
    top, bottom = (min(levels[:-1], key=lambda level: abs(math.log(level / to))) for to in (2.0, 0.1))
    segment = [level for level in levels if bottom <= level <= top]
    x = HIGH * wave(0)
    for a, b in pairwise(levels):
        x = heun_step(x, a, b)
        for _ in range(2 if b == bottom else 0):
            x = x + math.sqrt(top**2 - bottom**2) * noise(x)
            for c, d in pairwise(segment):
                x = heun_step(x, c, d)
    return x


def refined(levels: Sequence[float], noise: Noise) -> Tensor:
    """Zhang et al. 2023, the multistep scheme with phi functions; first order at both ends."""
    x, old, before = HIGH * wave(0), None, 0.0
    for a, b in pairwise(levels):
        x0 = model(x, a)
        if b == 0 or old is None:
            x = x0 + b / a * (x - x0)
        else:
            h = math.log(a / b)
            place = math.log(a / before) / h  # of the evaluation before, in steps; it is negative
            phi_1 = -math.expm1(-h) / h
            phi_2 = (1 - phi_1) / h
            x = math.exp(-h) * x + h * ((phi_1 - phi_2 / place) * x0 + phi_2 / place * old)
        old, before = x0, a
    return x


def extended(levels: Sequence[float], noise: Noise) -> Tensor:
    """Cui et al. 2023, VE ER-SDE-Solver-3, its integrals by the midpoint rule."""

    def scale(s: Tensor) -> Tensor:
        return s * (torch.exp(s**0.3) + 10)

    x, past = HIGH * wave(0), []
    for a, b in pairwise(levels):
        x0 = model(x, a)
        if b == 0:
            return x0
        at_a, at_b = scale(torch.tensor([a, b], dtype=torch.float64)).tolist()
        x = at_b / at_a * x + (1 - at_b / at_a) * x0
        n = 20_000
        width = (a - b) / n
        where = b + width * (torch.arange(n, dtype=torch.float64) + 0.5)
        slope = None
        if past:
            slope = (x0 - past[-1][1]) / (a - past[-1][0])
            x = x + (b - a + at_b * (width / scale(where)).sum()) * slope
        if len(past) > 1:
            curve = 2 * (slope - past[-1][2]) / (a - past[-2][0])
            x = x + ((b - a) ** 2 / 2 + at_b * (width * (where - a) / scale(where)).sum()) * curve
        x = x + math.sqrt(b**2 - (a * at_b / at_a) ** 2) * noise(x)
        past.append((a, x0, slope))
    return x


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "formula", "options"),
    [("restart", restarted, {"times": 2}), ("res_multistep", refined, {}), ("er_sde", extended, {})],
)
def test_samplers_are_those_of_their_papers(
    name: str, formula: Callable[[Sequence[float], Noise], Tensor], options: dict[str, int], path: str
) -> None:
    """The same result as their formulas on sigma, written down above."""
    levels = [*karras_levels(HIGH, LOW, STEPS), 0.0]
    theirs = formula(levels, waves())
    x, asked = ours(name, PATHS[path], levels, **options)
    apart = (x - theirs).abs().max().item()
    print(f"| {name} | its paper, {path} | {asked} evaluations | {apart:.1e} |")
    assert apart < 1e-6
