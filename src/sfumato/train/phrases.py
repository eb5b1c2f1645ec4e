"""The texts that the text tower is taught on: words alone, and words in phrases that read like captions.

Words come from the emoji list (labels and search words) and from the whole words of the teacher's own
vocabulary, which is sorted by how common a word is. So words that no caption contains (puppy, bike) are met
as often as their concepts. Names in other languages and misspelt names mean what the English name means.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sfumato.data.icons import plain_code, read_emoji
from sfumato.data.words import plain_words, plural

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
LETTERS = "abcdefghijklmnopqrstuvwxyz"
OTHER_SIGNS = ("flag: ", "regional indicator")  # emoji that are no things
#: Words that carry no picture of their own; their states are left free.
EMPTY_WORDS = frozenset(
    ("a", "an", "the", "of", "on", "in", "and", "with", "to", "some", "at", "by", "for", "'s")
)  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """The texts and the words for the vocabulary.

    texts: every distinct text that is taught.
    words: (word, weight) for training the byte-pair vocabulary, a heavier word is merged earlier.
    meant: English for the texts and words that are not, or are misspelt.
    """

    texts: tuple[str, ...]
    words: tuple[tuple[str, int], ...]
    meant: Mapping[str, str] = field(default_factory=dict)


def build_corpus(
    labels: Sequence[str],
    tags: Sequence[str],
    common: Sequence[str],
    near: Sequence[str],
    phrases_per_name: int,
    phrases_per_word: int,
    pairs: int,
    seed: int,
    foreign: Mapping[str, str] | None = None,
    typos_per_name: int = 0,
) -> Corpus:
    """Join words and phrases into a corpus.

    labels, tags: emoji labels and search words, together the names; may hold several words.
    common: the teacher's whole words, the most common first.
    near:   those of them that lie near an emoji label in the teacher's space, the nearest first.
    phrases_per_name, phrases_per_word: phrases of one noun for each name, and for each near word.
    pairs:  phrases of two nouns; one noun is a name, the other a name or a near word.
    foreign: name in another language -> label; each is taught alone and in as many phrases as a name.
    typos_per_name: misspellings of each label, each alone and in a phrase.
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
    words = _weights(labels, tags, common, near)
    meant = _misspelt(random.Random(seed + 1), labels, typos_per_name, {*texts, *words})
    for name, label in (foreign or {}).items():
        meant[name] = label
        words[name] = words.get(name, 0) + 120
        for _ in range(phrases_per_name):
            phrase = _phrase(draw, SINGLE, "{w}", "{w}")
            meant[phrase.format(w=name)] = phrase.format(w=label)
    return Corpus(tuple(dict.fromkeys([*texts, *meant])), tuple(words.items()), meant)


def misspell(word: str, draw: random.Random) -> str:
    """A word of four letters or more with two letters swapped, one left out, doubled, or one wrong; the first stays."""
    i = draw.randrange(1, len(word) - 1)
    kind = draw.randrange(4)
    if kind == 0:
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    if kind == 1:
        return word[:i] + word[i + 1 :]
    return word[: i + 1] + word[i] + word[i + 1 :] if kind == 2 else word[:i] + draw.choice(LETTERS) + word[i + 1 :]


def _misspelt(draw: random.Random, labels: Sequence[str], count: int, right: set[str]) -> dict[str, str]:
    """Misspelt words, labels and phrases with them -> what they mean; none that is right for something else."""
    meant: dict[str, str] = {}
    for label in labels:
        long = [word for word in label.split() if len(word) > 3 and word.isalpha()]
        for _ in range(count if long else 0):
            word = draw.choice(long)
            wrong = misspell(word, draw)
            if wrong in right or meant.get(wrong, word) != word:
                continue
            phrase = _phrase(draw, SINGLE, "{w}", "{w}")
            name = " ".join(wrong if part == word else part for part in label.split())
            meant |= {wrong: word, name: label, phrase.format(w=name): phrase.format(w=label)}
    return meant


def foreign_names(packages: Path, languages: Iterable[str]) -> dict[str, str]:
    """Emoji names in other languages -> English label, of the npm package emojibase-data; of two alike the first."""
    english = {
        code: plain_words(e.label) for code, e in read_emoji(packages).items() if not e.label.startswith(OTHER_SIGNS)
    }
    found: dict[str, str] = {}
    for language in languages:
        file = packages / "emojibase-data" / language / "data.json"
        if not file.is_file():
            raise ValueError(f"no emoji names in {language!r}; emojibase-data has a folder for each language it knows")
        for entry in json.loads(file.read_text(encoding="utf-8")):
            label = english.get(plain_code(entry["hexcode"]))
            name = entry["label"].lower()
            if label and name.isalnum() and not name.isascii():
                found.setdefault(name, label)
    return found


def emoji_names(packages: Path) -> tuple[list[str], list[str]]:
    """Emoji labels, and their search words, of the npm packages in `packages`; no flags and letters."""
    kept = [e for e in read_emoji(packages).values() if not e.label.startswith(OTHER_SIGNS)]
    labels = dict.fromkeys(plain_words(e.label) for e in kept)
    tags = dict.fromkeys(plain_words(tag) for e in kept for tag in e.tags)
    return [label for label in labels if label], [tag for tag in tags if tag and tag not in labels]


def whole_words(vocabulary: Iterable[str]) -> list[str]:
    """The lower-case whole words of a WordPiece vocabulary, in its order; no fragments, numbers or signs."""
    return [piece for piece in vocabulary if re.fullmatch(r"[a-z]{2,}", piece)]


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
