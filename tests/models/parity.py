"""What the model tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4  # of the reference output's range


def assert_close(what: str, ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    """Compare by the largest absolute difference relative to the reference's range, and print it."""
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    span = float(theirs.max() - theirs.min())
    difference = float((ours - theirs).abs().max()) / span
    print(f"{what}: largest difference {difference:.2e} of the range {span:.3g}")
    assert difference <= tolerance


def scramble(module: nn.Module, seed: int = 0) -> None:
    """Random numbers for every parameter, norms and biases too, so that no part is without effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            spread = 0.3 if p.ndim == 1 else 1.0 / p[0].numel() ** 0.5
            p.copy_(torch.randn(p.shape, generator=generator) * spread)
            if p.ndim == 1:
                p.add_(0.5)


def exchange(ours: nn.Module, theirs: nn.Module) -> None:
    """Load the one's parameters into the other strictly, both ways; the names must be the same set."""
    assert set(ours.state_dict()) == set(theirs.state_dict())
    scramble(ours, seed=1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    scramble(theirs, seed=2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.eval()
    theirs.eval()


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())
