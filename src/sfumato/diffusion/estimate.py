"""How strong the noise in a picture is, and what cutting it off at black and white has taken.

B pictures, C channels, H W height and width. Numbers are in the picture's own units.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NORMAL_MEDIAN = 0.6744897501960817  # of the absolute value of a standard normal number
WINDOW = 5  # blocks a side that say how bright the ground of the one in their middle is
CUT_OFF = 1e-3  # of the blocks with a number at a limit, below which nothing is corrected
DRAWS = 2048  # blocks of noise by which the effect of a limit is known
SHADES = 33  # of grounds between the limits, for each of which it is
HALVINGS = 14  # of the interval that holds the deviation, in its logarithm


def noise_level(picture: Tensor, known: Tensor | None = None, limits: tuple[float, float] | None = None) -> float:
    """The deviation of white noise in a picture (B, C, H, W).

    The median absolute value of the finest diagonal Haar detail over that of a standard normal number (Donoho &
    Johnstone 1994, section 4.2): shapes fill few of its numbers, and smooth grounds none. Fine texture all over the
    picture is taken for noise.
    known:  1 where a pixel is known, broadcast to the picture; only blocks of four known ones count.
    limits: black and white, where values were cut off. Noise on grounds near them has lost its far half; then that
            deviation is found for which noise drawn on the same grounds and cut off has the same median.
    Raises ValueError where there is no block of known pixels.
    """
    height, width = (side // 2 * 2 for side in picture.shape[2:])
    picture = picture[..., :height, :width]
    blocks = torch.ones_like(picture[..., ::2, ::2], dtype=torch.bool)
    if known is not None:
        known = known[..., :height, :width].expand_as(picture).float()
        blocks = F.avg_pool2d(known, 2) == 1
    detail = _diagonal(picture)[blocks].abs()
    if detail.numel() == 0:
        raise ValueError("no 2x2 block of known pixels to estimate the noise from; give the noise level")
    plain = float(detail.median()) / NORMAL_MEDIAN
    if limits is None:
        return plain
    low, high = limits
    cut = F.max_pool2d(((picture <= low) | (picture >= high)).float(), 2)
    if float(cut[blocks].mean()) < CUT_OFF:
        return plain
    ground = (_ground(picture, known)[blocks] - low) / (high - low)
    return _uncut(detail / (high - low), ground) * (high - low)


def put_back(picture: Tensor, smooth: Tensor, deviation: float, limits: tuple[float, float]) -> Tensor:
    """The picture (B, C, H, W) with the brightness and darkness that its noise lost at the limits.

    Noise that is cut off at white leaves a white ground grey. smooth: the picture without its noise, as dark as that
    left it; its difference to the ground of which cut-off noise leaves it is added. deviation: of the noise.
    """
    low, high = limits
    drawn = np.random.default_rng(0).standard_normal((1, 4 * DRAWS))
    shades = np.linspace(0, 1, SHADES)
    after = np.clip(shades[:, None] + deviation / (high - low) * drawn, 0, 1).mean(1)
    ground = ((smooth - low) / (high - low)).clamp(0, 1)
    before = torch.from_numpy(np.interp(ground.cpu().numpy(), after, shades)).to(ground)
    return picture + (before - ground) * (high - low)


def _ground(picture: Tensor, known: Tensor | None) -> Tensor:
    """The mean of known pixels around each block, (B, C, H / 2, W / 2)."""
    weight = torch.ones_like(picture) if known is None else known
    total, share = (
        F.avg_pool2d(F.avg_pool2d(v, 2), WINDOW, 1, WINDOW // 2, count_include_pad=False)
        for v in (picture * weight, weight)
    )
    return total / share.clamp(min=1e-9)


def _uncut(detail: Tensor, ground: Tensor) -> float:
    """The deviation of noise, cut off at 0 and 1, whose detail is as large as seen in the middle of its blocks.

    detail: absolute values of blocks. ground: the mean around each.
    """
    drawn = np.random.default_rng(0).standard_normal((4, DRAWS))
    shades = np.linspace(0, 1, SHADES)[:, None]
    sizes, means = detail.numpy().astype(np.float64), ground.numpy().astype(np.float64)
    low, high = np.log(1e-4), np.log(4.0)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        a, b, c, d = (np.clip(shades + np.exp(middle) * row, 0, 1) for row in drawn)  # (SHADES, DRAWS)
        expected = np.median(np.abs(a - b - c + d) / 2, axis=1)
        after = ((a + b + c + d) / 4).mean(1)  # what a ground looks like once its noise was cut off; it rises
        louder = np.median(sizes / np.maximum(np.interp(means, after, expected), 1e-9)) > 1
        low, high = (middle, high) if louder else (low, middle)
    return float(np.exp((low + high) / 2)) if low > np.log(1e-4) else 0.0


def _diagonal(x: Tensor) -> Tensor:
    """(a - b - c + d) / 2 of each block of four, (B, C, H / 2, W / 2); of white noise it has the deviation."""
    a, b, c, d = (x[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    return (a - b - c + d) / 2
