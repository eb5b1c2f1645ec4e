"""The little English that captions need."""

from __future__ import annotations

import re

IRREGULAR = {"mouse": "mice", "fish": "fish", "leaf": "leaves", "snowman": "snowmen", "tomato": "tomatoes"}
#: What names say in the plural of one thing.
PLURAL_ONLY = frozenset({
    "grapes", "cherries", "glasses", "scissors", "arrows", "beans", "blueberries", "books", "briefs", "bubbles",
    "chains", "chopsticks", "clothes", "eyes", "fingers", "fireworks", "flags", "footprints", "fries", "gloves",
    "goggles", "hands", "hearts", "houses", "jeans", "lungs", "maracas", "mugs", "notes", "numbers", "pancakes",
    "peanuts", "phones", "shoes", "shorts", "socks", "sparkles", "stars", "sunglasses", "swords", "symbols",
    "tickets",
})  # fmt: skip


def plural(noun: str) -> str:
    """The noun, or noun phrase, in the plural; words that are plural already stay as they are."""
    head, space, last = noun.rpartition(" ")
    if last in PLURAL_ONLY:
        return noun
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif re.search(r"(s|x|z|ch|sh)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return head + space + last


def a(noun_phrase: str) -> str:
    """The phrase with its indefinite article, if it takes one."""
    head = re.split(r" (?:with|of|in|on|and) ", noun_phrase)[0]
    if head.split()[-1] in PLURAL_ONLY:
        return noun_phrase
    vowel = noun_phrase[0] in "aeio" or noun_phrase.startswith("umbrella")
    return ("an " if vowel else "a ") + noun_phrase


def plain_words(name: str) -> str:
    """A label or search word as it would stand in a caption: lower case, blanks for underscores."""
    return " ".join(re.sub(r"[^a-z0-9' -]", " ", name.lower().replace("_", " ").replace("’", "'")).split())
