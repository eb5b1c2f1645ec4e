"""Spacings."""

from __future__ import annotations

import itertools

import diffusers
import numpy as np
import pytest
from diffusers.schedulers import AysSchedules
from scipy import stats

from sfumato.diffusion import SPACINGS, AnglePath, FlowPath, Path, VEPath, VPPath, betas, make_grid
from sfumato.diffusion.grid import ALIGNED, beta_levels, beta_quantile

from .oracle import VP

PATHS = (VP, VEPath(), FlowPath(3.0), VPPath(betas("linear"), zero_snr=True), AnglePath())


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 1000])
@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_falls_on_every_path(spacing: str, path: Path, steps: int) -> None:
    """steps + 1 points of falling noise, the last without any."""
    grid = make_grid(path, spacing, steps, steps_offset=1)
    assert len(grid) == steps + 1
    assert grid[-1].sigma == 0 and grid[-1].alpha == 1
    ratios = [p.ratio for p in grid]
    assert all(a > b for a, b in itertools.pairwise(ratios))


def test_known_timesteps() -> None:
    """Published timesteps: leading with offset 1 and 5 steps, and trailing with 4."""
    assert [p.t for p in make_grid(VP, "leading", 5, steps_offset=1)[:-1]] == [801, 601, 401, 201, 1]
    assert [p.t for p in make_grid(VP, "trailing", 4)[:-1]] == [999, 749, 499, 249]
    assert [p.t for p in make_grid(VP, "linspace", 4)[:-1]] == [999, 666, 333, 0]


def test_karras_levels_bend_by_rho() -> None:
    """The ends are the path's; the middle is level ** (1 / rho) half way (Karras et al. 2022, eq. 5)."""
    grid = make_grid(VEPath(0.002, 80.0), "karras", 3)
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert [p.sigma for p in grid] == pytest.approx([80, middle, 0.002, 0], abs=1e-9)
    assert make_grid(VEPath(), "karras", 3, rho=1.0)[1].sigma == pytest.approx((80 + 0.002) / 2)


def test_spacings_are_those_that_others_define() -> None:
    """Each beside the definition of the code that it comes from, written down here, for n steps on SD's schedule."""
    sigmas = VP.ratios  # rising
    low, high = sigmas[0], sigmas[-1]
    for n in (4, 10, 25):
        ramp = np.linspace(0, 1, n)
        turns = np.linspace(1, 0, n)
        uniform = np.linspace(999, 0, n + 1)[:-1]
        rising = 1 - np.linspace(0, 1, n, endpoint=False)
        published = np.log(ALIGNED["sdxl"][::-1])
        between = np.exp(np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, 11), published))[::-1][:-1]
        wanted = {
            # k-diffusion
            "karras": (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7,
            "exponential": np.exp(np.linspace(np.log(high), np.log(low), n)),
            "polyexponential": np.exp(turns * (np.log(high) - np.log(low)) + np.log(low)),
            # ComfyUI
            "sgm_uniform": np.exp(np.interp(uniform, np.arange(1000), np.log(sigmas))),
            "normal": np.exp(np.interp(np.linspace(999, 0, n), np.arange(1000), np.log(sigmas))),
            "simple": np.array([sigmas[-(1 + int(x * 1000 / n))] for x in range(n)]),
            "ddim_uniform": sigmas[1 :: 1000 // n][::-1],
            "kl_optimal": np.tan(ramp * np.arctan(low) + (1 - ramp) * np.arctan(high)),
            "beta": np.exp(np.interp(stats.beta.ppf(rising, 0.6, 0.6) * 999, np.arange(1000), np.log(sigmas))),
            # the paper's own way to other numbers of steps
            "align_your_steps_sdxl": between,
        }
        for name, levels in wanted.items():
            ours = np.array([p.ratio for p in make_grid(VP, name, n)[:-1]])
            apart = np.abs(np.log(ours) - np.log(levels)).max()
            print(f"{name} {n}: {apart:.1e}")
            assert apart < (1e-4 if name.startswith("align") else 1e-8)


def test_published_tables_are_those_of_diffusers() -> None:
    """To the three digits that it gives; 10 steps on SD's schedule are the tables, and elsewhere they are shrunk."""
    for name, key in (("sd", ""), ("sdxl", "XL")):
        theirs = AysSchedules[f"StableDiffusion{key}Sigmas"]
        assert [round(level, 3) for level in ALIGNED[name][:-1]] == pytest.approx(theirs[:-1], abs=0.0045)
    assert list(ALIGNED["svd"][:-1]) == AysSchedules["StableDiffusionVideoSigmas"][:-1]
    grid = make_grid(VP, "align_your_steps", 10)
    assert [p.ratio for p in grid[:-1]] == pytest.approx(ALIGNED["sd"][:-1], rel=1e-5)
    assert [round(p.t) for p in grid[:-1]] == pytest.approx(AysSchedules["StableDiffusionTimesteps"], abs=2)
    flow = make_grid(FlowPath(), "align_your_steps", 10)
    assert flow[0].alpha == 0 and flow[3].ratio == pytest.approx(ALIGNED["sd"][3])
    assert make_grid(VP, "align_your_steps_svd", 10)[0].ratio == pytest.approx(VP.ratios[-1])


def test_beta_quantiles_and_levels() -> None:
    """Beside SciPy, for other distributions too, and diffusers' option of that name."""
    for a, b in ((0.6, 0.6), (2.0, 0.7), (1.0, 1.0), (0.3, 5.0)):
        for share in (0.0, 1e-3, 0.2, 0.5, 0.87, 1.0):
            assert beta_quantile(share, a, b) == pytest.approx(stats.beta.ppf(share, a, b), abs=1e-9)
    peer = diffusers.EulerDiscreteScheduler(use_beta_sigmas=True)
    peer.set_timesteps(12)
    theirs = peer.sigmas[:-1].tolist()
    assert beta_levels(theirs[0], theirs[-1], 12) == pytest.approx(theirs, rel=1e-5)


def test_errors_help() -> None:
    """An unknown spacing gets its near miss, a wrong number of steps its range."""
    with pytest.raises(ValueError, match="did you mean 'trailing'"):
        make_grid(VP, "trailng", 4)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and 1000"):
            make_grid(VP, "trailing", steps)
