"""The five hundred fixed prompts of `sfumato eval mini`, each with what its picture must show.

They are stored in prompts.jsonl, one a line, so that figures of different models and versions compare. `make_prompts`
made that file from the fixed lists below, with no chance involved. Prompt i is asked with seed i.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TypeVar

from sfumato.data.icons import STYLES, Icon
from sfumato.data.scenes import DEFAULT_STYLE, GROUNDS, HUES, Scene, Thing, concepts
from sfumato.data.words import a

T = TypeVar("T")
OWN, NEVER, SYNONYMS = "own list", "never composed", "synonyms"


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its picture must show.

    group:   what the prompt is about: "concept", "style", "ground"... or the name of a never-composed combination.
    kind:    OWN (said by training captions or like them), NEVER (a combination that was held out) or SYNONYMS.
    things:  for each thing in the order of the text, the concepts that count as right (the judge's nouns).
    colours: for each thing, the colour that is named, "" for none.
    style, ground: "" where the text names none. layout, place, count: as in `Scene`. seed: of its picture.
    """

    text: str
    group: str
    kind: str
    things: tuple[tuple[str, ...], ...]
    colours: tuple[str, ...]
    style: str = ""
    ground: str = ""
    layout: str = "single"
    place: str = ""
    count: int = 1
    seed: int = 0

    def scene(self, icons: Sequence[Icon], turns: Sequence[float]) -> Scene:
        """The scene that the prompt describes, of the given icons and hue rotations (one a thing)."""
        nouns = (accepted[0] for accepted in self.things)
        things = tuple(map(Thing, nouns, icons, self.colours, turns))
        return Scene(things, self.style or DEFAULT_STYLE, self.ground or "white", self.layout, self.place, self.count,
                     names_style=bool(self.style), names_ground=bool(self.ground))  # fmt: skip


def read_prompts(path: Path | None = None) -> tuple[Prompt, ...]:
    """The stored prompts, or those of another file of the same form."""
    file = path or resources.files(__package__).joinpath("prompts.jsonl")
    text = file.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return tuple(
        Prompt(**{**row, "things": tuple(map(tuple, row["things"])), "colours": tuple(row["colours"])}) for row in rows
    )


