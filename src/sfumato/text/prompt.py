r"""What a prompt says besides words: weights, breaks, changes along the way, and adapters. No tensors here.

The syntax is that of AUTOMATIC1111's web interface:

    (word)  (word:1.3)  [word]     weight 1.1, weight 1.3, weight 1 / 1.1; brackets in brackets multiply
    \(  \)  \[  \]  \\             the character itself
    BREAK                          the words after it begin a new chunk
    [cat:dog:0.5]                  cat for the first half of the steps, then dog; [cat:dog:8] for the first 8 steps
    [dog:0.5]  [cat::0.5]          dog comes in, cat goes out at half of the steps
    [cat|dog|fox]                  another one at each step, in turn
    <lora:name:0.8>                an adapter

Read in this order: `extract_loras`, `schedule`, and `parse` for each text that the schedule gives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

RULES = ("a1111", "comfy", "none")
BRACKET = 1.1  # the weight of a pair of round brackets; square ones divide by it

_TAG = re.compile(r"<(?:lora|lyco):([^<>]*)>")
# An escape, a lone backslash, a bracket, a weight with the bracket that ends it, plain text, a colon.
_ATTENTION = re.compile(r"\\[()\[\]\\]|\\|[(\[]|:\s*([+-]?[.\d]+)\s*\)|[)\]]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\bBREAK\b")
_STRUCTURE = re.compile(r"\\.|[^\\\[\]():|]+|[\[\]():|]|\\", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


def check_rule(rule: str) -> None:
    """ValueError unless `rule` is one of RULES."""
    if rule not in RULES:
        raise ValueError(f"unknown weighting rule {rule!r}; known: {', '.join(RULES)}")


class LoraTag(NamedTuple):
    """An adapter that a prompt asks for: its name and its weights in the denoiser and in the text encoder."""

    name: str
    unet: float
    text: float


def extract_loras(text: str) -> tuple[str, tuple[LoraTag, ...]]:
    """The prompt without its adapter tags, and the tags in order.

    <lora:name>, <lora:name:0.8>, <lora:name:0.8:0.5> (0.8 in the text encoder, 0.5 in the denoiser, the order of the
    web interface that the tag comes from), <lora:name:te=0.8:unet=0.5>; `lyco` means the same as `lora`.
    Raises ValueError for a tag without a name, or with a weight that is no finite number.
    """
    tags = tuple(_tag(found[0], found[1]) for found in _TAG.finditer(text))
    return _TAG.sub("", text), tags


def _tag(whole: str, inside: str) -> LoraTag:
    name, *fields = (entry.strip() for entry in inside.split(":"))
    weights: dict[str, float] = {}
    for place, entry in enumerate(fields):
        key, equals, number = entry.rpartition("=")
        role = key.strip() if equals else ("te", "unet", "")[min(place, 2)]
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if role not in ("te", "unet") or not math.isfinite(weight):
            raise ValueError(
                f"{whole}: {entry!r} is not a weight; write <lora:name:0.8> or <lora:name:te=0.8:unet=0.5>"
            )
        weights[role] = weight
    if not name:
        raise ValueError(f"{whole} names no adapter; write <lora:name:0.8>")
    in_text = weights.get("te", 1.0)
    return LoraTag(name, weights.get("unet", in_text), in_text)


@dataclass(frozen=True)
class Piece:
    """Words of one weight."""

    text: str
    weight: float = 1.0


def parse(text: str) -> tuple[tuple[Piece, ...], ...]:
    r"""The weighted pieces of a prompt, a tuple for each section between BREAKs (one, perhaps empty, without any).

    A bracket that is never closed holds up to the end; one that closes nothing is a character. Round and square
    brackets are matched apart from each other: in `(a [b) c]` the pairs overlap. A backslash that escapes nothing
    disappears. Neighbours of equal weight are one piece, so that `(un)(even)` is one word.
    Raises ValueError for a weight that is not a number, as in `(word:1.2.3)`, or out of a float's range.
    """
    tokens = list(_ATTENTION.finditer(text))
    factors, closing = _match(tokens)
    sections: list[list[Piece]] = [[]]
    rounds, squares = [1.0], [1.0]  # running products of the open brackets of each kind
    for i, token in enumerate(tokens):
        found = token[0]
        if i in factors:
            stack = rounds if found == "(" else squares
            stack.append(stack[-1] * factors[i])
        elif i in closing:
            (squares if found == "]" else rounds).pop()
        elif found[0] == "\\":
            _add(sections[-1], found[1:], rounds[-1] * squares[-1])
        else:
            parts = _BREAK.split(found)
            for k, part in enumerate(parts):
                if k > 0:
                    part = part.lstrip()
                    sections.append([])
                if k < len(parts) - 1:
                    part = part.rstrip()
                _add(sections[-1], part, rounds[-1] * squares[-1])
    return tuple(tuple(section) for section in sections)


def _match(tokens: list[re.Match[str]]) -> tuple[dict[int, float], set[int]]:
    """The factor of each opening bracket by its place among the tokens, and the places that close one."""
    factors: dict[int, float] = {}
    closing: set[int] = set()
    rounds: list[int] = []
    squares: list[int] = []
    for i, token in enumerate(tokens):
        found, number = token[0], token[1]
        if found == "(":
            factors[i] = BRACKET
            rounds.append(i)
        elif found == "[":
            factors[i] = 1 / BRACKET
            squares.append(i)
        elif found == "]" and squares:
            squares.pop()
            closing.add(i)
        elif (found == ")" or number is not None) and rounds:
            opened = rounds.pop()
            closing.add(i)
            if number is not None:
                factors[opened] = _weight(number)
    return factors, closing


def _weight(number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise ValueError(
            rf"the weight {number!r} is not a number; write (word:1.2), or \( and \) for brackets that mean themselves"
        ) from None


def _add(section: list[Piece], text: str, weight: float) -> None:
    """Append to a section, or to its last piece where the weights are equal but for rounding."""
    if not text:
        return
    if not math.isfinite(weight):
        raise ValueError(f"the weight of {text[:40]!r} is {weight}; use smaller weights and fewer brackets")
    if section and math.isclose(section[-1].weight, weight, rel_tol=1e-12):
        text, weight = section[-1].text + text, section[-1].weight
        section.pop()
    section.append(Piece(text, weight))


@dataclass(frozen=True)
class _Switch:
    """Texts of which one counts at a step: in turn, or the first up to the step `until` and then the second."""

    options: list[_Node]
    until: int | None = None

    def at(self, step: int) -> _Node:
        if self.until is None:
            return self.options[(step - 1) % len(self.options)]
        return self.options[0 if step <= self.until else 1]


_Node = str | _Switch | list["_Node"]


@dataclass
class _Frame:
    """A bracket that is open: what it holds so far, cut at colons and bars, which `marks` lists.

    sound: False once something in it is only text, and the bracket can be nothing else then.
    """

    opening: str
    parts: list[list[_Node]] = field(default_factory=lambda: [[]])
    marks: list[str] = field(default_factory=list)
    sound: bool = True

    def literal(self) -> Iterator[_Node]:
        """The bracket as text; what changes inside still does."""
        yield self.opening
        for mark, part in zip(["", *self.marks], self.parts, strict=True):
            yield mark
            yield part


def schedule(text: str, steps: int) -> list[tuple[int, str]]:
    """The texts that a prompt with changes stands for: (last step, text) in order, steps counted from 1 to `steps`.

    A number with a point is a share of the steps, one without counts them; both are cut down to a whole step, and to
    the last one. Weights and escapes stay in the texts as they are. What is no change, such as `[a:b:c:0.5]` or a
    bracket that is not closed, is text. A bar outside of `[a|b]` is text, too. A text may follow itself.
    Raises ValueError when steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps}; a prompt is scheduled over 1 step or more")
    ends = {steps}
    stack = [_Frame("")]
    for token in _STRUCTURE.finditer(text):
        found = token[0]
        frame = stack[-1]
        if found in "([":
            stack.append(_Frame(found))
        elif found in ")]":
            if frame.opening + found not in ("()", "[]"):
                _give_up(stack)
                stack[0].parts[-1].append(found)
                continue
            stack.pop()
            node, sound = _close(frame, steps, ends)
            stack[-1].parts[-1].append(node)
            stack[-1].sound &= sound
        elif found in ":|" and len(stack) > 1:
            frame.marks.append(found)
            frame.parts.append([])
        else:
            frame.parts[-1].append(found)
    _give_up(stack)
    (tree,) = stack[0].parts
    return [(end, _render(tree, end)) for end in sorted(ends)]


