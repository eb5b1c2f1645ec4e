"""Paths, betas and points."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch

from sfumato.diffusion import AnglePath, FlowPath, Path, Point, VEPath, VPPath, add_noise, betas

from .oracle import VP

PATHS = (VP, VEPath(), FlowPath(3.0), VPPath(betas("linear"), zero_snr=True), AnglePath())


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_betas_are_those_of_diffusers(schedule: str) -> None:
    """To float32 rounding."""
    theirs = diffusers.DDIMScheduler(beta_schedule=schedule, beta_start=0.001, beta_end=0.015).betas
    apart = (betas(schedule, 1000, 0.001, 0.015) - theirs.double()).abs().max().item()
    print(f"{schedule}: {apart:.2e}")
    assert apart < 1e-7


def test_unknown_schedule_is_refused() -> None:
    """By name, with the known ones."""
    with pytest.raises(ValueError, match=r"'quadratic'.*scaled_linear"):
        betas("quadratic")
    assert torch.equal(betas("cosine"), betas("squaredcos_cap_v2"))


def test_trained_betas_must_be_probabilities() -> None:
    """A table outside 0..1 is an error."""
    with pytest.raises(ValueError, match="betas"):
        VPPath([0.1, 1.2])


def test_variance_is_preserved_also_between_rows() -> None:
    """alpha² + sigma² = 1 at whole and fractional times, for a table with and without terminal signal."""
    worst = 0.0
    for path in (VP, VPPath(betas("linear"), zero_snr=True), VPPath(betas("linear"), interpolation="linear")):
        for t in (0, 0.25, 17.5, 500, 998.5, 999):
            p = path.point(t)
            worst = max(worst, abs(p.alpha**2 + p.sigma**2 - 1))
    print(f"largest difference {worst:.2e}")
    assert worst < 1e-12


def test_fractional_time_interpolates_log_sigma() -> None:
    """Half way between two rows the noise level is their geometric mean, or their mean when asked for."""
    low, high = VP.point(10).ratio, VP.point(11).ratio
    assert VP.point(10.5).ratio == pytest.approx(math.sqrt(low * high), abs=1e-12)
    linear = VPPath(betas("scaled_linear", 1000, 0.00085, 0.012), interpolation="linear")
    assert linear.point(10.5).ratio == pytest.approx((low + high) / 2, abs=1e-12)


def test_zero_terminal_snr_matches_diffusers() -> None:
    """The rescaled table ends in alpha = 0 and equals diffusers' to float32 rounding."""
    theirs = diffusers.DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod
    path = VPPath(betas("linear"), zero_snr=True)
    apart = (path.alphas_cumprod - theirs).abs().max().item()
    print(f"largest difference {apart:.2e}")
    assert apart < 1e-6
    assert path.point(999) == Point(999.0, 0.0, 1.0)
    assert path.point(999).ratio == math.inf
    assert path.point(999).log_snr == -math.inf


def test_time_outside_the_schedule_is_refused() -> None:
    """The error names the time and the range."""
    with pytest.raises(ValueError, match=r"1000.*between 0 and 999"):
        VP.point(1000)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_level_and_time_are_inverse(path: Path) -> None:
    """at_level(level(p)) is p, at rows and between them."""
    worst = 0.0
    for index in (1, 300, 512.5, 990):
        p = path.place(index)
        q = path.at_level(path.level(p))
        worst = max(worst, abs(q.t - p.t), abs(q.alpha - p.alpha), abs(q.sigma - p.sigma))
    print(f"{type(path).__name__}: {worst:.2e}")
    assert worst < 1e-8


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_batched_points_are_the_single_ones(path: Path) -> None:
    """`at` gives (B, 1, 1, 1) float32 tensors with what `point` gives one by one, for float and whole times."""
    times = [path.place(i).t for i in (0, 400.25, 999)]
    points = path.at(torch.tensor(times, dtype=torch.float64))
    singles = [path.point(t) for t in times]
    assert points.alpha.shape == points.sigma.shape == (3, 1, 1, 1)
    assert points.alpha.dtype == points.t.dtype == torch.float32
    apart = max((points.sigma.flatten()[i] - s.sigma).abs().item() / s.sigma for i, s in enumerate(singles))
    apart = max([apart, *((points.alpha.flatten()[i] - s.alpha).abs().item() for i, s in enumerate(singles))])
    print(f"largest difference {apart:.2e}")
    assert apart < 1e-6
    if isinstance(path, VPPath):
        whole = path.at(torch.tensor([3, 999]))
        assert whole.sigma.flatten()[1].item() == pytest.approx(path.point(999).sigma, abs=1e-7)


def test_add_noise_takes_numbers_and_batches() -> None:
    """The same noise level for all, or one each."""
    x0, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    p, q = VP.point(100), VP.point(900)
    each = add_noise(x0, eps, VP.at(torch.tensor([100, 900])))
    apart = max(
        (each[0] - add_noise(x0, eps, p)[0]).abs().max().item(),
        (each[1] - add_noise(x0, eps, q)[1]).abs().max().item(),
    )
    print(f"largest difference {apart:.2e}")
    assert apart < 1e-6


def test_angles() -> None:
    """Pure noise at 1, the data at 0, as much of one as of the other half way; an index is where `place` puts it."""
    path = AnglePath()
    assert path.point(1) == Point(1.0, 0.0, 1.0) and path.point(0) == Point(0.0, 1.0, 0.0)
    assert path.point(0.5).alpha == pytest.approx(0.5**0.5) == path.point(0.5).sigma
    assert [path.index(path.place(i)) for i in (0, 400.25, 999)] == pytest.approx([0, 400.25, 999])
    with pytest.raises(ValueError, match=r"1\.5.*between 0 and 1"):
        path.point(1.5)


def test_flow_shift() -> None:
    """Shift 3 puts the middle of the schedule at sigma 0.75; a shift must be positive."""
    assert FlowPath(3.0).place(499).sigma == pytest.approx(0.75)
    with pytest.raises(ValueError, match="shift"):
        FlowPath(0.0)
