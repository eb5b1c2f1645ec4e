"""Scenes: captions say what is drawn, and some combinations are never drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sfumato.data.icons import Icon, IconSet
from sfumato.data.scenes import (
    GROUNDS,
    HUES,
    Composer,
    Scene,
    Thing,
    concepts,
    dominating_hue,
    never_composed,
    other_concepts,
    rotate_hue,
)
from sfumato.data.words import a, plural


def scene(discs: IconSet, *nouns: str, colour: str = "", **options: object) -> Scene:
    icon = discs.icons[0]
    return Scene(tuple(Thing(noun, icon, colour) for noun in nouns), "3d", **{"ground": "white", **options})  # type: ignore[arg-type]


def test_concept_list_is_sound() -> None:
    nouns = list(concepts().values())
    assert 100 <= len(nouns) <= 200 and len(set(nouns)) == len(nouns)


@pytest.mark.parametrize(
    ("options", "caption"),
    [
        ({}, "a cat on a white background, 3d style"),
        ({"names_style": False, "names_ground": False}, "a cat"),
        ({"layout": "corner", "place": "top left", "names_style": False},
         "a small cat in the top left corner on a white background"),
        ({"layout": "copies", "count": 3, "colour": "pink", "names_ground": False}, "three pink cats, 3d style"),
        ({"ground": "orange", "names_style": False}, "a cat on an orange background"),
    ],
)  # fmt: skip
def test_captions(discs: IconSet, options: dict[str, object], caption: str) -> None:
    assert scene(discs, "cat", **options).caption == caption  # type: ignore[arg-type]


def test_pairs_are_described_in_order(discs: IconSet) -> None:
    bare = {"names_style": False, "names_ground": False}
    assert scene(discs, "cat", "bus", layout="beside", **bare).caption == "a cat left of a bus"
    assert scene(discs, "owl", "bus", layout="above", **bare).caption == "an owl above a bus"


def test_words() -> None:
    wanted = {"palm tree": "palm trees", "mouse": "mice", "box": "boxes", "cherry": "cherries", "scissors": "scissors"}
    assert {noun: plural(noun) for noun in wanted} == wanted
    assert plural("snowman") == "snowmen" and plural("wine glass") == "wine glasses"
    assert a("umbrella") == "an umbrella" and a("unicorn") == "a unicorn" and a("green scissors") == "green scissors"
    names = ("ballet shoes", "octopus", "face with closed eyes", "eyes")
    assert [a(name) for name in names] == ["ballet shoes", "an octopus", "a face with closed eyes", "eyes"]


def test_held_out_rule(discs: IconSet) -> None:
    assert never_composed(scene(discs, "cat", colour="purple"))
    assert never_composed(scene(discs, "apple", colour="blue"))
    assert never_composed(scene(discs, "dog", "car", layout="beside"))
    assert never_composed(scene(discs, "apple", ground="blue"))  # red by nature
    assert never_composed(scene(discs, "apple", colour="red", ground="dark blue"))
    assert not never_composed(scene(discs, "apple", colour="green", ground="blue"))
    assert not never_composed(scene(discs, "dog", "bus", layout="beside"))
    assert never_composed(scene(discs, "standing cat", colour="purple"))
    assert never_composed(scene(discs, "racing car", "standing dog", layout="beside"))
    assert not never_composed(scene(discs, "pineapple", colour="blue"))


def test_random_scenes_hold_the_combinations_out_of_captions(discs: IconSet) -> None:
    composer = Composer(discs, synonyms={"cat": ["feline"]})
    rng = np.random.default_rng(0)
    scenes = [composer.sample(rng) for _ in range(6000)]
    captions = [s.caption for s in scenes]
    assert not [c for c in captions if "purple cat" in c or "blue apple" in c or "purple feline" in c]
    assert not [c for c in captions if " dog " in f" {c} " and " car " in f" {c} "]
    assert any("purple dog" in c for c in captions) and any("apple" in c for c in captions)  # the rule is not vacuous
    assert {s.layout for s in scenes} == {"single", "corner", "beside", "above", "copies"}
    assert {s.ground for s in scenes} == set(GROUNDS)
    assert any("feline" in c for c in captions)


def test_further_concepts_are_drawn_by_their_share(discs: IconSet) -> None:
    row = discs.by_code()[next(iter(concepts()))]["3d"]
    codes = {
        "1F9A6": "otter",
        "1F408": "cat",
        "1F1E6": "letter",
        "1F3FB": "tone",
        "1F468-1F33E": "farmer",
        "1F499": "blue heart",
    }
    table = discs.by_code() | {
        code: {style: replace(row, code=code, label=label) for style in ("3d", "flat", "bold")}
        for code, label in codes.items()
    }

    class More(IconSet):
        def __init__(self) -> None:
            self.icons, self.styles = discs.icons, discs.styles

        def by_code(self) -> dict[str, dict[str, Icon]]:
            return table

    others = other_concepts(More())
    assert others == {"1F9A6": "otter", "1F408": "standing cat", "1F499": "blue heart"}
    composer, rng = Composer(More(), others=others, beyond=0.4, wander=0.0), np.random.default_rng(0)
    scenes = [composer.sample(rng) for _ in range(3000)]
    things = [thing for s in scenes for thing in s.things]
    share = sum(thing.noun in others.values() for thing in things) / len(things)
    print(f"{share:.3f} of the things are others")
    assert abs(share - 0.4) < 0.03
    assert not [s for s in scenes if "purple standing cat" in s.caption]
    assert {t.colour for t in things if t.noun == "blue heart"} == {""} and any("otter" in s.caption for s in scenes)
    still = Scene((things[0],), "3d", "white")
    assert np.array_equal(composer.draw(still, rng), composer.draw(still, rng))


def test_same_seed_same_picture(discs: IconSet) -> None:
    def draw() -> np.ndarray:
        composer, rng = Composer(discs), np.random.default_rng(3)
        return np.stack([composer.draw(composer.sample(rng), rng) for _ in range(4)])

    assert np.array_equal(draw(), draw())


def test_drawing_puts_things_where_the_caption_says(discs: IconSet) -> None:
    composer, rng = Composer(discs), np.random.default_rng(0)
    noun = next(iter(composer.nouns.values()))
    icon = next(i for n, i in composer.by_style["3d"] if n == noun)
    thing = Thing(noun, icon)
    corner = composer.draw(Scene((thing,), "3d", "white", "corner", "bottom right"), rng)
    rows, columns = np.nonzero(corner[..., 1] < 100)
    print(f"middle of the thing at x = {columns.mean():.0f}, y = {rows.mean():.0f} of 128")
    assert rows.mean() > 80 and columns.mean() > 80
    green = composer.draw(Scene((Thing(noun, icon, "green", 120 / 360),), "3d", "blue"), rng)
    assert tuple(green[2, 2]) == GROUNDS["blue"] and green[64, 64, 1] > 2 * green[64, 64, 0]


def test_hue_of_a_picture(discs: IconSet) -> None:
    disc = discs.icons[0].rgba()
    hue = dominating_hue(disc)
    assert hue is not None and min(hue, 360 - hue) < 2
    for name, angle in HUES.items():
        turned = dominating_hue(rotate_hue(disc, angle / 360))
        assert turned is not None
        error = abs((turned - angle + 180) % 360 - 180)
        print(f"{name}: asked {angle:.0f} degrees, got {turned:.1f}")
        assert error < 3
    gray = disc.copy()
    gray[..., :3] = 128
    assert dominating_hue(gray) is None
