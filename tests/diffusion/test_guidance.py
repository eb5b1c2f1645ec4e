"""Ask and combine."""

from __future__ import annotations

import torch

from sfumato.cond import Cond
from sfumato.diffusion import CFG, Plain, Point, make_grid

from .oracle import VP

X = torch.randn(1, 2, 3, 3)
COND, UNCOND = Cond(context=torch.ones(1, 4, 8)), Cond(context=torch.zeros(1, 4, 8))


def test_plain_asks_once() -> None:
    """And takes the answer as it is."""
    (query,) = Plain(COND).ask(X, VP.point(500))
    assert query.cond is COND and query.x is X and query.perturb is None
    assert torch.equal(Plain(COND).combine(X, query.point, [X]), X)


def test_cfg_extrapolates() -> None:
    """uncond + scale * (cond - uncond), cond asked first."""
    guidance = CFG(COND, UNCOND, 3.0)
    queries = guidance.ask(X, VP.point(500))
    assert [q.cond for q in queries] == [COND, UNCOND]
    combined = guidance.combine(X, VP.point(500), [X + 1, X])
    print(f"largest difference {(combined - X - 3).abs().max().item():.2e}")
    assert torch.allclose(combined, X + 3)


def test_scale_one_asks_once() -> None:
    """There is nothing to extrapolate; scale 0 needs both questions' order kept, so it asks twice."""
    assert len(CFG(COND, UNCOND, 1.0).ask(X, VP.point(500))) == 1
    assert len(CFG(COND, UNCOND, 0.0).ask(X, VP.point(500))) == 2


def test_interval_bounds_where_two_questions_are_asked() -> None:
    """Both ends belong to it; outside only cond is asked."""
    grid = make_grid(VP, "trailing", 10)[:-1]
    guidance = CFG(COND, UNCOND, 5.0, interval=(grid[6].ratio, grid[3].ratio))
    assert [len(guidance.ask(X, p)) for p in grid] == [1, 1, 1, 2, 2, 2, 2, 1, 1, 1]
    assert len(CFG(COND, UNCOND, 5.0, interval=(0.0, 100.0)).ask(X, Point(999.0, 0.0, 1.0))) == 1