def _give_up(stack: list[_Frame]) -> None:
    """Make all open brackets text: nothing may reach across one that does not match."""
    for frame in stack[1:]:
        stack[0].parts[-1].extend(frame.literal())
    del stack[1:]


def _close(frame: _Frame, steps: int, ends: set[int]) -> tuple[_Node, bool]:
    """What a bracket that has been closed means, and whether it may stand inside another; adds to `ends`."""
    number = "".join(n for n in frame.parts[-1] if isinstance(n, str)).strip()
    timed = _NUMBER.fullmatch(number) and frame.marks[-1:] == [":"] and frame.marks.count(":") <= 2
    square = frame.opening == "["
    if frame.sound and square and timed and all(isinstance(n, str) for n in frame.parts[-1]):
        before, after = _halves(frame)
        share = float(number) * steps if "." in number else float(number)
        until = int(max(0, min(steps, share)))
        ends.update([until] if until else [])
        return _Switch([before, after], until), True
    if frame.sound and square and frame.marks and ":" not in frame.marks:
        ends.update(range(1, steps + 1))
        return _Switch([part for part in frame.parts]), True
    sound = frame.sound and frame.marks.count(":") <= (0 if square else 1)
    return [*frame.literal(), ")" if frame.opening == "(" else "]"], sound


def _halves(frame: _Frame) -> tuple[list[_Node], list[_Node]]:
    """What stands before and after the change in [before:after:when]; bars are text there."""
    halves: list[list[_Node]] = [[]]
    for mark, part in zip(["", *frame.marks[:-1]], frame.parts[:-1], strict=True):
        if mark == ":":
            halves.append([])
        else:
            halves[-1].append(mark)
        halves[-1].append(part)
    return (halves[0], halves[1]) if len(halves) == 2 else ([], halves[0])


def _render(tree: list[_Node], step: int) -> str:
    """The text at a step."""
    words: list[str] = []
    rest: list[_Node] = [tree]  # a stack of our own: brackets may be nested deeper than Python's calls
    while rest:
        node = rest.pop()
        if isinstance(node, str):
            words.append(node)
        elif isinstance(node, _Switch):
            rest.append(node.at(step))
        else:
            rest.extend(reversed(node))
    return "".join(words)
