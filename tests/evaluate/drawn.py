"""Pictures with known answers, and an icon set of plain shapes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sfumato.data.scenes import GROUNDS, concepts

RED, GREEN, BLUE = (214, 40, 40), (50, 160, 70), (40, 90, 210)
#: noun -> corners of a polygon in a unit square, and its colour.
SHAPES = {
    "apple": ([(0, 0), (1, 0), (1, 1), (0, 1)], RED),
    "cat": ([(0.5, 0), (1, 1), (0, 1)], (240, 150, 40)),
    "dog": ([(0, 0), (1, 0), (0.5, 1)], (150, 90, 40)),
    "car": ([(0, 0.3), (1, 0.3), (1, 0.7), (0, 0.7)], BLUE),
}


def discs(ground: str | tuple[int, int, int], *spots: tuple[int, int, int, tuple[int, int, int]]) -> np.ndarray:
    """A 128x128 picture with discs (x, y, radius, colour) on a ground, which is named or given."""
    picture = Image.new("RGB", (128, 128), GROUNDS[ground] if isinstance(ground, str) else ground)
    for x, y, radius, colour in spots:
        ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return np.asarray(picture)


def shape(noun: str) -> Image.Image:
    """The drawing of a noun, 128x128 RGBA."""
    corners, colour = SHAPES[noun]
    picture = Image.new("RGBA", (128, 128))
    ImageDraw.Draw(picture).polygon([(8 + 112 * x, 8 + 112 * y) for x, y in corners], fill=(*colour, 255))
    return picture


def icon_folder(folder: Path) -> Path:
    """An icon set in the 3d and flat styles, of the shapes and of a star, which is no concept of the model."""
    codes = {noun: code for code, noun in concepts().items()}
    rows = []
    for style in ("3d", "flat"):
        (folder / style).mkdir(parents=True)
        drawings = {codes[noun]: (noun, shape(noun)) for noun in SHAPES}
        drawings["FFFF"] = ("diamond", shape("cat").rotate(45))
        for code, (label, picture) in drawings.items():
            picture.save(folder / style / f"{code}.png")
            rows.append({"code": code, "label": label, "tags": [], "style": style, "file": f"{style}/{code}.png"})
    (folder / "icons.json").write_text(json.dumps({"styles": ["3d", "flat"], "icons": rows}))
    return folder
