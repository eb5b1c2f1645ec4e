"""The prompt's syntax, held to the examples that its original documents."""

from __future__ import annotations

import math
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.text.prompt import LoraTag, Piece, check_rule, extract_loras, parse, schedule

# The documented examples of the web interface's parser.
WEIGHTED = [
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [
            *[("a ", 1.0), ("house", 1.3 * 1.1 * 1.1), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55)],
            *[(", sun, ", 1.1), ("sky", 1.1**4), (".", 1.1)],
        ],
    ),
]
SCHEDULED = [
    ("test", {10: "test"}),
    ("a [b:3]", {3: "a ", 10: "a b"}),
    ("a [b: 3]", {3: "a ", 10: "a b"}),
    ("a [[[b]]:2]", {2: "a ", 10: "a [[b]]"}),
    ("[(a:2):3]", {3: "", 10: "(a:2)"}),
    ("a [b : c : 1] d", {1: "a b  d", 10: "a  c  d"}),
    ("a[b:[c:d:2]:1]e", {1: "abe", 2: "ace", 10: "ade"}),
    ("a [unbalanced", {10: "a [unbalanced"}),
    ("a [b:.5] c", {5: "a  c", 10: "a b c"}),
    ("a [{b|d{:.5] c", {5: "a  c", 10: "a {b|d{ c"}),
    ("((a][:b:c [d:3]", {3: "((a][:b:c ", 10: "((a][:b:c d"}),
    ("[a|(b:1.1)]", {i: "a" if i % 2 else "(b:1.1)" for i in range(1, 11)}),
    ("[fe|]male", {i: "female" if i % 2 else "male" for i in range(1, 11)}),
    ("[fe|||]male", {i: "female" if i % 4 == 1 else "male" for i in range(1, 11)}),
]
LANDSCAPE = (
    "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6]"
    "[: in background:0.25] [shoddy:masterful:0.5]"
)
SYNTAX = st.text(st.sampled_from(r"ab ,():[]|\.12-+<>BREAK"), max_size=40) | st.text(max_size=40)


def pieces(text: str) -> list[tuple[str, float]]:
    """The pieces of a prompt of one section."""
    (section,) = parse(text)
    return [(piece.text, piece.weight) for piece in section]


@pytest.mark.parametrize("text, expected", WEIGHTED, ids=[text for text, _ in WEIGHTED])
def test_weights_as_documented(text: str, expected: list[tuple[str, float]]) -> None:
    found = pieces(text)
    assert [word for word, _ in found] == [word for word, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], rel=1e-12)


def test_more_weights() -> None:
    assert pieces("[a] ((b:2):3)") == [("a", 1 / 1.1), (" ", 1.0), ("b", 6.0)]
    assert pieces("(a: +1.5 )(b:-1)") == [("a", 1.5), ("b", -1.0)]
    assert pieces("[unclosed") == [("unclosed", 1 / 1.1)]
    assert pieces("a) b] c:1.3) d: e") == [("a) b] c:1.3) d: e", 1.0)]
    # Round and square brackets are matched apart: b stands in both.
    assert pieces("(a [b) c]") == [("a ", 1.1), ("b", 1.1 / 1.1), (" c", 1 / 1.1)]
    assert pieces(r"\[\\\] \( \x") == [(r"[\] ( x", 1.0)]
    assert parse("") == ((),)


def test_break_begins_a_section() -> None:
    assert parse("a BREAK b") == ((Piece("a"),), (Piece("b"),))
    assert parse("BREAK a\n BREAK  BREAKS break BREAK") == ((), (Piece("a"),), (Piece("BREAKS break"),), ())
    assert parse("(a BREAK b:2), c") == ((Piece("a", 2.0),), (Piece("b", 2.0), Piece(", c")))


def test_weights_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight '1\.2\.3' is not a number; write \(word:1\.2\)"):
        parse("a (word:1.2.3)")
    with pytest.raises(ValueError, match="weight of 'deep' is inf"):
        parse("(" * 8000 + "deep")
    with pytest.raises(ValueError, match="weight of 'x' is inf"):
        parse(f"(x:{'9' * 400})")


@given(st.lists(st.tuples(st.text(min_size=1, max_size=12), st.integers(1, 99)), max_size=6))
def test_what_is_escaped_comes_back(wanted: list[tuple[str, int]]) -> None:
    wanted = [(word, n) for word, n in wanted if "BREAK" not in word]
    escaped = [(re.sub(r"([][()\\])", r"\\\1", word), n / 10) for word, n in wanted]
    text = "".join(f"({word}:{weight})" for word, weight in escaped)
    expected: list[tuple[str, float]] = []
    for word, n in wanted:  # neighbours of one weight are one piece
        joined = expected.pop()[0] if expected and expected[-1][1] == n / 10 else ""
        expected.append((joined + word, n / 10))
    assert pieces(text) == expected


