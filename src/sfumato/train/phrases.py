"""The texts that the text tower is taught on: words alone, and words in phrases that read like captions.

Words come from the emoji list (labels and search words) and from the whole words of the teacher's own
vocabulary, which is sorted by how common a word is. So words that no caption contains (puppy, bike) are met
as often as their concepts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfumato.data.icons import read_emoji
from sfumato.data.words import plural

COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray", "cyan",
    "teal", "turquoise", "navy", "beige", "gold", "silver", "lime", "magenta", "maroon", "violet", "cream",
    "light blue", "dark blue", "light green", "dark green", "dark red", "light gray", "dark gray",
)  # fmt: skip
STYLES = (
    "3d",
    "glossy",
    "flat",
    "soft",
    "retro",
    "minimal",
    "sticker",
    "bold",
    "outline",
    "cartoon",
    "realistic",
)
COUNTS = ("two", "three", "four", "five", "2", "3", "4", "many", "several")
PLACES = ("left of", "right of", "above", "below", "next to", "on top of", "under", "beside", "and")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
SIZES = ("small", "big", "tiny", "large", "little", "huge")
LOOKS = ("cute", "old", "new", "beautiful", "shiny", "funny", "happy", "sad", "fresh", "striped", "simple")

#: Templates of one noun `w`; the other fields are drawn from the lists above.
SINGLE = (
    "a {w}",
    "the {w}",
    "{some} {w}",
    "a {colour} {w}",
    "{count} {ws}",
    "{count} {colour} {ws}",
    "a {size} {w}",
    "a {look} {w}",
    "a {w} on a {back} background",
    "a {colour} {w} on a {back} background",
    "a {w}, {style} style",
    "a {colour} {w}, {style} style",
    "{count} {ws} on a {back} background, {style} style",
    "a {w} on a {back} background, {style} style",
    "a {size} {w} in the {corner} corner",
    "a picture of a {w}",
    "an icon of a {w}",
)
PAIR = (
    "a {w} {place} a {v}",
    "a {w} and a {v}",
    "a {colour} {w} {place} a {v}",
    "a {w} {place} a {colour2} {v}",
    "a {colour} {w} {place} a {colour2} {v}",
    "a {w} {place} a {v} on a {back} background",
    "a {w} {place} a {v}, {style} style",
    "a {w} {place} a {v} on a {back} background, {style} style",
)
#: Words that carry no picture of their own; their states are left free.
EMPTY_WORDS = frozenset(
    ("a", "an", "the", "of", "on", "in", "and", "with", "to", "some", "at", "by", "for", "'s")
)  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """The texts and the words for the vocabulary.

    texts: every distinct text that is taught.
    words: (word, weight) for training the byte-pair vocabulary, a heavier word is merged earlier.
    """

    texts: tuple[str, ...]
    words: tuple[tuple[str, int], ...]


def build_corpus(
    labels: Sequence[str],
    tags: Sequence[str],
    common: Sequence[str],
    near: Sequence[str],
    phrases_per_name: int,
    phrases_per_word: int,
    pairs: int,
    seed: int,
) -> Corpus:
    """Join words and phrases into a corpus.

    labels, tags: emoji labels and search words, together the names; may hold several words.
    common: the teacher's whole words, the most common first.
    near:   those of them that lie near an emoji label in the teacher's space, the nearest first.
    phrases_per_name, phrases_per_word: phrases of one noun for each name, and for each near word.
    pairs:  phrases of two nouns; one noun is a name, the other a name or a near word.
    """
    draw = random.Random(seed)
    names = [*labels, *tags]
    texts = dict.fromkeys([*names, *common])
    for name in names:
        texts |= dict.fromkeys(_phrase(draw, SINGLE, name, name) for _ in range(phrases_per_name))
    for word in near:
        texts |= dict.fromkeys(_phrase(draw, SINGLE, word, word) for _ in range(phrases_per_word))
    for _ in range(pairs):
        first, second = draw.choice(names), draw.choice(names if draw.random() < 0.7 else near)
        both = (first, second) if draw.random() < 0.5 else (second, first)
        texts[_phrase(draw, PAIR, *both)] = None
    return Corpus(tuple(texts), tuple(_weights(labels, tags, common, near).items()))


def emoji_names(packages: Path) -> tuple[list[str], list[str]]:
    """Emoji labels, and their search words, of the npm packages in `packages`; no flags and letters."""
    kept = [e for e in read_emoji(packages).values() if not e.label.startswith(("flag: ", "regional indicator"))]
    labels = dict.fromkeys(clean(e.label) for e in kept)
    tags = dict.fromkeys(clean(tag) for e in kept for tag in e.tags)
    return [label for label in labels if label], [tag for tag in tags if tag and tag not in labels]


def whole_words(vocabulary: Iterable[str]) -> list[str]:
    """The lower-case whole words of a WordPiece vocabulary, in its order; no fragments, numbers or signs."""
    return [piece for piece in vocabulary if re.fullmatch(r"[a-z]{2,}", piece)]


def clean(name: str) -> str:
    """A label or search word as it would stand in a caption: lower case, blanks for underscores."""
    return " ".join(re.sub(r"[^a-z0-9' -]", " ", name.lower().replace("_", " ").replace("’", "'")).split())


def _weights(labels: Sequence[str], tags: Sequence[str], common: Sequence[str], near: Sequence[str]) -> dict[str, int]:
    # Zipf's law stands in for counts; what pictures show and what captions consist of is lifted above it.
    weights = {word: max(2, 60_000 // (rank + 400)) for rank, word in enumerate(common)}
    for rank, word in enumerate(near):
        weights[word] += 100 - 80 * rank // len(near)
    plurals = [plural(label.split()[-1]) for label in labels if label.replace(" ", "").isalpha()]
    for names, lift in ((labels, 150), (plurals, 120), (tags, 120)):
        for word in (word for name in names for word in re.findall(r"[a-z]+", name)):
            weights[word] = weights.get(word, 0) + lift
    for text in (
        *COLOURS,
        *STYLES,
        *COUNTS,
        *PLACES,
        *CORNERS,
        *SIZES,
        *LOOKS,
        "background",
        "style",
        "corner",
        "icon",
    ):
        for word in re.findall(r"[a-z]+", text):
            weights[word] = weights.get(word, 0) + 250
    return weights


def _phrase(draw: random.Random, templates: Sequence[str], w: str, v: str) -> str:
    text = draw.choice(templates).format(
        w=w,
        v=v,
        ws=plural(w),
        some=draw.choice(("one", "my", "this", "single")),
        colour=draw.choice(COLOURS),
        colour2=draw.choice(COLOURS),
        back=draw.choice(COLOURS),
        style=draw.choice(STYLES),
        count=draw.choice(COUNTS),
        place=draw.choice(PLACES),
        corner=draw.choice(CORNERS),
        size=draw.choice(SIZES),
        look=draw.choice(LOOKS),
    )
    return re.sub(r"\ba (?=[aeio]|umbrella)", "an ", text)
