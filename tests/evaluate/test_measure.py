"""Measures of pictures whose answer is known."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from sfumato.data.scenes import GROUNDS, HUES
from sfumato.evaluate import measure
from sfumato.evaluate.judge import soften

from .drawn import BLUE, GREEN, RED, discs

SOFTNESS = pytest.mark.parametrize("softness", [1.0, 3.0])


def test_lab_of_known_colours() -> None:
    """White, black and the sRGB primaries, from Lindbloom's calculator (D65)."""
    rgb = np.array([(255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)])
    lab = np.array([(100, 0, 0), (0, 0, 0), (53.24, 80.09, 67.20), (87.73, -86.18, 83.18), (32.30, 79.19, -107.86)])
    worst = np.abs(measure.to_lab(rgb) - lab).max()
    print(worst)
    assert worst < 0.02


@pytest.mark.parametrize("ground", GROUNDS)
def test_every_ground_is_read_off_a_soft_noisy_picture(ground: str) -> None:
    picture = soften(discs(ground, (64, 64, 61, (90, 200, 90))), 3)
    noisy = picture + np.random.default_rng(0).normal(0, 4, picture.shape)
    assert measure.ground_colour(noisy.clip(0, 255).astype(np.uint8)) == ground


def test_a_ground_of_another_shade_is_another_ground() -> None:
    assert measure.ground_colour(discs((226, 226, 226))) == "light gray"
    assert measure.ground_colour(discs((240, 240, 240))) == "white"


@SOFTNESS
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("radius", [14, 28])
def test_count_of_discs_apart_and_touching(count: int, radius: int, softness: float) -> None:
    spots = [(36, 36), (92, 36), (36, 92), (92, 92)][:count]
    picture = soften(discs("yellow", *((x, y, radius, BLUE) for x, y in spots)), softness)
    assert len(measure.objects(picture)) == count


def test_small_parts_are_no_objects_and_an_empty_picture_has_none() -> None:
    assert len(measure.objects(discs("white", (64, 64, 30, RED), (110, 20, 6, RED)))) == 1
    assert measure.objects(discs("white")) == []
    assert measure.object_box(discs("white")) is None
    assert measure.object_colour(discs("white")) == ""


def test_boxes_are_where_the_discs_are() -> None:
    big, small = measure.objects(discs("black", (40, 40, 24, GREEN), (98, 100, 18, GREEN)))
    found = np.array([(*big.centre, big.right - big.left), (*small.centre, small.right - small.left)])
    worst = np.abs(found - [(40.5, 40.5, 49), (100.5, 98.5, 37)]).max()
    print(worst)
    assert worst <= 4  # small gaps are closed, which widens a box


@SOFTNESS
@pytest.mark.parametrize(("x", "y", "corner"), [(36, 36, "top left"), (92, 36, "top right"), (36, 92, "bottom left"),
                                                (92, 92, "bottom right"), (64, 36, ""), (64, 64, "")])  # fmt: skip
def test_corner(x: int, y: int, corner: str, softness: float) -> None:
    assert measure.corner(soften(discs("pink", (x, y, 26, BLUE)), softness)) == corner


def test_a_large_object_is_in_no_corner() -> None:
    assert measure.corner(discs("white", (48, 48, 46, RED))) == ""


@SOFTNESS
@pytest.mark.parametrize("name", HUES)
def test_object_colour(name: str, softness: float) -> None:
    colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(HUES[name] / 360, 0.8, 0.9))
    shade = tuple(c // 2 for c in colour)
    picture = discs("light gray", (64, 64, 50, colour), (64, 80, 20, shade), (50, 50, 8, (255, 255, 255)))
    assert measure.object_colour(soften(picture, softness)) == name


def test_a_gray_object_has_no_colour() -> None:
    assert measure.object_colour(discs("blue", (64, 64, 50, (120, 122, 120)))) == ""


def test_crops_fill_the_frame_wherever_the_object_is() -> None:
    crops = [measure.crop_object(discs("white", (x, y, 20, RED))) for x, y in ((64, 64), (30, 100))]
    assert crops[0].shape == (64, 64, 3)
    worst = np.abs(crops[0].astype(int) - crops[1]).max()
    print(worst)
    assert worst <= 40  # resampling at the disc's edge
    assert (crops[0][32, 4:60] == RED).all() and (crops[0][0] == 255).all()


def test_halves_come_in_the_order_of_the_text() -> None:
    left, right = measure.crop_halves(discs("white", (32, 64, 24, RED), (96, 64, 24, BLUE)))
    assert (left[32, 32] == RED).all() and (right[32, 32] == BLUE).all()
    upper, lower = measure.crop_halves(discs("white", (64, 32, 24, RED), (64, 96, 24, BLUE)), above=True)
    assert (upper[32, 32] == RED).all() and (lower[32, 32] == BLUE).all()


def test_regions_of_a_u_and_of_chance_are_those_of_a_flood() -> None:
    mask = np.random.default_rng(0).random((40, 30)) < 0.4
    mask[30:38, 5:25] = True
    mask[30:36, 8:22] = False
    assert sorted(region.area for region in measure.regions(mask)) == sorted(flooded(mask))


def flooded(mask: np.ndarray) -> list[int]:
    """The areas of the connected regions, by flood fill."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    areas = []
    while left:
        stack, area = [left.pop()], 1
        while stack:
            y, x = stack.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack += near
            area += len(near)
        areas.append(area)
    return areas


def test_regions_join_at_corners() -> None:
    mask = np.zeros((8, 8), bool)
    mask[1, 1] = mask[2, 2] = mask[2, 3] = mask[6, 6] = True
    assert [(r.area, r.top, r.left, r.bottom, r.right) for r in measure.regions(mask)] == [
        (3, 1, 1, 3, 4),
        (1, 6, 6, 7, 7),
    ]
