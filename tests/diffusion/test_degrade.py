"""Degradations against dense matrices, and the estimate of noise against known noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfumato.diffusion.degrade import SMALLEST_GAIN, Blur, Degradation, LowRes, Missing, Noise, noise_level

SHAPE = (1, 2, 4, 8)


def mask() -> Tensor:
    """Half of the pixels of one channel for both."""
    return (torch.rand(1, 1, *SHAPE[2:], generator=torch.Generator().manual_seed(3)) < 0.5).double()


ALL = {"noise": Noise(), "missing": Missing(mask()), "blur": Blur(0.8), "lowres": LowRes(2)}


def dense(degradation: Degradation) -> Tensor:
    """The operator as a matrix, from what it does to each unit picture."""
    units = torch.eye(64, dtype=torch.float64).view(64, *SHAPE[1:])
    return degradation.forward(units).flatten(1).T  # (seen, 64)


@pytest.mark.parametrize("name", ALL)
def test_adjoint_is_the_transposed_matrix(name: str) -> None:
    matrix = dense(ALL[name])
    seen = ALL[name].forward(torch.zeros(SHAPE, dtype=torch.float64)).shape[1:]
    units = torch.eye(len(matrix), dtype=torch.float64).view(-1, *seen)
    apart = (ALL[name].adjoint(units).flatten(1) - matrix).abs().max().item()
    print(f"{name}: {apart}")
    assert apart < 1e-12


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("name", ALL)
def test_solve_is_the_regularised_inverse(name: str, weight: float) -> None:
    matrix = dense(ALL[name])
    y = torch.randn(len(matrix), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = y if name != "missing" else matrix @ matrix.T @ y
    floor = SMALLEST_GAIN**2 if name == "blur" else 1e-13  # the mask's matrix has empty rows
    inverse = torch.linalg.inv(matrix @ matrix.T + max(weight, floor) * torch.eye(len(y), dtype=torch.float64))
    seen = ALL[name].forward(torch.zeros(SHAPE, dtype=torch.float64)).shape
    apart = (ALL[name].solve(y.view(seen), weight).flatten() - matrix.T @ inverse @ y).abs().max().item()
    print(f"{name}, weight {weight}: {apart}")
    assert apart < 1e-9


def test_a_blur_keeps_flat_pictures_and_damps_a_cosine_as_its_formula_says() -> None:
    flat = torch.full((1, 1, 6, 10), 0.7)
    places = torch.arange(10, dtype=torch.float64) + 0.5
    wave = torch.cos(torch.pi * 3 / 10 * places).expand(1, 1, 6, 10)
    gain = torch.exp(torch.tensor(-0.5 * (1.5 * torch.pi * 3 / 10) ** 2, dtype=torch.float64))
    apart = (Blur(2.0).forward(flat) - flat).abs().max(), (Blur(1.5).forward(wave) - gain * wave).abs().max()
    print(apart)
    assert max(apart) < 1e-6


@pytest.mark.parametrize("build", [lambda: LowRes(1), lambda: Blur(0.0), lambda: LowRes(3).forward(torch.zeros(SHAPE))])
def test_what_cannot_be_is_refused(build: object) -> None:
    with pytest.raises(ValueError, match=r"give|needs"):
        build()  # type: ignore[operator]


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
