"""Samplers against closed forms."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path as FilePath

import pytest
import torch
from torch import Tensor

from sfumato.diffusion import (
    SAMPLERS,
    SPACINGS,
    FlowPath,
    Point,
    VEPath,
    VPPath,
    ancestral,
    betas,
    evaluations,
    get_sampler,
    make_grid,
    move,
)
from sfumato.diffusion.samplers import Noise, Sampler, Steps, invert, lagrange_means

from .oracle import DEVIATION, FLOW, MEAN, VE, VP, consistent, end_point, run, smooth_grid, spread

DETERMINISTIC: dict[str, tuple[Sampler, float]] = {
    **{name: (e, e.order) for name, e in SAMPLERS.items() if not e.stochastic and not e.adaptive},
    **{
        f"{name} with eta 0": (partial(SAMPLERS[name].run, eta=0.0), order)
        for name, order in {
            "dpm2_a": 2,
            "dpmpp_2s_a": 2,
            "dpmpp_sde": 2,
            "dpmpp_2m_sde": 2,
            "dpmpp_3m_sde": 2,
            "euler_a": 1,
            "tcd": 1,
        }.items()
    },
    "er_sde of two stages without noise": (partial(SAMPLERS["er_sde"].run, phi=lambda ratio: ratio, stages=2), 2),
    "er_sde of three stages without noise": (partial(SAMPLERS["er_sde"].run, phi=lambda ratio: ratio), 2),
    "restart that never does": (partial(SAMPLERS["restart"].run, times=0), 2),
    "unipc with bh1": (partial(SAMPLERS["unipc"].run, variant="bh1"), 2),
    "unipc of order 3": (partial(SAMPLERS["unipc"].run, solver_order=3), 2),
    "unipc to the end": (partial(SAMPLERS["unipc"].run, lower_order_final=False), 3),
    "deis of order 3": (partial(SAMPLERS["deis"].run, history=3), 2),
}
DISTILLED = ("lcm", "tcd")  # their networks foresee where the ODE ends, not the mean of the data
STOCHASTIC = {
    **{name: entry for name, entry in SAMPLERS.items() if entry.stochastic and name not in DISTILLED},
    "ddim with eta 1": partial(SAMPLERS["ddim"].run, eta=1.0),
    "ddim with eta 0.5": partial(SAMPLERS["ddim"].run, eta=0.5),
    "euler_a with eta 0.5": partial(SAMPLERS["euler_a"].run, eta=0.5),
    "dpmpp_2m_sde with eta 0.5": partial(SAMPLERS["dpmpp_2m_sde"].run, eta=0.5),
    "dpmpp_2m_sde by heun": partial(SAMPLERS["dpmpp_2m_sde"].run, rule="heun"),
    "dpmpp_sde with eta 0.5": partial(SAMPLERS["dpmpp_sde"].run, eta=0.5),
    "dpmpp_3m_sde with eta 0.5": partial(SAMPLERS["dpmpp_3m_sde"].run, eta=0.5),
    "dpm2_a with eta 0.5": partial(SAMPLERS["dpm2_a"].run, eta=0.5),
    "restart twice": partial(SAMPLERS["restart"].run, times=2),
}
PATHS = {"vp": VP, "ve": VE, "flow": FLOW}
X = torch.linspace(-2, 3, 11, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence(name: str, path: str) -> None:
    """Halving the steps' length cuts the error at the ODE's end point by 2 ** order."""
    sampler, order = DETERMINISTIC[name]
    errors = []
    for steps in (42, 84, 168):  # multiples of three, which dpm_fast makes steps of
        grid = smooth_grid(PATHS[path], steps)
        errors.append((run(sampler, X, grid) - end_point(X, grid[0], grid[-1])).abs().max().item())
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    print(f"{name} on {path}: errors {errors}, orders {orders}")
    assert max(orders[-1], sum(orders) / 2) > order - 0.1  # an error may pass through zero on its way
    assert errors[-1] < 1e-2


@pytest.mark.parametrize("path", PATHS)
def test_adaptive_steps_keep_to_their_tolerance(path: str) -> None:
    """The error falls with the tolerance and stays near it, and a thousandth of it costs a few times as much."""
    grid = smooth_grid(PATHS[path], 2)
    errors, counts = [], []
    for rtol in (1e-1, 1e-2, 1e-3, 1e-4):
        asked: list[Point] = []
        sampler = counting(partial(SAMPLERS["dpm_adaptive"].run, rtol=rtol, atol=rtol / 6), asked)
        errors.append((run(sampler, X, grid) - end_point(X, grid[0], grid[-1])).abs().max().item())
        counts.append(len(asked))
    print(f"{path}: errors {errors}, evaluations {counts}")
    assert all(b < a for a, b in itertools.pairwise(errors)) and errors[-1] < 5e-4
    assert counts[0] < counts[-1] < 100
    assert evaluations(SAMPLERS["dpm_adaptive"], grid) == []  # nobody knows before


def counting(sampler: Sampler, asked: list[Point]) -> Sampler:
    """The same sampler, with a list of the points where it asks."""

    def counted(x: Tensor, grid: Sequence[Point], noise: Noise) -> Steps:
        steps = sampler(x, grid, noise)
        try:
            x, point = next(steps)
            while True:
                asked.append(point)
                x, point = steps.send((yield x, point))
        except StopIteration as stop:
            return stop.value

    return counted


@pytest.mark.parametrize("path", PATHS)
def test_inversion_finds_the_noise(path: str) -> None:
    """Along the grid in reverse the ODE runs backwards, to first order; and there and back again is the start."""
    errors, backs = [], []
    for steps in (80, 160):
        grid = smooth_grid(PATHS[path], steps)[::-1]
        noisy = run(invert, X, grid)
        errors.append((noisy - end_point(X, grid[0], grid[-1])).abs().max().item())
        backs.append((run(SAMPLERS["ddim"], noisy, grid[::-1]) - X).abs().max().item())
    orders = [math.log2(apart[0] / apart[1]) for apart in (errors, backs)]
    print(f"{path}: errors {errors}, there and back {backs}, orders {orders}")
    assert min(orders) > 0.9 and backs[-1] < 0.15


# tcd noises anew from the first row of the schedule, which is not quite the data.
@pytest.mark.parametrize(("name", "options", "apart"), [("lcm", {}, 0.03), ("tcd", {"eta": 1.0}, 0.1)])
@pytest.mark.parametrize("path", PATHS)
def test_distilled_samplers_reach_the_distribution(name: str, options: dict, apart: float, path: str) -> None:
    """With a network that foresees where the ODE ends, a few steps give the data's mean and deviation."""
    generator = torch.Generator().manual_seed(1)

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, generator=generator)

    grid = make_grid(PATHS[path], "exponential", 5)
    start = grid[0].alpha * MEAN + spread(grid[0]) * noise(torch.empty(40_000, dtype=torch.float64))
    x = run(partial(SAMPLERS[name].run, **options), start, grid, noise, consistent)
    print(f"{name} on {path}: mean {x.mean().item():.4f} ({MEAN}), deviation {x.std().item():.4f} ({DEVIATION})")
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x.std().item() == pytest.approx(DEVIATION, rel=apart)