@settings(max_examples=300)
@given(SYNTAX)
def test_any_text_is_read(text: str) -> None:
    try:
        sections = parse(text)
    except ValueError as error:
        assert re.search(r"the weight .* is not a number|the weight of .* is inf", str(error))
        return
    assert all(piece.text and math.isfinite(piece.weight) for section in sections for piece in section)
    words = "".join(piece.text for section in sections for piece in section)
    assert len(words) <= len(text)
    if not re.search(r"[][()\\]|BREAK", text):
        assert sections == ((Piece(text),) if text else (),)


@pytest.mark.parametrize("text, expected", SCHEDULED, ids=[text for text, _ in SCHEDULED])
def test_schedules_as_documented(text: str, expected: dict[int, str]) -> None:
    assert schedule(text, 10) == list(expected.items())


def test_the_landscape() -> None:
    """The long example of the web interface's documentation, over 100 steps."""
    begin = "fantasy landscape with a"
    assert schedule(LANDSCAPE, 100) == [
        (25, f"{begin} mountain and an oak in foreground shoddy"),
        (50, f"{begin} lake and an oak in foreground in background shoddy"),
        (60, f"{begin} lake and an oak in foreground in background masterful"),
        (75, f"{begin} lake and an oak in background masterful"),
        (100, f"{begin} lake and a christmas tree in background masterful"),
    ]


def test_more_schedules() -> None:
    assert schedule("[a:b:1.0] [c:d:1]", 4) == [(1, "a c"), (4, "a d")]  # all steps, and one step
    assert schedule("[a:b:9][c::0][d:e:-2]", 4) == [(4, "ae")]
    assert schedule("[a:b:1e999]", 4) == [(4, "a")]
    assert schedule("[a:b:0.99]", 3) == [(2, "a"), (3, "b")]  # 2.97 steps are two whole ones
    assert schedule("[[a|b]:c:2]", 4) == [(1, "a"), (2, "b"), (3, "c"), (4, "c")]
    assert schedule("[a|[b:c:2]]", 4) == [(1, "a"), (2, "b"), (3, "a"), (4, "c")]
    for text in (
        r"\[a:b:2\]",
        "[a:b:c:2]",
        "[a:b]",
        "(a:b:2)",
        "[a:b:]",
        "a | b",
        "[a:b:2)",
        "[a|b:c]",
        "[a [b:c] d:e:2]",
    ):
        assert schedule(text, 4) == [(4, text)], text
    assert schedule("(a|b) [c:2", 4) == [(4, "(a|b) [c:2")]
    with pytest.raises(ValueError, match="steps = 0"):
        schedule("a", 0)


@settings(max_examples=300)
@given(SYNTAX, st.integers(1, 12))
def test_schedules_cover_all_steps(text: str, steps: int) -> None:
    rows = schedule(text, steps)
    ends = [end for end, _ in rows]
    assert ends == sorted(set(ends))
    assert ends[0] >= 1 and ends[-1] == steps
    if "[" not in text:
        assert rows == [(steps, text)]


@pytest.mark.parametrize("text", ["(" * 9000, "[" * 9000 + "]" * 9000, "[a:" * 9000 + ":2]" * 9000, ":" * 20000])
def test_deep_and_long_prompts_are_quick(text: str) -> None:
    """No recursion, and no time that grows with the square of the length."""
    began = time.process_time()
    schedule(text, 4)
    parse("(a:1)" * 4000 + text)
    extract_loras("<lora:" * 20000 + text)
    parse("x " + " " * 20000 + "y")
    assert time.process_time() - began < 2


def test_adapters_are_taken_out() -> None:
    text, tags = extract_loras(
        "a <lora:paint er:0.8>cat<lyco:b>, <lora:c:0.8:0.5> <lora:d:te=0.3:unet=-1> <lora:e:unet=0>"
    )
    assert text == "a cat,   "
    assert tags == (
        LoraTag("paint er", 0.8, 0.8),
        LoraTag("b", 1.0, 1.0),
        LoraTag("c", unet=0.5, text=0.8),
        LoraTag("d", unet=-1.0, text=0.3),
        LoraTag("e", unet=0.0, text=1.0),
    )
    assert extract_loras("a <b> <lora> 1 < 2") == ("a <b> <lora> 1 < 2", ())


@pytest.mark.parametrize(
    "tag, complaint",
    [
        ("<lora:a:1,5>", "'1,5' is not a weight; write <lora:name:0.8>"),
        ("<lora:a:>", "'' is not a weight"),
        ("<lora:a:nan>", "'nan' is not a weight"),
        ("<lora:a:1:1:1>", "'1' is not a weight"),
        ("<lora:a:dyn=4>", "'dyn=4' is not a weight"),
        ("<lora::1>", "names no adapter"),
    ],
)
def test_broken_tags_are_refused(tag: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        extract_loras(f"a {tag} b")
    assert str(caught.value).startswith(tag)


def test_rules_are_known_by_name() -> None:
    check_rule("comfy")
    with pytest.raises(ValueError, match="unknown weighting rule 'compel'; known: a1111, comfy, none"):
        check_rule("compel")
