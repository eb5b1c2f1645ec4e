"""A contact sheet on which every picture has its prompt below it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LINE = 12  # pixels


def contact_sheet(pictures: Sequence[np.ndarray], labels: Sequence[str], columns: int = 8, gap: int = 6) -> Image.Image:
    """Pictures (H, W, 3) uint8 of one size, row by row, each with its label in up to three lines below it."""
    if not pictures or len(pictures) != len(labels):
        raise ValueError(f"{len(pictures)} pictures and {len(labels)} labels; there must be one label a picture")
    height, width = pictures[0].shape[:2]
    columns = min(columns, len(pictures))
    cell = (width + gap, height + 3 * LINE + gap)
    sheet = Image.new("RGB", (columns * cell[0] + gap, -(-len(pictures) // columns) * cell[1] + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE - 2)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = gap + i % columns * cell[0], gap + i // columns * cell[1]
        sheet.paste(Image.fromarray(picture), (x, y))
        for k, line in enumerate(wrapped(label, lambda text: draw.textlength(text, font) <= width)[:3]):
            draw.text((x, y + height + 1 + k * LINE), line, fill="black", font=font)
    return sheet


def wrapped(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The text in lines that fit, broken between words; a word that does not fit stands alone."""
    lines: list[str] = []
    for word in text.split():
        if lines and fits(f"{lines[-1]} {word}"):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