def test_order_with_other_options() -> None:
    """The other extrapolation of DPM-Solver++ and the other warm-ups of PLMS are of second order too."""
    runs: dict[str, Sampler] = {
        "dpmpp_2m heun": partial(SAMPLERS["dpmpp_2m"].run, rule="heun"),
        "plms from euler": partial(SAMPLERS["plms"].run, warmup="none"),
    }
    for name, sampler in runs.items():
        errors = []
        for steps in (80, 160):
            grid = smooth_grid(VP, steps)
            errors.append((run(sampler, X, grid) - end_point(X, grid[0], grid[-1])).abs().max().item())
        order = math.log2(errors[0] / errors[1])
        print(f"{name}: {order:.2f}")
        assert order > 1.9


def test_runge_kutta_steps_converge() -> None:
    """PNDM's steps with midpoints are of second order (Liu et al. 2022), and of fourth where the path is even."""
    for path, order in ((VP, 1.9), (FLOW, 3.9)):
        errors = []
        for steps in (20, 40):
            levels = smooth_grid(path, 2 * steps)
            sampler = partial(SAMPLERS["plms"].run, warmup="runge_kutta", middle=levels[1::2])
            grid = levels[::2]
            errors.append((run(sampler, X, grid) - end_point(X, grid[0], grid[-1])).abs().max().item())
        measured = math.log2(errors[0] / errors[1])
        print(f"{type(path).__name__}: errors {errors}, order {measured:.2f}")
        assert measured > order


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_reach_the_distribution(name: str, path: str) -> None:
    """From the exact marginal at the start, the samples at the end have the data's mean and deviation."""
    generator = torch.Generator().manual_seed(1)
    grid = smooth_grid(PATHS[path], 100)

    def noise(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, dtype=x.dtype, generator=generator)

    start = torch.empty(40_000, dtype=torch.float64)
    x = run(STOCHASTIC[name], grid[0].alpha * MEAN + spread(grid[0]) * noise(start), grid, noise)
    mean, deviation = x.mean().item(), x.std().item()
    want, width = grid[-1].alpha * MEAN, spread(grid[-1])
    print(f"{name} on {path}: mean {mean:.4f} ({want:.4f}), deviation {deviation:.4f} ({width:.4f})")
    assert mean == pytest.approx(want, abs=0.01)
    assert deviation == pytest.approx(width, rel=0.03)
    assert DEVIATION > 0


