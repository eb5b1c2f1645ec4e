"""A stage's loss, drawn from its log.jsonl: every report as a faint line, their running mean over it.

Training keeps it as `loss.png` beside the log.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sfumato.files import replacing

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 320, 64, 24, 34, 36  # pixels
INK, FAINT, GRID, RAW, MEAN = "#222222", "#777777", "#dddddd", "#b9d0e2", "#2f6f9f"
Points = Sequence[tuple[float, float]]  # step, value


def read_log(path: Path, name: str = "loss") -> list[tuple[int, float]]:
    """(step, value) of one number of a log, the last one where a step was trained again; unfinished lines are left."""
    found: dict[int, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut off where a run was ended
            continue
        if name in row:
            found = {step: value for step, value in found.items() if step < row["step"]}
            found[row["step"]] = row[name]
    return list(found.items())


def keep_curve(log: Path, picture: Path, title: str) -> None:
    """Draw the loss of a log into a picture file; nothing while there is too little to draw."""
    points = read_log(log) if log.exists() else []
    if len(points) > 1:
        with replacing(picture) as temporary:
            draw_curve(points, title).save(temporary, format="PNG")


def smooth(points: Points, share: float = 0.04) -> list[tuple[float, float]]:
    """The running mean over a share of all points, as many after a point as before it."""
    reach = int(len(points) * share / 2)
    mean = []
    for i, (step, _) in enumerate(points):
        near = points[i - min(reach, i, len(points) - 1 - i) :][: 2 * min(reach, i, len(points) - 1 - i) + 1]
        mean.append((step, math.fsum(value for _, value in near) / len(near)))
    return mean


def draw_curve(points: Points, title: str) -> Image.Image:
    """A graph of points with positive values, the steps along, the values up on a logarithmic scale.

    ValueError where there are fewer than two.
    """
    if len(points) < 2:
        raise ValueError(f"{title}: {len(points)} points make no curve; train for longer")
    low, high = (pick(value for _, value in points) for pick in (min, max))
    first, last = 0.0, points[-1][0]

    def place(step: float, value: float) -> tuple[float, float]:
        up = math.log(value / low) / (math.log(high / low) or 1)
        along = (step - first) / (last - first)
        return LEFT + along * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    draw.text((LEFT, 8), title, fill=INK, font=ImageFont.load_default(15))
    for value in ticks(low, high):
        y = place(first, value)[1]
        draw.line((LEFT, y, WIDTH - RIGHT, y), fill=GRID)
        draw.text((LEFT - 8, y), f"{value:g}", fill=FAINT, font=font, anchor="rm")
    for k in range(5):
        step = first + (last - first) * k / 4
        x = place(step, low)[0]
        draw.line((x, TOP, x, HEIGHT - BOTTOM), fill=GRID)
        draw.text((x, HEIGHT - BOTTOM + 6), f"{step:.0f}", fill=FAINT, font=font, anchor="rt" if k == 4 else "mt")
    for line, colour, width in ((points, RAW, 1), (smooth(points), MEAN, 3)):
        draw.line([place(*point) for point in line], fill=colour, width=width)
    return image


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones: 1, 2 and 5 times powers of ten, and more where these are few."""
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [step * 10.0**k for k in decades for step in steps if low <= step * 10.0**k <= high]
        if len(found) >= 4:
            break
    return found
