"""Scenes: icons composed on a coloured ground, with a caption that says what is where.

A scene is one icon; a small one in a corner; two of one style beside or above each other; or two to four
copies. Icons of one dominating hue may be rotated to another, which the caption then names. What a caption
leaves out is fixed, so that short prompts have one meaning: no ground named is white, no style named is "3d".

Some combinations are never composed (`never_composed`), so that they can be asked for later as a test of
composition. The rule looks at the finished caption's content, after every recolouring, not at its parts.
"""

from __future__ import annotations

import colorsys
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import resources

import numpy as np
import yaml
from PIL import Image

from sfumato.data.icons import SIZE, Icon, IconSet
from sfumato.data.words import a, plain_words, plural

DEFAULT_STYLE = "3d"

#: The eighteen grounds, sRGB.
GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255), "black": (16, 16, 16), "gray": (128, 128, 128), "light gray": (208, 208, 208),
    "red": (214, 40, 40), "dark red": (110, 16, 20), "orange": (245, 130, 32), "yellow": (250, 215, 50),
    "green": (50, 160, 70), "dark green": (16, 84, 40), "light green": (160, 222, 150), "cyan": (60, 205, 215),
    "blue": (40, 90, 210), "dark blue": (18, 34, 100), "light blue": (150, 200, 245), "purple": (120, 60, 170),
    "pink": (248, 150, 190), "brown": (122, 76, 44),
}  # fmt: skip

#: Hues that an icon can be rotated to, in degrees.
HUES: dict[str, float] = {
    "red": 0, "orange": 28, "yellow": 50, "green": 125, "cyan": 185, "blue": 218, "purple": 275, "pink": 325,
}  # fmt: skip

COUNTS = {2: "two", 3: "three", 4: "four"}

#: What no scene shows: (colour, noun) of a thing, nouns together, and (colour, noun, last word of the ground).
HELD_OUT_COLOURS = frozenset({("purple", "cat"), ("blue", "apple")})
HELD_OUT_PAIRS = frozenset({frozenset({"dog", "car"})})
HELD_OUT_GROUNDS = frozenset({("red", "apple", "blue")})


@lru_cache(1)
def concepts() -> dict[str, str]:
    """Code point -> noun, for the concepts of the built-in model."""
    text = resources.files(__package__).joinpath("concepts.yaml").read_text(encoding="utf-8")
    groups = yaml.load(text, yaml.BaseLoader)  # code points such as 2615 stay text
    return {code: noun for group in groups.values() for code, noun in group.items()}


#: What captions call the emoji whose own name a concept of the list has.
SECOND_NAMES = {
    "1F401": "standing mouse", "1F404": "standing cow", "1F405": "standing tiger", "1F407": "standing rabbit",
    "1F408": "standing cat", "1F40E": "standing horse", "1F412": "standing monkey", "1F415": "standing dog",
    "1F416": "standing pig", "1F40B": "big whale", "1F41F": "plain fish", "1F368": "sundae", "2602": "open umbrella",
    "2603": "snowman in the snow",
}  # fmt: skip
SKIN_TONES, LETTERS = range(0x1F3FB, 0x1F400), range(0x1F1E6, 0x1F200)


def other_concepts(icons: IconSet, least: int = 3) -> dict[str, str]:
    """Code point -> noun for the emoji beyond the model's own list that at least so many sets draw.

    Sequences (flags, professions, skin tones) and the letters that flags are spelled with are left out.
    """
    own, found = concepts(), {}
    for code, row in icons.by_code().items():
        if code in own or "-" in code or len(row) < least:
            continue
        if int(code, 16) in SKIN_TONES or int(code, 16) in LETTERS:
            continue
        found[code] = SECOND_NAMES.get(code) or plain_words(next(iter(row.values())).label)
    return found


@dataclass(frozen=True)
class Thing:
    """One icon of a scene: noun, drawing, named colour ("" when it has none) and hue rotation in turns."""

    noun: str
    icon: Icon = field(repr=False)
    colour: str = ""
    turn: float = 0.0

    @property
    def phrase(self) -> str:
        """The noun, after the colour when it has one."""
        return f"{self.colour} {self.noun}".strip()


@dataclass(frozen=True)
class Scene:
    """What is drawn: things of one style, an arrangement, a ground; `caption` follows from it.

    layout: "single", "corner" (place = "top left" ...), "beside", "above", or "copies" (count of one thing).
    """

    things: tuple[Thing, ...]
    style: str
    ground: str
    layout: str = "single"
    place: str = ""
    count: int = 1
    names_style: bool = True
    names_ground: bool = True

    @cached_property
    def caption(self) -> str:
        """The scene in words."""
        first = self.things[0]
        if self.layout == "copies":
            noun = f"{first.colour} {plural(first.noun)}".strip()
            text = f"{COUNTS[self.count]} {noun}"
        elif self.layout == "corner":
            text = f"{a(f'small {first.phrase}')} in the {self.place} corner"
        elif self.layout == "beside":
            text = f"{a(first.phrase)} left of {a(self.things[1].phrase)}"
        elif self.layout == "above":
            text = f"{a(first.phrase)} above {a(self.things[1].phrase)}"
        else:
            text = a(first.phrase)
        if self.names_ground:
            text += f" on {a(self.ground)} background"
        if self.names_style:
            text += f", {self.style} style"
        return text