def test_move_is_ddim_euler_and_flow_euler() -> None:
    """One line, three textbook formulas, to 1e-12 in float64."""
    generator = torch.Generator().manual_seed(0)
    x, x0 = torch.randn(2, 1000, dtype=torch.float64, generator=generator)
    apart = {}
    for a, b in ((VP.point(900), VP.point(500)), (VP.point(20), VP.point(3))):
        eps = (x - a.alpha * x0) / a.sigma
        ddim = b.alpha * x0 + b.sigma * eps  # Song et al. 2021, eq. 12
        apart["ddim"] = (move(x, x0, a, b) - ddim).abs().max().item()
        s, s_next, y = a.ratio, b.ratio, x / a.alpha
        euler = y + (s_next - s) * (y - x0) / s  # Karras et al. 2022, algorithm 1
        apart["euler"] = (move(x, x0, a, b) / b.alpha - euler).abs().max().item()
    a, b = FLOW.point(800), FLOW.point(350)
    velocity = (x - x0) / a.sigma
    flow = x + (b.sigma - a.sigma) * velocity
    apart["flow"] = (move(x, x0, a, b) - flow).abs().max().item()
    print(apart)
    assert max(apart.values()) < 1e-12


def test_ancestral_noise_is_the_posteriors() -> None:
    """Published DDIM variances, and the k-diffusion split in straight coordinates."""
    path = VPPath(betas("linear"))
    for t, before, variance in (
        (420, 400, 0.14771),
        (980, 960, 0.3246),
        (487, 486, 0.00979),
        (999, 998, 0.02),
    ):
        _, up = ancestral(path.point(t), path.point(before))
        print(f"{t} to {before}: {up**2:.6f}, published {variance}")
        assert up**2 == pytest.approx(variance, abs=1e-5)
    a, b = path.point(700), path.point(400)
    down, up = ancestral(a, b)
    s_up = math.sqrt(b.ratio**2 * (a.ratio**2 - b.ratio**2) / a.ratio**2)
    assert up / b.alpha == pytest.approx(s_up, abs=1e-12)
    assert down.ratio == pytest.approx(math.sqrt(b.ratio**2 - s_up**2), abs=1e-12)
    assert ancestral(a, b, eta=0.0) == (b, 0.0)


def test_published_variances_are_in_the_reference_file() -> None:
    """The numbers above are those of tests/data/scheduler_refs.json."""
    text = (FilePath(__file__).parent.parent / "data" / "scheduler_refs.json").read_text(encoding="utf-8")
    known = json.loads(text)["other_exact_values"]["ddim variance (t,prev_t) (base config)"]
    assert known["420,400"] == 0.14771 and known["999,998"] == 0.02


