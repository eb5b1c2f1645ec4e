"""The Brownian path of a picture."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from sfumato.diffusion import SAMPLERS, Brownian, FlowPath, PictureNoise, Point, VEPath
from sfumato.diffusion.brownian import DEPTH, time

from .oracle import MEAN, VP, run, smooth_grid, spread

X = torch.empty(20_000)


def whole(path: Brownian, a: Point, b: Point) -> Tensor:
    """The increment itself, not divided by its deviation."""
    return path.between(X, a, b) * math.sqrt(abs(time(a) - time(b)) / 2**DEPTH)


def test_increments_are_normal_and_independent() -> None:
    """Mean 0 and deviation 1 over any stretch; two stretches that do not overlap know nothing of each other."""
    path = Brownian(5)
    points = [VP.at_level(level) for level in (14.0, 3.0, 1.0, 0.3, 0.03)]
    parts = torch.stack([path.between(X, a, b) for a, b in itertools.pairwise(points)])
    print(f"means {parts.mean(1)}, covariance {torch.cov(parts)}")
    assert parts.mean(1).abs().max() < 0.03
    assert (torch.cov(parts) - torch.eye(4)).abs().max() < 0.03


def test_parts_sum_up_to_the_whole() -> None:
    """A stretch is the sum of any stretches that it is cut into, asked for in any order, by any object."""
    a, m, n, b = (VP.at_level(level) for level in (9.0, 2.7, 1.1, 0.2))
    path = Brownian(7)
    pieces = whole(path, n, b) + whole(path, a, m) + whole(path, m, n)
    difference = (pieces - whole(Brownian(7), a, b)).abs().max().item()
    print(f"difference {difference:.1e}")
    assert difference < 1e-5
    assert (whole(path, b, a) + whole(path, a, b)).abs().max() == 0
    assert (whole(Brownian(8), a, b) - whole(path, a, b)).abs().max() > 0.1


def test_every_point_has_a_time_of_its_own() -> None:
    """From the data to pure noise on every path, and next to each other 1000 steps of a schedule."""
    assert time(Point(0.0, 1.0, 0.0)) == 0 and time(FlowPath().place(999)) == 2**DEPTH
    for path in (VP, VEPath(), FlowPath(3.0)):
        times = [time(path.place(i)) for i in range(1000)]
        assert all(a < b for a, b in itertools.pairwise(times))
    near = (VP.at_level(1.0), VP.at_level(1.0 + 1e-9))
    assert torch.isfinite(Brownian(1).between(X, *near)).all()


def test_finer_grids_make_the_same_picture() -> None:
    """With a path the results of n and 2 n steps come together; with fresh noise they are two different pictures."""
    for name in ("dpmpp_sde", "dpmpp_3m_sde"):
        ends = []
        for steps in (20, 40, 80):
            noise = PictureNoise(torch.Generator().manual_seed(3))
            grid = smooth_grid(VP, steps)
            start = grid[0].alpha * MEAN + spread(grid[0]) * torch.randn(
                5000, generator=torch.Generator().manual_seed(1)
            )
            ends.append(run(SAMPLERS[name], start, grid, noise))
        apart = [(a - b).std().item() for a, b in itertools.pairwise(ends)]
        fresh = run(SAMPLERS[name], start, grid, lambda x: torch.randn_like(x))
        print(f"{name}: {apart}; with fresh noise {(fresh - ends[-1]).std().item():.3f}")
        assert apart[1] < apart[0] and apart[1] < 0.1 * (fresh - ends[-1]).std().item()


def test_fresh_noise_is_the_generators() -> None:
    """In turn, in float32, whatever x is."""
    noise = PictureNoise(torch.Generator().manual_seed(2))
    expected = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    assert torch.equal(noise(torch.empty(4, 5, dtype=torch.float64)).float(), expected)
    assert noise.between(torch.empty(4, 5, dtype=torch.float64), VP.point(9), VP.point(3)).dtype == torch.float64
    assert pytest.approx(expected.std().item(), abs=0.5) == 1
