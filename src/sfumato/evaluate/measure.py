"""Measures of one picture, uint8 (H, W, 3): its ground, its objects, their number, place and colour.

They know pixels only: the ground is what the picture's border shows, an object is a connected region that differs
from it. Colours are compared in CIE Lab (D65), where a distance of 2 to 3 is just visible.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from sfumato.data.scenes import GROUNDS, HUES

SIDE = 64  # pixels of a crop that the judge reads
RIM = 4  # width of the border that shows the ground, at 128 pixels a side
APART = 14.0  # Lab distance from which a pixel is no longer the ground
WHITE = np.array([0.95047, 1.0, 1.08883])
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB levels (..., 3), 0 to 255, as CIE Lab (IEC 61966-2-1, CIE 15)."""
    c = np.asarray(rgb, np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = linear @ TO_XYZ.T / WHITE
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def border(picture: np.ndarray) -> np.ndarray:
    """The median colour of the picture's border, (3,); the median overlooks an object that touches the edge."""
    rim = max(1, RIM * picture.shape[0] // 128)
    inside = np.zeros(picture.shape[:2], bool)
    inside[rim:-rim, rim:-rim] = True
    return np.median(picture[~inside], axis=0)


def ground_colour(picture: np.ndarray) -> str:
    """The name of the ground: whichever of the eighteen `GROUNDS` is nearest to the border's colour in Lab."""
    here = to_lab(border(picture))
    return min(GROUNDS, key=lambda name: float(np.linalg.norm(to_lab(np.array(GROUNDS[name])) - here)))


def foreground(picture: np.ndarray, ground: np.ndarray | None = None) -> np.ndarray:
    """Which pixels differ from the ground (the border's colour unless given), bool (H, W); specks are filtered out."""
    distance = np.linalg.norm(to_lab(picture) - to_lab(border(picture) if ground is None else ground), axis=-1)
    return _blur(distance, 1) > APART


def _blur(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over squares of 2 * reach + 1 pixels a side."""
    side = 2 * reach + 1
    sums = np.pad(values.astype(np.float64), reach, mode="edge")
    for axis in (0, 1):
        sums = np.cumsum(np.insert(sums, 0, 0.0, axis=axis), axis=axis)
        count = sums.shape[axis] - side
        sums = np.take(sums, range(side, side + count), axis=axis) - np.take(sums, range(count), axis=axis)
    return sums / side**2


@dataclass(frozen=True)
class Region:
    """A connected region: its area in pixels, and the box that holds it (rows top to bottom, columns left to right)."""

    area: int
    top: int
    left: int
    bottom: int
    right: int

    @property
    def centre(self) -> tuple[float, float]:
        """Row and column of the box's middle."""
        return (self.top + self.bottom) / 2, (self.left + self.right) / 2

    def grown(self, by: int) -> Region:
        """The same region with its box wider by `by` pixels on every side."""
        return replace(self, top=self.top - by, left=self.left - by, bottom=self.bottom + by, right=self.right + by)


def regions(mask: np.ndarray) -> list[Region]:
    """The connected regions of a mask (H, W), neighbours at corners included; the largest first."""
    runs: list[tuple[int, int, int]] = []  # row, first column, column after the last
    parent: list[int] = []  # of each run; a run that is its own parent stands for its region

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    above: list[int] = []
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.pad(row.astype(np.int8), 1))).tolist()
        here = []
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            here.append(len(runs))
            parent.append(len(runs))
            runs.append((y, start, end))
            for i in above:
                if runs[i][1] <= end and start <= runs[i][2]:
                    parent[root(i)] = root(here[-1])
        above = here
    joined: dict[int, list[tuple[int, int, int]]] = {}
    for i, run in enumerate(runs):
        joined.setdefault(root(i), []).append(run)
    return sorted(map(_region, joined.values()), key=lambda region: -region.area)


def _region(runs: list[tuple[int, int, int]]) -> Region:
    rows, starts, ends = zip(*runs, strict=True)
    return Region(sum(ends) - sum(starts), min(rows), min(starts), max(rows) + 1, max(ends))


def _shrunk(mask: np.ndarray, reach: int) -> np.ndarray:
    """The mask without the pixels that are within `reach` of its edge."""
    return _blur(mask.astype(float), reach) > 1 - 1e-6 if reach else mask


def objects(picture: np.ndarray, share: float = 0.4) -> list[Region]:
    """The objects of about one size that stand on the ground, the largest first.

    Objects that touch are told apart by shrinking the foreground: of the shrinkings by 0 to 14 pixels, the first with
    most regions counts, and its boxes are grown back. Regions smaller than `share` of the largest are no objects, nor
    is anything once the largest is below 0.8 % of the picture.
    """
    solid = _blur(foreground(picture).astype(float), 1) > 0.3  # small gaps closed
    best: list[Region] = []
    for reach in range(15):
        found = regions(_shrunk(solid, reach))
        if not found or found[0].area < 0.008 * solid.size:
            break
        kept = [region.grown(reach) for region in found if region.area >= share * found[0].area]
        if len(kept) > len(best):
            best = kept
    return best


def corner(picture: np.ndarray) -> str:
    """The corner that a small object stands in ("top left"...), "" when it is not small or not off-centre.

    Small: at most 0.6 of the side. In a corner: its middle at least a tenth of the side from both middle lines.
    """
    box = object_box(picture)
    if box is None:
        return ""
    height, width = picture.shape[:2]
    y, x = box.centre
    away = abs(y - height / 2) >= height / 10 and abs(x - width / 2) >= width / 10
    if max((box.bottom - box.top) / height, (box.right - box.left) / width) > 0.6 or not away:
        return ""
    return f"{'top' if y < height / 2 else 'bottom'} {'left' if x < width / 2 else 'right'}"


def object_box(picture: np.ndarray, ground: np.ndarray | None = None) -> Region | None:
    """The box around everything that is not the ground, without specks; None for an empty picture."""
    found = regions(foreground(picture, ground))
    kept = [region for region in found if region.area >= max(12, 0.06 * found[0].area)]
    if not kept:
        return None
    return Region(
        sum(region.area for region in kept),
        min(region.top for region in kept),
        min(region.left for region in kept),
        max(region.bottom for region in kept),
        max(region.right for region in kept),
    )


def object_colour(picture: np.ndarray) -> str:
    """The name of the objects' hue among `HUES`, or "" where too little of them is coloured.

    Each vivid foreground pixel votes for the hue that is nearest to its own, weighted with its saturation.
    """
    inside = _shrunk(foreground(picture), 1)
    hsv = np.asarray(Image.fromarray(picture).convert("HSV"))[inside] / 255.0
    vivid = hsv[(hsv[:, 1] > 0.3) & (hsv[:, 2] > 0.25)]
    if len(vivid) < max(20, 0.2 * len(hsv)):
        return ""
    apart = np.abs((vivid[:, :1] * 360 - np.array(list(HUES.values())) + 180) % 360 - 180)
    votes = np.bincount(apart.argmin(axis=1), weights=vivid[:, 1], minlength=len(HUES))
    return list(HUES)[int(votes.argmax())]


def crop_object(picture: np.ndarray, ground: np.ndarray | None = None) -> np.ndarray:
    """What stands on the ground, as a square crop (S, S, 3) for the judge; all of an empty picture."""
    box = object_box(picture, ground) or Region(0, 0, 0, *picture.shape[:2])
    return _square(picture, box, border(picture) if ground is None else ground)


def crop_largest(picture: np.ndarray) -> np.ndarray:
    """The largest of the `objects`, as a square crop (S, S, 3); for pictures with several of a kind."""
    found = objects(picture)
    return _square(picture, found[0], border(picture)) if found else crop_object(picture)


def crop_halves(picture: np.ndarray, above: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """What stands in the left and right (or upper and lower) half, as square crops (S, S, 3)."""
    ground = border(picture)
    first, second = np.split(picture, 2, axis=0 if above else 1)
    return crop_object(first, ground), crop_object(second, ground)


def _square(picture: np.ndarray, box: Region, ground: np.ndarray) -> np.ndarray:
    (y, x), side = box.centre, max(box.bottom - box.top, box.right - box.left) * 1.08
    reach = max(picture.shape[:2])
    colour = np.broadcast_to(ground.round().astype(np.uint8), (*(n + 2 * reach for n in picture.shape[:2]), 3))
    wide = colour.copy()
    wide[reach : reach + picture.shape[0], reach : reach + picture.shape[1]] = picture
    frame = (x - side / 2 + reach, y - side / 2 + reach, x + side / 2 + reach, y + side / 2 + reach)
    return np.asarray(Image.fromarray(wide).resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=frame))
