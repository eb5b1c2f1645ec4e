"""Spacings."""

from __future__ import annotations

import itertools

import pytest

from sfumato.diffusion import SPACINGS, FlowPath, Path, VEPath, VPPath, betas, make_grid

from .oracle import VP

PATHS = (VP, VEPath(), FlowPath(3.0), VPPath(betas("linear"), zero_snr=True))


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


def test_errors_help() -> None:
    """An unknown spacing gets its near miss, a wrong number of steps its range."""
    with pytest.raises(ValueError, match="did you mean 'trailing'"):
        make_grid(VP, "trailng", 4)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and 1000"):
            make_grid(VP, "trailing", steps)
