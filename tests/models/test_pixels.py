"""Folding, and what a network beside a guess is asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfumato.cond import Cond
from sfumato.models.pixels import UNSEEN, Fold, Hinted


class Silent(nn.Module):
    """A network that says nothing, and remembers the shape of what it was told."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.concat is not None
        self.told = tuple(cond.concat.shape)
        return torch.zeros_like(x)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_folding_is_exact_and_keeps_distances() -> None:
    fold, x = Fold(2), drawn(2, 3, 8, 12)
    z = fold.to_latents(x)
    assert z.shape == (2, 12, 4, 6)
    assert torch.equal(fold.to_pixels(z), x)
    assert abs(z.norm().item() - x.norm().item()) < 1e-4


def test_doubt_is_the_noise_where_a_pixel_was_seen_and_more_elsewhere() -> None:
    fold = Fold(2)
    known = torch.ones(1, 1, 4, 4)
    known[..., 0, 1] = 0
    doubt = fold.to_pixels(fold.doubt(fold.hint(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), known, 0.2)))
    seen = doubt[known.expand_as(doubt) > 0]
    apart = (seen - 0.2).abs().max().item(), (doubt[0, :, 0, 1] - (0.2**2 + UNSEEN**2) ** 0.5).abs().max().item()
    print(apart)
    assert max(apart) < 1e-6


def test_a_silent_network_leaves_the_best_mean_of_picture_and_guess() -> None:
    """Two independent measurements of one picture: the mean's error has the deviation that is foreseen."""
    fold, net = Fold(2), Silent()
    alpha, sigma = torch.full((1, 1, 1, 1), 0.8), torch.full((1, 1, 1, 1), 0.6)
    x0 = fold.to_latents(0.5 * drawn(1, 3, 128, 128))
    guess = fold.to_pixels(x0) + 0.5 * drawn(1, 3, 128, 128, seed=1)
    hint = fold.hint(guess, guess, torch.ones(1, 1, 128, 128), 0.5)
    x = alpha * x0 + sigma * drawn(*x0.shape, seed=2)
    hinted = Hinted(net, fold)  # type: ignore[arg-type]
    found = hinted.x0(x, torch.zeros(1), alpha, sigma, hint)
    _, left = hinted.ground(x, alpha, sigma, hint)
    ratio = ((found - x0).std() / left.mean()).item()
    print(f"error {ratio:.4f} of what was foreseen")
    assert abs(ratio - 1) < 0.02
    assert left.max().item() < 0.5
    assert net.told == (1, 12 + 12 + 4 + 1 + 24, 64, 64)


def test_at_pure_noise_the_guess_comes_out() -> None:
    fold = Fold(2)
    guess = drawn(1, 3, 8, 8).clamp(-1, 1)
    hint = fold.hint(guess, guess, torch.ones(1, 1, 8, 8), 0.1)
    alpha, sigma = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    found = Hinted(Silent(), fold).x0(drawn(1, 12, 4, 4), torch.zeros(1), alpha, sigma, hint)  # type: ignore[arg-type]
    apart = (fold.to_pixels(found) - guess).abs().max().item()
    print(apart)
    assert apart < 1e-5