def write_prompts(prompts: Sequence[Prompt], path: Path) -> None:
    """Write prompts one a line, leaving out what is not asked for."""
    rows = [{k: v for k, v in asdict(p).items() if v or k == "things"} for p in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def thinned(prompts: Sequence[T], count: int) -> tuple[T, ...]:
    """`count` of the prompts, evenly over the list and so over its groups."""
    if not 1 <= count <= len(prompts):
        raise ValueError(f"prompts = {count}; it must be from 1 to {len(prompts)}")
    return tuple(prompts[i * len(prompts) // count] for i in range(count))


#: Drawn in all nine styles, and of one clear hue in the default one.
COLOURABLE = (
    "apple", "pear", "balloon", "star", "moon", "dress", "bell", "snake", "whale", "dolphin", "maple leaf", "heart",
    "backpack", "book",
)  # fmt: skip
#: Drawn in all nine styles; seven nouns a style.
STYLED = (
    "dog", "cat", "rabbit", "bear", "panda", "cow", "frog", "monkey", "elephant", "penguin", "turtle", "octopus",
    "whale", "bee", "ladybug", "cactus", "palm tree", "sunflower", "rose", "tulip", "mushroom", "apple", "pear",
    "watermelon", "grapes", "strawberry", "cherries", "tomato", "bread", "hamburger", "doughnut", "ice cream", "coffee",
    "beer", "car", "taxi", "bus", "fire truck", "truck", "bicycle", "airplane", "rocket", "sailboat", "ship", "tent",
    "umbrella", "balloon", "crown", "moon", "cloud", "rainbow", "fire", "bomb", "bell", "guitar", "basketball",
    "television", "t-shirt", "dress", "skull", "ghost", "alien", "pumpkin",
)  # fmt: skip
#: Nouns on a named ground, four a ground; none is an apple, whose red on blue was held out.
GROUNDED = (
    "cat", "car", "sunflower", "rocket", "panda", "hamburger", "umbrella", "penguin", "house", "strawberry", "dog",
    "guitar", "frog", "crown", "bus", "pineapple", "robot", "tulip", "star", "elephant", "doughnut", "ship", "banana",
    "rabbit", "camera", "fox", "mushroom", "airplane", "cow", "lemon", "key", "octopus", "balloon", "cactus", "book",
    "pizza", "whale", "bell", "truck", "tiger", "ice cream",
)  # fmt: skip
PAIRS = (
    ("cat", "balloon"), ("dog", "star"), ("car", "house"), ("apple", "banana"), ("rabbit", "mushroom"),
    ("panda", "umbrella"), ("bus", "bicycle"), ("frog", "crown"), ("pear", "strawberry"), ("penguin", "fire"),
    ("robot", "rocket"), ("tiger", "elephant"), ("guitar", "bell"), ("key", "lock"), ("ghost", "pumpkin"),
    ("lemon", "tomato"), ("cow", "sunflower"), ("airplane", "sailboat"), ("heart", "gift"), ("book", "camera"),
)  # fmt: skip
COUNTED = ("apple", "balloon", "cat", "star", "car", "ladybug", "strawberry", "basketball")
CORNERED = ("star", "frog", "car", "heart", "mushroom", "penguin", "apple", "balloon", "dog", "rocket", "crown",
            "banana", "tomato", "bear", "house", "tulip", "bell", "moon", "cow", "cactus")  # fmt: skip
#: Words that stand in no caption -> the concepts that they mean.
SYNONYM_OF = {
    "puppy": "dog", "doggy": "dog", "kitten": "cat", "kitty": "cat", "bunny": "rabbit", "hare": "rabbit",
    "pony": "horse", "piglet": "pig", "hog": "pig", "calf": "cow", "toad": "frog", "ape": "monkey",
    "serpent": "snake", "tortoise": "turtle", "grizzly": "bear", "bike": "bicycle", "cab": "taxi",
    "plane": "airplane", "chopper": "helicopter", "lorry": "truck", "spaceship": "rocket", "yacht": "sailboat",
    "boat": "sailboat|ship", "burger": "hamburger", "donut": "doughnut", "biscuit": "cookie",
    "aubergine": "eggplant", "loaf": "bread", "cherry": "cherries", "present": "gift", "diamond": "gem",
    "jewel": "gem", "spectacles": "glasses", "tv": "television", "notebook computer": "laptop", "lamp": "light bulb",
    "football": "soccer ball", "rucksack": "backpack", "sneaker": "shoe", "home": "house", "fortress": "castle",
    "blaze": "fire",
}  # fmt: skip
#: (ground, style) of the variants of a never-composed combination; "" names none.
VARIANTS = (
    ("", ""), ("white", ""), ("yellow", ""), ("dark green", ""), ("pink", ""), ("gray", ""), ("", "glossy"),
    ("", "flat"), ("", "sticker"), ("light blue", "soft"), ("orange", "flat"), ("black", "glossy"),
)  # fmt: skip
BLUES = (("blue", ""), ("dark blue", ""), ("light blue", ""), ("blue", "glossy"), ("blue", "flat"), ("blue", "3d"),
         ("blue", "soft"), ("blue", "sticker"), ("dark blue", "flat"), ("light blue", "bold"), ("blue", "minimal"),
         ("light blue", "retro"))  # fmt: skip


def make_prompts() -> tuple[Prompt, ...]:
    """The five hundred prompts, from the lists above and the list of concepts."""
    prompts = [_prompt("concept", (noun,)) for noun in concepts().values()]
    styles, hues, sides = list(STYLES), list(HUES), ("top left", "top right", "bottom left", "bottom right")
    prompts += [_prompt("style", (noun,), style=styles[i % 9]) for i, noun in enumerate(STYLED)]
    for i, ground in enumerate(GROUNDS):
        prompts += [_prompt("ground", (GROUNDED[(4 * i + k) % len(GROUNDED)],), ground=ground) for k in range(4)]
    for i, noun in enumerate(COLOURABLE):
        # Every other noun gets red, yellow, cyan and purple; the apple is one of them, for its blue was held out.
        prompts += [_prompt("colour", (noun,), colours=(hue,)) for hue in hues[i % 2 :: 2]]
    # The other order follows for the first nine and four pairs; a third names its ground, a third its style.
    beside = PAIRS[:18] + tuple(pair[::-1] for pair in PAIRS[:18])
    above = PAIRS[8:] + tuple(pair[::-1] for pair in PAIRS[8:])
    for layout, pairs in (("left/right", beside), ("above/below", above)):
        for i, pair in enumerate(pairs):
            ground = list(GROUNDS)[(5 * i) % 18] if i % 3 == 1 and "apple" not in pair else ""
            style = ("glossy", "flat", "sticker")[i // 3 % 3] if i % 3 == 2 and not {"key", "gift"} & set(pair) else ""
            prompts.append(_prompt(layout, pair, style=style, ground=ground))
    for i, noun in enumerate(COUNTED):
        for count in (2, 3, 4):
            ground = ("yellow", "light green", "pink", "gray")[i // 2] if i % 2 else ""
            prompts.append(_prompt("count", (noun,), count=count, ground=ground))
    prompts += [_prompt("corner", (noun,), place=sides[i % 4]) for i, noun in enumerate(CORNERED)]
    prompts += [_prompt("synonym", (noun,), word=word, kind=SYNONYMS) for word, noun in SYNONYM_OF.items()]
    for i, ((ground, style), (blue, blue_style)) in enumerate(zip(VARIANTS, BLUES, strict=True)):
        pair = ("dog", "car") if i % 2 else ("car", "dog")
        prompts += [
            _prompt("purple cat", ("cat",), colours=("purple",), ground=ground, style=style, kind=NEVER),
            _prompt("blue apple", ("apple",), colours=("blue",), ground=ground, style=style, kind=NEVER),
            _prompt("dog and car", pair, ground=ground, style=style, kind=NEVER, above=i % 4 > 1),
            _prompt("red apple on blue", ("apple",), colours=("red",), ground=blue, style=blue_style, kind=NEVER),
        ]
    return tuple(replace(prompt, seed=i) for i, prompt in enumerate(prompts))


def _prompt(
    group: str,
    nouns: tuple[str, ...],
    colours: tuple[str, ...] = (),
    style: str = "",
    ground: str = "",
    place: str = "",
    count: int = 1,
    word: str = "",
    kind: str = OWN,
    above: bool = False,
) -> Prompt:
    pair = "above" if above or group == "above/below" else "beside"
    layout = pair if len(nouns) == 2 else "corner" if place else "copies" if count > 1 else "single"
    things = tuple(tuple(noun.split("|")) for noun in nouns)
    blank = Icon("", "", (), "", Path())
    prompt = Prompt("", group, kind, things, colours or ("",) * len(nouns), style, ground, layout, place, count)
    text = prompt.scene([blank] * len(nouns), [0.0] * len(nouns)).caption
    return replace(prompt, text=a(word) if word else text)


if __name__ == "__main__":
    write_prompts(make_prompts(), Path(__file__).with_name("prompts.jsonl"))
