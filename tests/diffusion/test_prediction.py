"""The pair table."""

from __future__ import annotations

import pytest
import torch

from sfumato.diffusion import (
    PREDICTIONS,
    FlowPath,
    Point,
    Prediction,
    VEPath,
    VPPath,
    betas,
    edm,
    get_prediction,
)

from .oracle import FLOW, VP

ROWS = [*PREDICTIONS.values(), edm(0.5)]
POINTS = [VP.point(0), VP.point(500.5), VP.point(999), FLOW.point(1), FLOW.point(700), VEPath().place(999)]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_x0_inverts_target(row: Prediction) -> None:
    """Reading off what the network was trained to say gives the clean picture back, with numbers and batches."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator)
    eps = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator)
    worst = 0.0
    for p in POINTS:
        x = p.alpha * x0 + p.sigma * eps
        worst = max(worst, (row.x0(x, row.target(x0, eps, p), p) - x0).abs().max().item())
    points = VP.at(torch.tensor([0, 999]))
    x = points.alpha * x0 + points.sigma * eps
    batched = (row.x0(x, row.target(x0, eps, points), points) - x0).abs().max().item()
    print(f"{row.name}: {worst:.2e}, in a batch with float32 weights {batched:.2e}")
    assert worst < 1e-10
    assert batched < 1e-5


@pytest.mark.parametrize("name", ["v", "flow", "x0"])
def test_pure_noise_can_be_read_by_all_but_eps(name: str) -> None:
    """At alpha = 0 these rows give the clean picture, and eps is refused by name."""
    x0, eps = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.3)
    start = VPPath(betas("linear"), zero_snr=True).point(999)
    row = get_prediction(name)
    assert torch.allclose(row.x0(eps, row.target(x0, eps, start), start), x0)
    with pytest.raises(ValueError, match=r"'epsilon'.*alpha = 0"):
        get_prediction("eps").x0(eps, eps, start)
    with pytest.raises(ValueError, match=r"'epsilon'.*alpha = 0"):
        get_prediction("eps").x0(eps, eps, FlowPath().at(torch.tensor([1000.0])))


def test_edm_preconditions_to_unit_variance() -> None:
    """Input and target have unit variance at every sigma (Karras et al. 2022, table 1 and appendix B.6)."""
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(200_000, dtype=torch.float64, generator=generator)
    eps = torch.randn(200_000, dtype=torch.float64, generator=generator)
    row = edm(0.5)
    for sigma in (0.01, 0.5, 10.0):
        for p in (VEPath().at_level(sigma), VP.at_level(sigma)):
            x = p.alpha * x0 + p.sigma * eps
            shown, target = (x * row.scale_in(p)).std().item(), row.target(x0, eps, p).std().item()
            print(f"sigma {sigma}: input {shown:.4f}, target {target:.4f}")
            assert shown == pytest.approx(1, abs=0.01) and target == pytest.approx(1, abs=0.01)
    assert VEPath().at_level(10.0).t == pytest.approx(torch.tensor(10.0).log().item() / 4)


def test_names() -> None:
    """Names of configs and letters give the same row; others get a near miss."""
    assert get_prediction("v") is get_prediction("v_prediction")
    with pytest.raises(ValueError, match="did you mean 'epsilon'"):
        get_prediction("epsilom")
    assert isinstance(Point(0.0, 1.0, 0.0).log_snr, float)
