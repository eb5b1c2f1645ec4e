"""Restoration: what each kind of damage becomes, what is estimated and what is refused, with tiny networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.diffusion.degrade import Blur, LowRes, Missing, Noise
from sfumato.diffusion.path import VPPath, betas
from sfumato.diffusion.scheduler import Scheduler
from sfumato.images import to_tensor
from sfumato.models.pixels import Fold
from sfumato.models.unet import UNet, UNetConfig
from sfumato.pipelines import restore as module
from sfumato.pipelines.restore import Damage, PixelModel, restore, restore_latent

CONFIG = UNetConfig.from_dict(
    {
        "_class_name": "UNet2DModel",
        "in_channels": 65,
        "out_channels": 12,
        "block_out_channels": [4, 8],
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 2,
    }
)


def pixel_model(silent: bool = True) -> PixelModel:
    """A tiny model; a silent one says that guesses are right."""
    torch.manual_seed(0)
    unet = UNet(CONFIG).eval()
    if silent:
        with torch.no_grad():
            unet.conv_out.weight.zero_()
            unet.conv_out.bias.zero_()  # type: ignore[union-attr]
    path = VPPath(betas("squaredcos_cap_v2", 1000))
    return PixelModel(unet, Fold(2), Scheduler(path, "ddim", "sample", "trailing"))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model in the place of the package's."""
    monkeypatch.setattr(module, "load_pixel_model", pixel_model)


def drawn(width: int = 30, height: int = 22) -> Image.Image:
    """A soft picture with a square in it."""
    y, x = np.mgrid[0:height, 0:width]
    rows = np.stack([90 + 3 * x, 60 + 4 * y, 120 + x + y], -1)
    rows[6:14, 8:18] = (200, 40, 40)
    return Image.fromarray(rows.astype(np.uint8))


def apart(a: Image.Image, b: Image.Image) -> float:
    return float((to_tensor([a]) - to_tensor([b])).abs().max()) * 127.5


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize(
    "damage",
    [
        Damage("missing", Missing((torch.arange(64).view(1, 1, 8, 8) % 3 > 0).float()), 0.0),
        Damage("lowres", LowRes(2), 0.0),
    ],
    ids=lambda d: d.name,
)
def test_what_was_seen_without_noise_is_in_the_result_whatever_the_network_says(damage: Damage, silent: bool) -> None:
    x = 0.5 * torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    seen = damage.operator.forward(x)
    found = pixel_model(silent)(seen, damage, steps=3)
    far = (damage.operator.forward(found) - seen).abs().max().item()
    print(far)
    assert far < 1e-5


