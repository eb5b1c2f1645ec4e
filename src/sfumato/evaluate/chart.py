"""Seconds as bars and as curves, drawn without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from PIL import Image, ImageDraw, ImageFont

WIDTH, MARGIN, NAMES, FIGURES = 900, 16, 270, 150  # pixels
ROW, BAR, TITLE = 24, 14, 30
PLOT = 300  # pixels of a graph's height
COLOURS = ("#2f6f9f", "#c8782f", "#6a9a4f", "#8f5f9f", "#9f3f4f", "#5f6f7f",
           "#3fa7a0", "#b89f2f", "#7f4f2f", "#d07fb0", "#404f9f")  # fmt: skip
INK, FAINT, GRID = "#222222", "#777777", "#dddddd"
Curve = Sequence[tuple[float, float]]  # x, y


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


def curves(graphs: Mapping[str, Mapping[str, Curve]]) -> Image.Image:
    """A graph a title, of a curve a contender, both axes logarithmic; the names stand at the curves' ends.

    Raises ValueError where there is nothing to draw.
    """
    if not any(graphs.values()):
        raise ValueError("no curves to draw; measure something first")
    names = list(dict.fromkeys(name for lines in graphs.values() for name in lines))
    image = Image.new("RGB", (WIDTH, 2 * MARGIN + len(graphs) * (PLOT + 2 * TITLE)), "white")
    draw = ImageDraw.Draw(image)
    for i, (title, lines) in enumerate(graphs.items()):
        y = MARGIN + i * (PLOT + 2 * TITLE)
        draw.text((MARGIN, y + 6), title, fill=INK, font=ImageFont.load_default(15))
        _graph(draw, y + TITLE, {name: (COLOURS[names.index(name) % len(COLOURS)], c) for name, c in lines.items()})
    return image


def _graph(draw: ImageDraw.ImageDraw, top: int, lines: Mapping[str, tuple[str, Curve]]) -> None:
    """One graph below `top`: name -> colour and curve."""
    font = ImageFont.load_default(13)
    left, right, bottom = MARGIN + 50, WIDTH - NAMES, top + PLOT
    points = [point for _, curve in lines.values() for point in curve]
    (low_x, high_x), (low_y, high_y) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / low_x) / (math.log(high_x / low_x) or 1)
        return left + across * (right - left), bottom - 8 - math.log(y / low_y) / (math.log(high_y / low_y) or 1) * (
            PLOT - 16
        )

    for x in sorted({x for x, _ in points}):
        at = place(x, low_y)[0]
        draw.line((at, top, at, bottom), fill=GRID)
        draw.text((at, bottom + 4), f"{x:g}", fill=FAINT, font=font, anchor="mt")
    for k in range(math.ceil(math.log2(low_y)), math.floor(math.log2(high_y)) + 1):
        at = place(low_x, 2.0**k)[1]
        draw.line((left, at, right, at), fill=GRID)
        draw.text((left - 6, at), f"{2.0**k:.3g}", fill=FAINT, font=font, anchor="rm")
    taken = float(bottom + 16)
    ends = sorted(((place(*curve[-1])[1], name) for name, (_, curve) in lines.items()), reverse=True)
    for at, name in ends:
        colour, curve = lines[name]
        dots = [place(*point) for point in curve]
        draw.line(dots, fill=colour, width=2)
        for x, y in dots:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        taken = min(at, taken - 15)
        draw.text((right + 12, taken), f"{name}  {curve[-1][1]:.3g} s", fill=colour, font=font, anchor="lm")