def never_composed(scene: Scene) -> bool:
    """Whether the finished scene shows a combination that is kept out of the training data.

    A noun of several words counts for each of them: a purple standing cat is a purple cat.
    """
    words = [thing.noun.split() for thing in scene.things]
    if any(
        {first, second} in HELD_OUT_PAIRS for a, b in itertools.combinations(words, 2) for first in a for second in b
    ):
        return True
    for thing in scene.things:
        for word in thing.noun.split():
            if (thing.colour, word) in HELD_OUT_COLOURS:
                return True
            # An apple whose colour is not named is still red to the eye.
            colour = thing.colour or ("red" if thing.noun == "apple" else "")
            if (colour, word, scene.ground.rpartition(" ")[2]) in HELD_OUT_GROUNDS:
                return True
    return False


def dominating_hue(rgba: np.ndarray) -> float | None:
    """The hue in degrees that most of a picture (H, W, 4) uint8 shares, or None when it has no such hue."""
    pixels = rgba.reshape(-1, 4)
    pixels = pixels[pixels[:, 3] > 200][::7, :3] / 255.0
    if len(pixels) < 50:
        return None
    hsv = np.array([colorsys.rgb_to_hsv(*p) for p in pixels])
    vivid = (hsv[:, 1] > 0.35) & (hsv[:, 2] > 0.3)
    if vivid.mean() < 0.55:
        return None
    angle = 2 * np.pi * hsv[vivid, 0]
    mean = np.exp(1j * angle).mean()
    spread = np.abs((angle - np.angle(mean) + np.pi) % (2 * np.pi) - np.pi)
    if (spread < np.radians(25)).mean() < 0.85:
        return None
    return float(np.degrees(np.angle(mean)) % 360)


def rotate_hue(rgba: np.ndarray, turn: float) -> np.ndarray:
    """The picture (H, W, 4) uint8 with its hue rotated by `turn` (1 = a full circle); alpha as it was."""
    hsv = np.asarray(Image.fromarray(rgba[..., :3]).convert("HSV")).copy()
    hsv[..., 0] = (hsv[..., 0].astype(np.int32) + round(turn * 256)) % 256
    rgb = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    return np.dstack([rgb, rgba[..., 3]])


