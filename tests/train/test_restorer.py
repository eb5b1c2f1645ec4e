"""The pixel model's training on a tiny network and drawn icons, and its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from sfumato.data.icons import IconSet
from sfumato.models.pixels import Fold
from sfumato.models.unet import UNet
from sfumato.pipelines.restore import load_pixel_model
from sfumato.train.restorer import (
    CONFIG,
    EVERY,
    LOOP,
    held_out_codes,
    hints,
    learned,
    save_restorer,
    train_restorer,
    validation_codes,
)

TINY = replace(CONFIG, block_out_channels=(8, 8, 8), norm_num_groups=2, attention_head_dim=8)


@pytest.fixture(scope="module")
def icons(tmp_path_factory: pytest.TempPathFactory) -> IconSet:
    """A hundred discs of code points that no concept has."""
    root = tmp_path_factory.mktemp("icons")
    (root / "3d").mkdir()
    rows = []
    for i in range(100):
        image = Image.new("RGBA", (128, 128))
        ImageDraw.Draw(image).ellipse((20, 20 + i // 2, 108, 108), fill=(200, 2 * i, 40, 255))
        code = f"E{i:03X}"
        image.save(root / "3d" / f"{code}.png")
        rows.append({"code": code, "label": f"disc {i}", "tags": [], "style": "3d", "file": f"3d/{code}.png"})
    (root / "icons.json").write_text(json.dumps({"styles": ["3d"], "icons": rows}), encoding="utf-8")
    return IconSet(root)


def test_some_are_never_shown_and_those_measured_are_none_of_validation(icons: IconSet) -> None:
    held, tuned, shown = held_out_codes(icons), validation_codes(icons), set(learned(icons))
    print(sorted(held))
    assert len(tuned) == -(-100 // EVERY) and 2 <= len(held) <= 15
    assert len(held | tuned | shown) == len(held) + len(tuned) + len(shown) == 100


def test_hints_have_every_kind_in_the_networks_shape() -> None:
    x = torch.zeros(8, 3, 16, 16)
    told = hints(x, Fold(2), np.random.default_rng(0), torch.Generator().manual_seed(0))
    assert told.shape == (8, 12 + 12 + 4 + 1, 8, 8)
    assert bool(told.isfinite().all())


def test_trains_writes_and_opens(icons: IconSet, tmp_path: Path) -> None:
    loop = replace(LOOP, steps=20, batch_size=4, lr=5e-3, save_every=20, warmup=2, cooldown=5, ema=0.5)
    net = train_restorer(icons, tmp_path / "run", loop, {0: 32}, pool=4, config=TINY)
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    learned_so_far = net.conv_out.weight.abs().max().item()  # it begins at zero
    print(row, learned_so_far)
    assert 0 < row["loss"] < 1.2 and learned_so_far > 1e-3
    save_restorer(net, tmp_path / "model.safetensors")
    opened: UNet = load_pixel_model(tmp_path / "model.safetensors").unet
    pairs = zip(opened.parameters(), net.parameters(), strict=True)
    apart = max((a - b).abs().max().item() for a, b in pairs)
    print(f"largest difference {apart}")
    assert apart < 1e-3  # float16 on disk
