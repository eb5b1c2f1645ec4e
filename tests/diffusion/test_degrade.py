"""Degradations against dense matrices, and first guesses against the measured picture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfumato.diffusion.degrade import SMALLEST_GAIN, Blur, Degradation, LowRes, Missing, Noise, flattened

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


@pytest.mark.parametrize("name", ["noise", "missing", "blur", "lowres"])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_guess_is_nearer_than_what_was_seen_for_each_picture_by_its_own_noise(name: str, noise: float) -> None:
    draw = torch.Generator().manual_seed(4)
    known = (torch.rand(1, 1, 64, 64, generator=draw) < 0.3).float()
    degradation = {**ALL, "missing": Missing(known), "blur": Blur(1.5)}[name]
    x = drawn(64)
    y = degradation.forward(x)
    y = y + noise * torch.randn(y.shape, generator=draw)
    y = y * known if name == "missing" else y
    guess = degradation.guess(y, noise)
    far, near = ((v - x).square().mean().sqrt().item() for v in (degradation.shown(y), guess))
    print(f"{name} under noise of {noise}: {far:.4f} as seen, {near:.4f} guessed")
    assert near < 0.7 * far or near < 1e-6
    levels = torch.tensor([noise, 0.3]).view(2, 1, 1, 1)
    apart = (degradation.guess(y.expand(2, -1, -1, -1), levels)[:1] - guess).abs().max().item()
    print(apart)
    assert apart < 1e-5


def test_flattening_moves_the_levels_of_a_disc_as_its_formula_says() -> None:
    """Of a disc of height h and radius r in a wide ground, it leaves h - 2 weight / r (Strong & Chan 2003)."""
    y, x = torch.meshgrid(torch.arange(64.0) - 31.5, torch.arange(64.0) - 31.5, indexing="ij")
    disc = (x**2 + y**2 < 20**2).float().expand(1, 1, 64, 64)
    found = flattened(disc, 1.0, 400)[0, 0, 30:34, 30:34].mean().item()
    print(found)
    assert abs(found - (1 - 2 / 20)) < 0.01
    assert (flattened(disc, 0.0) - disc).abs().max().item() < 1e-6