class Composer:
    """Draws random scenes from an icon set.

    icons:    the set (`IconSet`); only the given concepts are used.
    nouns:    code point -> noun; the built-in list by default.
    synonyms: noun -> words that captions may use in its place (seldom); empty by default.
    weights:  layout -> share of scenes.
    others:   code point -> noun of further concepts, none of which is in `nouns`; `beyond` is the share of things
              that are drawn from them.
    wander:   how far places and sizes vary, as a share of what they may.
    styled:   share of scenes in a named style, evenly over all styles; the rest is in the default style, unnamed.
    """

    def __init__(
        self,
        icons: IconSet,
        nouns: Mapping[str, str] | None = None,
        synonyms: Mapping[str, Sequence[str]] | None = None,
        weights: Mapping[str, float] | None = None,
        styled: float = 0.6,
        others: Mapping[str, str] | None = None,
        beyond: float = 0.0,
        wander: float = 1.0,
    ):
        own = dict(nouns or concepts())
        self.nouns = {**own, **(others or {})}
        self.beyond, self.wander = beyond if others else 0.0, wander
        self.synonyms = {noun: tuple(words) for noun, words in (synonyms or {}).items()}
        self.weights = dict(weights or {"single": 0.7, "corner": 0.08, "beside": 0.1, "above": 0.05, "copies": 0.07})
        self.styled = styled
        table = icons.by_code()
        self.styles = icons.styles
        self.by_style, self.other_by_style = (
            {
                style: [(noun, table[code][style]) for code, noun in part.items() if style in table.get(code, {})]
                for style in self.styles
            }
            for part in (own, others or {})
        )
        self._pixels: dict[Icon, np.ndarray] = {}
        self._hues: dict[Icon, float | None] = {}

    def pixels(self, icon: Icon) -> np.ndarray:
        """The icon trimmed to its opaque box, kept in memory, uint8 (h, w, 4)."""
        if icon not in self._pixels:
            rgba = icon.rgba()
            rows, columns = np.nonzero(rgba[..., 3] > 8)
            rgba = rgba[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            self._pixels[icon] = np.ascontiguousarray(rgba)
            self._hues[icon] = dominating_hue(rgba)
        return self._pixels[icon]

    def _thing(self, rng: np.random.Generator, style: str) -> Thing:
        known = self.other_by_style if self.beyond and rng.random() < self.beyond else self.by_style
        noun, icon = known[style][rng.integers(len(known[style]))]
        self.pixels(icon)
        hue, words = self._hues[icon], self.synonyms.get(noun, ())
        colour, turn = "", 0.0
        if hue is not None and not {*noun.split()} & {*HUES}:  # a blue heart is called one already
            own = min(HUES, key=lambda name: abs((HUES[name] - hue + 180) % 360 - 180))
            if rng.random() < 0.45:
                colour = list(HUES)[rng.integers(len(HUES))]
                turn = 0.0 if colour == own else (HUES[colour] - hue) / 360
            elif rng.random() < 0.3:
                colour = own
        if words and rng.random() < 0.1:
            noun = words[rng.integers(len(words))]
        return Thing(noun, icon, colour, turn)

    def sample(self, rng: np.random.Generator) -> Scene:
        """A random scene that is none of the held-out combinations."""
        while True:
            named = bool(rng.random() < self.styled)
            style = self.styles[rng.integers(len(self.styles))] if named else DEFAULT_STYLE
            layout = str(rng.choice(list(self.weights), p=np.fromiter(self.weights.values(), float)))
            things = [self._thing(rng, style)]
            if layout in {"beside", "above"}:
                things.append(self._thing(rng, style))
                if things[0].noun == things[1].noun:
                    continue
            grounded = bool(rng.random() < 0.8)
            ground = list(GROUNDS)[rng.integers(len(GROUNDS))] if grounded else "white"
            place = f"{('top', 'bottom')[rng.integers(2)]} {('left', 'right')[rng.integers(2)]}"
            scene = Scene(
                tuple(things), style, ground, layout,
                place if layout == "corner" else "",
                int(rng.integers(2, 5)) if layout == "copies" else 1,
                names_style=named, names_ground=grounded,
            )  # fmt: skip
            if not never_composed(self.with_concepts(scene)):
                return scene

    def with_concepts(self, scene: Scene) -> Scene:
        """The scene with synonyms replaced by their concept's noun, for the held-out rule."""
        things = tuple(Thing(self.nouns[t.icon.code], t.icon, t.colour, t.turn) for t in scene.things)
        return Scene(things, scene.style, scene.ground, scene.layout, scene.place, scene.count)

    def draw(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """The scene's picture, uint8 (128, 128, 3); places and sizes vary a little with `rng`."""

        def jitter(spread: int) -> int:
            return round(self.wander * int(rng.integers(-spread, spread + 1)))

        near, far, middle = SIZE * 9 // 32, SIZE * 23 // 32, SIZE // 2
        if scene.layout == "single":
            spots = [(middle + jitter(4), middle + jitter(4), SIZE * 13 // 16 + jitter(6))]
        elif scene.layout == "corner":
            y, x = (near if side in {"top", "left"} else far for side in scene.place.split())
            spots = [(x + jitter(3), y + jitter(3), SIZE * 13 // 32 + jitter(3))]
        elif scene.layout in {"beside", "above"}:
            spots = [(near + jitter(2), middle + jitter(4), SIZE // 2 + jitter(3) - 4),
                     (far + jitter(2), middle + jitter(4), SIZE // 2 + jitter(3) - 4)]  # fmt: skip
            if scene.layout == "above":
                spots = [(y, x, size) for x, y, size in spots]
        else:
            size = SIZE * 7 // 16 + jitter(3)
            spots = {
                2: [(near, middle, size), (far, middle, size)],
                3: [(middle, near, size), (near, far, size), (far, far, size)],
                4: [(near, near, size), (far, near, size), (near, far, size), (far, far, size)],
            }[scene.count]
        picture = Image.new("RGB", (SIZE, SIZE), GROUNDS[scene.ground])
        things = scene.things if len(scene.things) == len(spots) else scene.things * len(spots)
        for thing, (x, y, size) in zip(things, spots, strict=True):
            rgba = self.pixels(thing.icon)
            if thing.turn:
                rgba = rotate_hue(rgba, thing.turn)
            scale = size / max(rgba.shape[:2])
            width, height = (max(1, round(side * scale)) for side in (rgba.shape[1], rgba.shape[0]))
            sprite = Image.fromarray(rgba).convert("RGBa").resize((width, height), Image.Resampling.BICUBIC)
            sprite = sprite.convert("RGBA")
            picture.paste(sprite, (x - width // 2, y - height // 2), sprite)
        return np.asarray(picture)
