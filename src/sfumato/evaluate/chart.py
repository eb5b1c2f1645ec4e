"""Seconds as bars, drawn without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from PIL import Image, ImageDraw, ImageFont

WIDTH, MARGIN, NAMES, FIGURES = 900, 16, 270, 150  # pixels
ROW, BAR, TITLE = 24, 14, 30
COLOURS = ("#2f6f9f", "#c8782f", "#6a9a4f", "#8f5f9f", "#9f3f4f", "#5f6f7f")
INK, FAINT = "#222222", "#777777"


@dataclass(frozen=True)
class Bar:
    """A contender's median at a task, and its fastest and slowest turn, in seconds."""

    task: str
    contender: str
    median: float
    spread: tuple[float, float]


def bars(rows: Sequence[Bar]) -> Image.Image:
    """A group of bars a task, each on a scale of its own, with the spread as a line; a contender keeps its colour.

    Raises ValueError where there is nothing to draw.
    """
    if not rows:
        raise ValueError("no bars to draw; measure something first")
    groups = [(task, list(found)) for task, found in groupby(rows, lambda bar: bar.task)]
    names = list(dict.fromkeys(bar.contender for bar in rows))
    height = 2 * MARGIN + len(groups) * TITLE + len(rows) * ROW
    image = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    font, bold = ImageFont.load_default(13), ImageFont.load_default(15)
    y = MARGIN
    for task, found in groups:
        draw.text((MARGIN, y + 6), task, fill=INK, font=bold)
        y += TITLE
        scale = (WIDTH - NAMES - FIGURES - MARGIN) / max(bar.spread[1] for bar in found)
        for bar in found:
            top, middle = y + (ROW - BAR) // 2, y + ROW // 2
            low, high = (NAMES + scale * x for x in bar.spread)
            colour = COLOURS[names.index(bar.contender) % len(COLOURS)]
            draw.text((MARGIN + 12, middle), bar.contender, fill=INK, font=font, anchor="lm")
            draw.rectangle((NAMES, top, NAMES + max(scale * bar.median, 1), top + BAR), fill=colour)
            draw.line((low, middle, high, middle), fill=INK)
            for x in (low, high):
                draw.line((x, middle - 3, x, middle + 3), fill=INK)
            times = f"  x {bar.median / found[0].median:.2f}" if bar is not found[0] else ""
            draw.text((high + 8, middle), f"{bar.median:.3g} s{times}", fill=FAINT, font=font, anchor="lm")
            y += ROW
    return image