def test_names_for_one_step_agree() -> None:
    """DDPM is DDIM with eta 1 is Euler ancestral; the SDE solver with eta 0 is the ODE solver."""
    grid = make_grid(VP, "trailing", 12)

    def noise(x: torch.Tensor) -> torch.Tensor:
        return torch.linspace(1, -1, 11, dtype=x.dtype)

    ddpm = run(SAMPLERS["ddpm"], X, grid, noise)
    apart = {
        "ddim": (run(partial(SAMPLERS["ddim"].run, eta=1.0), X, grid, noise) - ddpm).abs().max().item(),
        "euler_a": (run(SAMPLERS["euler_a"], X, grid, noise) - ddpm).abs().max().item(),
    }
    sde = run(partial(SAMPLERS["dpmpp_2m_sde"].run, eta=0.0), X, grid, noise)
    apart["dpmpp_2m"] = (sde - run(SAMPLERS["dpmpp_2m"], X, grid)).abs().max().item()
    print(apart)
    apart["tcd"] = (
        (run(partial(SAMPLERS["tcd"].run, eta=0.0), X, grid) - run(SAMPLERS["ddim"], X, grid)).abs().max().item()
    )
    print(apart)
    assert max(apart.values()) < 1e-12


@pytest.mark.parametrize("path", [FlowPath(3.0), VPPath(betas("linear"), zero_snr=True)], ids=["flow", "zero_snr"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_starts_from_pure_noise(name: str, path: FlowPath | VPPath) -> None:
    """At alpha = 0 log-SNR is -inf and sigma / alpha is inf; the result stays finite and near the data."""
    grid = make_grid(path, "trailing", 25)
    assert grid[0].alpha == 0
    x = run(SAMPLERS[name], X, grid)
    print(f"{name}: mean {x.mean().item():.3f}")
    assert torch.isfinite(x).all()
    assert abs(x.mean().item() - MEAN) < 0.35


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_takes_every_spacing(name: str, spacing: str) -> None:
    """Also with one and two steps."""
    for path in (VP, VEPath(), FlowPath(3.0)):
        for steps in (1, 2, 6):
            assert torch.isfinite(run(SAMPLERS[name], X, make_grid(path, spacing, steps))).all()


def test_dry_run_counts_evaluations() -> None:
    """Solvers that look at the end or the middle of a step ask 2 n - 1 times, PLMS n + 1 times, others n times."""
    grid = make_grid(VP, "trailing", 10)
    counts = {name: len(evaluations(entry, grid)) for name, entry in SAMPLERS.items()}
    print(counts)
    for name in ("heun", "dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde"):
        assert counts.pop(name) == 19
    assert counts.pop("plms") == 11
    assert counts.pop("restart") == 29  # five of the steps twice
    assert counts.pop("dpm_adaptive") == 0  # unknown
    assert set(counts.values()) == {10}


def test_lagrange_means_are_exact_on_polynomials() -> None:
    """With four nodes a cubic is integrated exactly."""
    nodes, low, high = [3.0, 4.1, 5.9, 8.0], 3.0, 2.5
    weights = lagrange_means(nodes, low, high)
    ours = sum(w * n**3 for w, n in zip(weights, nodes, strict=True))
    exact = (high**4 - low**4) / 4 / (high - low)
    print(f"difference {abs(ours - exact):.2e}")
    assert ours == pytest.approx(exact, abs=1e-10)


def test_samplers_use_the_sample_that_comes_back() -> None:
    """An edit made between the question and the answer reaches the result."""
    for name, entry in SAMPLERS.items():
        if name in DISTILLED or entry.adaptive:
            continue  # the one forgets x, the other may ask for other points
        grid = smooth_grid(VP, 6)
        steps = entry(X, grid, torch.zeros_like)
        x, point = next(steps)
        assert isinstance(point, Point)
        try:
            while True:
                x, point = steps.send((x + 1, (x + 1) * 0))
        except StopIteration as stop:
            edited = stop.value
        plain = entry(X, grid, torch.zeros_like)
        x, point = next(plain)
        try:
            while True:
                x, point = plain.send((x, x * 0))
        except StopIteration as stop:
            assert (edited - stop.value).abs().min() > 0.1, name


def test_unknown_sampler_gets_its_near_miss() -> None:
    """As a person would mistype it."""
    with pytest.raises(
        ValueError, match=r"unknown sampler 'dpm2m'; did you mean 'dpm2' or 'dpmpp_2m'.*known: euler, ddim"
    ):
        get_sampler("dpm2m")
