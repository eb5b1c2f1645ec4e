"""Prompt matrices: one prompt with optional parts, as all the prompts that some of the parts make."""

from __future__ import annotations

from itertools import product

MOST_PARTS = 8


def prompts_of(prompt: str) -> list[str]:
    """ "a cat|red|in snow" as "a cat", "a cat, red", "a cat, in snow", "a cat, red, in snow".

    The first part is always there; the order is that of A1111: the first optional part changes fastest.
    Bars inside brackets belong to the prompt's own syntax, `[a|b]`. Raises ValueError for more than 8 optional parts.
    """
    first, *parts = _split(prompt)
    if len(parts) > MOST_PARTS:
        raise ValueError(
            f"the prompt matrix has {len(parts)} optional parts, which makes {2 ** len(parts)} prompts; "
            f"give at most {MOST_PARTS}"
        )
    chosen = product((False, True), repeat=len(parts))
    rows = [[part for part, wanted in zip(parts, reversed(row), strict=True) if wanted] for row in chosen]
    return [", ".join([first, *row]) for row in rows]


def columns_of(prompt: str) -> int:
    """How many of its pictures a grid of the matrix puts in a row: half of the parts go along, half down."""
    return 2 ** -(-(len(_split(prompt)) - 1) // 2)


def _split(prompt: str) -> list[str]:
    """The parts between bars that stand outside of square brackets, without blanks around them."""
    parts, depth = [""], 0
    for i, letter in enumerate(prompt):
        escaped = i > 0 and prompt[i - 1] == "\\"
        if letter in "[]" and not escaped:
            depth = max(depth + (1 if letter == "[" else -1), 0)
        if letter == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    parts = [part.strip() for part in parts]
    return [parts[0], *(part for part in parts[1:] if part)]
