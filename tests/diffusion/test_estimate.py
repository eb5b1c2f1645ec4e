"""The estimate of noise against known noise, also where it was cut off."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfumato.diffusion.estimate import noise_level, put_back


def drawn(side: int = 128) -> Tensor:
    """A disc and a bar on a soft ground, (1, 3, side, side) in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    disc = ((x + 0.2) ** 2 + y**2 < 0.3).float()
    bar = ((x - 0.6).abs() < 0.1).float()
    return torch.stack([disc - bar, bar - 0.3 * disc, 0.3 * y], 0)[None] * 0.8


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_known_noise_is_found(sigma: float, share: float) -> None:
    draw = torch.Generator().manual_seed(5)
    clean = drawn()
    noisy = clean + sigma * torch.randn(clean.shape, generator=draw)
    known = (torch.rand(1, 1, 128, 128, generator=draw) < share).float()
    found = noise_level(noisy * known, known)
    print(f"{sigma}: {found}")
    assert abs(found / sigma - 1) < 0.06


def test_without_noise_or_without_pixels() -> None:
    assert noise_level(drawn()) < 1e-6
    checks = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    with pytest.raises(ValueError, match="no 2x2 block"):
        noise_level(torch.zeros(1, 3, 8, 8), checks.float()[None, None])


@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.0])
def test_noise_that_was_cut_off_at_black_and_white_is_found(sigma: float) -> None:
    clean = 1.25 * drawn()  # to the limits and beyond the middle
    clean[..., 64:, :] = 1.0  # white, of whose noise one half is lost
    noisy = (clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))).clamp(-1, 1)
    before, found = noise_level(noisy), noise_level(noisy, limits=(-1, 1))
    print(f"{sigma}: {before:.3f} as it is, {found:.3f} with limits")
    assert before < 0.8 * sigma
    assert abs(found / sigma - 1) < 0.1


def test_limits_change_nothing_where_none_was_reached() -> None:
    noisy = 0.5 * drawn() + 0.05 * torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(5))
    assert noise_level(noisy, limits=(-1, 1)) == noise_level(noisy)
    white = torch.ones(1, 3, 16, 16)
    assert noise_level(white, limits=(-1, 1)) == 0


def test_what_was_cut_off_is_put_back() -> None:
    clean = torch.linspace(-1, 1, 9).view(1, 1, 9, 1).expand(1, 1, 9, 20000)
    noisy = (clean + 0.5 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    smooth = noisy.mean(3, keepdim=True).expand_as(noisy)
    found = put_back(noisy, smooth, 0.5, (-1, 1)).mean(3)
    before, after = ((v - clean[..., 0]).abs().max().item() for v in (noisy.mean(3), found))
    print(f"grounds are off by up to {before:.3f}, then {after:.3f}")
    assert before > 0.15 and after < 0.02