def test_the_seed_decides_the_picture() -> None:
    damage, y = Damage("noise", Noise(), 0.3), 0.5 * torch.randn(1, 3, 8, 8)
    model = pixel_model(silent=False)
    one, again, other = (model(y, damage, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.usefixtures("tiny")
def test_transparent_pixels_are_missing_and_known_ones_come_back_exactly(tmp_path: Path) -> None:
    clean = drawn(31, 23)
    holes = np.zeros((23, 31), np.uint8)
    holes[::3, ::2] = 255
    damaged = clean.copy()
    damaged.paste((0, 255, 0), (0, 0), Image.fromarray(holes))
    by_mask = restore(damaged, mask=Image.fromarray(holes), noise=0.0, steps=1)
    damaged.putalpha(Image.fromarray(255 - holes))
    damaged.save(tmp_path / "holes.png")
    by_alpha = restore(tmp_path / "holes.png", noise=0.0, steps=1)
    assert by_mask.damage.name == by_alpha.damage.name == "missing"
    assert by_mask.image.size == (31, 23)
    assert np.array_equal(by_mask.image, by_alpha.image)
    known = holes == 0
    assert np.array_equal(np.asarray(by_mask.image)[known], np.asarray(clean)[known])
    worst = np.abs(np.asarray(by_mask.image).astype(int) - np.asarray(clean))[:, :7].max()
    print(f"in the gaps of the smooth part {worst} of 255")
    assert worst < 40


@pytest.mark.usefixtures("tiny")
def test_noise_is_found_and_said_from_0_to_1() -> None:
    draw = np.random.default_rng(0)
    noisy = np.clip(np.full((64, 64, 3), 128) + 25.5 * draw.standard_normal((64, 64, 3)), 0, 255)
    found = restore(Image.fromarray(noisy.astype(np.uint8)))
    print(found.damage)
    assert found.damage.name == "noise"
    assert abs(found.damage.noise - 0.1) < 0.006


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("noise", [0.2, 0.5, 1.0])
def test_noise_is_taken_off_pictures_of_any_size(noise: float) -> None:
    """The silent network returns the guess; a picture of any size is filled up to whole blocks."""
    clean = np.asarray(drawn(31, 21)).astype(float)
    draw = np.random.default_rng(0)
    noisy = np.clip(clean + 255 * noise * draw.standard_normal(clean.shape), 0, 255)
    found = np.asarray(restore(Image.fromarray(noisy.astype(np.uint8)), "noise", noise=noise, steps=1).image)
    assert found.shape == (21, 31, 3)
    far, near = (np.sqrt(np.square(v - clean).mean()) for v in (noisy, found))
    print(f"{far:.1f} of 255 as seen, {near:.1f} restored")
    assert near < 0.6 * far


@pytest.mark.usefixtures("tiny")
def test_small_and_blurred_pictures() -> None:
    large = restore(drawn(15, 11), scale=4)
    assert large.image.size == (60, 44) and large.damage.operator == LowRes(4)
    assert apart(large.image.resize((15, 11), Image.Resampling.BOX), drawn(15, 11)) <= 2  # rounding
    sharper = restore(drawn(), blur=1.5)
    assert sharper.image.size == (30, 22) and sharper.damage.operator == Blur(1.5)


CASES: list[tuple[dict[str, Any], str]] = [
    ({"degradation": "rain"}, "unknown degradation 'rain'; known: auto, noise, missing, blur, lowres"),
    ({}, "no noise to speak of"),
    ({"degradation": "missing"}, "needs a mask"),
    ({"degradation": "blur"}, "needs blur"),
    ({"scale": 3}, "scale = 3; give 2 or 4"),
    ({"blur": -1.0}, "blur = -1"),
    ({"blur": 1.0, "scale": 2}, "blur and lowres"),
    ({"degradation": "noise", "noise": -0.1}, "noise = -0.1"),
    ({"prompt": "a dog"}, "reads no prompt"),
    ({"mask": Image.new("L", (3, 3))}, "3x3 pixels and the picture 30x22"),
    ({"mask": Image.new("L", (30, 22), 255)}, "every pixel is missing"),
]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("options", "message"), CASES, ids=[message for _, message in CASES])
def test_what_cannot_be_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        restore(Image.new("RGB", (30, 22), (9, 9, 9)), **options)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        restore(tmp_path / "none.png")


def test_gradients_bring_a_latent_model_nearer_to_what_was_seen() -> None:
    from sfumato.pipelines.pipeline import load

    pipe = load("mini", precision="float32")
    x = to_tensor([drawn(32, 32).resize((64, 64))])
    damage = Damage("lowres", LowRes(4), 0.0)
    seen = damage.operator.forward(x)
    far = []
    for step_scale in (0.0, 1.0):
        made = restore_latent(pipe, seen, replace(damage), "a red square", steps=10, step_scale=step_scale)
        far.append((damage.operator.forward(made) - seen).square().mean().sqrt().item())
    print(f"misfit {far[0]:.4f} without gradients, {far[1]:.4f} with")
    assert far[1] < 0.9 * far[0]
    assert not any(p.grad is not None for p in pipe.unet.parameters())
