"""A small icon set in memory's place: plain discs, one a concept and style."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from sfumato.data.icons import IconSet
from sfumato.data.scenes import concepts

STYLES = ("3d", "flat")


@pytest.fixture(scope="session")
def discs(tmp_path_factory: pytest.TempPathFactory) -> IconSet:
    """Every concept of the built-in list in two styles, drawn as a red disc."""
    root = tmp_path_factory.mktemp("icons")
    y, x = np.mgrid[:128, :128]
    disc = np.zeros((128, 128, 4), np.uint8)
    disc[(x - 64) ** 2 + (y - 64) ** 2 < 50**2] = (220, 30, 30, 255)
    rows = []
    for style in STYLES:
        (root / style).mkdir()
        for code, noun in concepts().items():
            Image.fromarray(disc).save(root / style / f"{code}.png")
            rows.append({"code": code, "label": noun, "tags": [], "style": style, "file": f"{style}/{code}.png"})
    (root / "icons.json").write_text(json.dumps({"styles": list(STYLES), "icons": rows}))
    return IconSet(root)
