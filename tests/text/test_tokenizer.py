"""The tokenizer against transformers' CLIPTokenizer, on a vocabulary that is trained here."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from sfumato.text.tokenizer import END, START, ClipTokenizer, SpecialTokens, train_vocabulary

WORDS = (
    "a", "an", "the", "red", "green", "blue", "apple", "banana", "puppy", "bicycle", "left", "right",
    "of", "above", "below", "on", "background", "style", "two", "three", "café", "naïve", "straße",
    "don't", "it's", "we'll", "they've", "i'm", "he'd", "you're", "rock'n'roll", "3d", "ice-cream",
    "e-mail"
)  # fmt: skip
AWKWARD = [
    "",
    " ",
    "\t\n",
    "a\tred\r\n\napple  ",
    "A Red APPLE",
    "don't I'll we've 'S ''s '",
    "É Å e\u0301 a\u030a ﬁ ½ ² Ⅷ",
    "Straße İstanbul ΣΊΣΥΦΟΣ ǅ",
    "日本語 テキスト 한국어 العربية हिन्दी",
    "😀 👩‍👩‍👧 🏳️‍🌈 ❤️ 1️⃣ 🇯🇵",
    "3.14% of $2026,- (1/2) #1 @home",
    "!!! hello! ?! ... --- *** ((a:1.2))",
    "\u200b zero \u00a0width \ufeff bom \u2028 line",
    f"{END} in the {START} middle <|ENDOFTEXT|> <|startOfText|>",
    "</w> Ġ Ċ ä </w>",
    "x" * 400,
    "red apple " * 60,
    "😀" * 90,
    "\x00\x01 control \x7f",
    "\U0001f9ff\U000e0067 tags",
]


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=6)) for _ in range(400)] + ["a red puppy, an apple and banana"] * 400
    return train_vocabulary(texts, 600, max_length=24)


def probes() -> list[str]:
    draw = random.Random(1)
    signs = "abcXYZ 019 .,!?'’\"-_/\\()<>|~ éßñøÅ ωЖя中あ한😀🎈\u0301\u200d\t"
    random_texts = ["".join(draw.choices(signs, k=draw.randrange(60))) for _ in range(300)]
    return [
        *AWKWARD,
        *random_texts,
        *(" ".join(draw.choices(WORDS, k=draw.randrange(30))) for _ in range(100)),
    ]


@pytest.mark.parametrize("pad", [END, "!"])
@pytest.mark.parametrize("normalized", [False, True])
def test_parity_with_transformers(tokenizer: ClipTokenizer, tmp_path: Path, pad: str, normalized: bool) -> None:
    special = SpecialTokens(pad=pad, normalized=normalized)
    ours = ClipTokenizer(tokenizer.vocabulary, tokenizer.merges, 24, special)
    ours.save(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    assert (theirs.model_max_length, theirs.pad_token) == (24, pad)
    texts = probes()
    expected = theirs(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    for loaded in (ours, ClipTokenizer.from_folder(tmp_path)):
        ids = loaded(texts)
        different = [texts[i] for i in (ids != expected).any(1).nonzero().flatten().tolist()]
        print(f"{len(texts)} texts, {len(different)} differ")
        assert not different


def test_reads_what_transformers_saves(tokenizer: ClipTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "ours")
    CLIPTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = ClipTokenizer.from_folder(tmp_path / "theirs")
    assert torch.equal(again(probes()), tokenizer(probes()))
    assert again.max_length == 24


def test_reads_the_files_of_stable_diffusion_1(tokenizer: ClipTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    entry = {"__type": "AddedToken", "content": START, "lstrip": False, "normalized": True, "rstrip": False}
    config = {"bos_token": entry, "eos_token": {**entry, "content": END}, "pad_token": END, "unk_token": END}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 77}))
    (tmp_path / "special_tokens_map.json").unlink()
    read = ClipTokenizer.from_folder(tmp_path)
    assert read(["a red apple"]).shape == (1, 77)
    assert read.special == SpecialTokens(normalized=True)


def test_the_same_texts_give_the_same_vocabulary() -> None:
    texts = ["a dog", "the cat", "pony", "many cats", "dogs", "ab", "ba", "cd", "dc"] * 2
    first, *others = (train_vocabulary(texts, 540) for _ in range(8))
    assert all((t.vocabulary, t.merges) == (first.vocabulary, first.merges) for t in others)


def test_layout_and_roles(tokenizer: ClipTokenizer) -> None:
    assert len(tokenizer) == len(tokenizer.vocabulary) == 600
    assert (tokenizer.bos_id, tokenizer.eos_id) == (598, 599)
    assert tokenizer.vocabulary["!"] == 0
    assert tokenizer.vocabulary["!</w>"] == 256
    ids = tokenizer(["a red puppy"])
    assert ids.tolist() == [[598, *(tokenizer.vocabulary[w + "</w>"] for w in ("a", "red", "puppy")), *[599] * 20]]
    assert tokenizer.decode(ids[0]) == "a red puppy"


def test_every_byte_can_be_spelled(tokenizer: ClipTokenizer) -> None:
    texts = [chr(i) for i in range(1, 0x3000)]
    inner = [encoding.ids for encoding in tokenizer.pieces(texts)]
    assert not any(tokenizer.eos_id in ids for ids in inner)


def test_reports_what_was_cut(tokenizer: ClipTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    text = "red " * 21 + "Apple  and 😀 banana"
    tokens = tokenizer.tokenize(["short", text])
    assert tokens.ids.shape == (2, 24)
    assert tokens.cut == ("", "and 😀 banana")
    kept = text[: len(text) - len(tokens.cut[1])]
    assert torch.equal(tokenizer([kept])[0], tokens.ids[1])
    with caplog.at_level(logging.WARNING):
        tokenizer([text])
    assert tokens.cut[1] in caplog.text


def test_added_tokens_survive_a_round_trip(tokenizer: ClipTokenizer, tmp_path: Path) -> None:
    more = ClipTokenizer(tokenizer.vocabulary, tokenizer.merges, 24, added=("<sks>", "<toy>"))
    more.save(tmp_path)
    again = ClipTokenizer.from_folder(tmp_path)
    assert again.added == ("<sks>", "<toy>")
    assert again(["a <toy>"])[0, :4].tolist() == [598, tokenizer.vocabulary["a</w>"], 601, 599]


def test_errors_say_what_to_do(tokenizer: ClipTokenizer, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="list of strings"):
        tokenizer.tokenize("a red apple")
    with pytest.raises(FileNotFoundError, match=r"neither vocab\.json"):
        ClipTokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match="514"):
        train_vocabulary(["a"], 500)
    with pytest.raises(ValueError, match="not in the vocabulary"):
        ClipTokenizer({"a</w>": 0}, [])


def test_nothing_in_nothing_out(tokenizer: ClipTokenizer) -> None:
    assert tokenizer([]).shape == (0, 24)


def spelled(tokenizer: ClipTokenizer, text: str) -> list[int]:
    """The ids of `text` alone, without start, end and padding."""
    return list(tokenizer.pieces([text])[0].ids)


def test_a_trigger_stands_for_its_ids_as_a_whole_word(tokenizer: ClipTokenizer) -> None:
    with_triggers = tokenizer.expanded({"<Toy>": [700], "red": [701, 702], "Red  apple": [703], "naïve": [704]})
    a, apple, red = (spelled(tokenizer, word) for word in ("a", "apple", "red"))
    comma, mark = spelled(tokenizer, ","), spelled(tokenizer, "(")
    for text, expected in {
        "a <toy>": [*a, 700],
        "a<TOY>a": [*a, 700, *a],
        "<toy>, a": [700, *comma, *a],
        "RED": [701, 702],
        "(red, a": [*mark, 701, 702, *comma, *a],
        "a red\n apple": [*a, 703],
        "Red apple red": [703, 701, 702],
        "naïve": [704],
        "nai\u0308ve": [704],
        "reds": spelled(tokenizer, "reds"),
        "bored": spelled(tokenizer, "bored"),
        "red2": spelled(tokenizer, "red2"),
        "<toy": spelled(tokenizer, "<toy"),
        "a apple": [*a, *apple],
        "": [],
    }.items():
        assert spelled(with_triggers, text) == expected, text
    assert spelled(tokenizer, "a red <toy>") == [*a, *red, *spelled(tokenizer, "<toy>")]


def test_the_pieces_of_a_text_with_triggers(tokenizer: ClipTokenizer) -> None:
    text = "  A puppy, cute Red apple  "
    ours = tokenizer.expanded({"cute": [700, 701]})
    (found,), (plain,) = ours.pieces([text]), tokenizer.pieces([text.replace("cute", "blue")])
    at = plain.tokens.index("blue</w>")
    assert (found.ids[:at], found.ids[at + 2 :]) == (plain.ids[:at], plain.ids[at + 1 :])
    assert found.tokens[at : at + 2] == ["cute", "cute"]
    assert found.offsets == [*plain.offsets[:at], (11, 15), (11, 15), *plain.offsets[at + 1 :]]
    assert found.word_ids == [*plain.word_ids[: at + 1], *plain.word_ids[at:]]
    for (start, end), token in zip(found.offsets, found.tokens, strict=True):
        assert text[start:end].lower().strip() == token.removesuffix("</w>"), token


def test_texts_without_triggers_are_read_as_ever(tokenizer: ClipTokenizer) -> None:
    ours = tokenizer.expanded({"<sks>": [700], "unheard": [701, 702]})
    for text, found, expected in zip(probes(), ours.pieces(probes()), tokenizer.pieces(probes()), strict=True):
        assert (found.ids, found.offsets) == (expected.ids, expected.offsets), text
    assert torch.equal(ours(probes()), tokenizer(probes()))
    assert len(ours) == len(tokenizer)


def test_expanding_makes_a_new_tokenizer(tokenizer: ClipTokenizer, tmp_path: Path) -> None:
    ours = tokenizer.expanded({"cute": [700, 701]})
    assert (tokenizer.expansions, ours.expansions) == ({}, {"cute": (700, 701)})
    assert ours.expanded({"other": [702]}).expansions == {"other": (702,)}
    assert ours.expanded({})(["cute"]).tolist() == tokenizer(["cute"]).tolist()
    assert ours.decode(ours(["a cute, red puppy"])[0]) == "a cute , red puppy"
    with pytest.raises(ValueError, match="first remove the embeddings cute"):
        ours.save(tmp_path)
    for wrong in ({"": [1]}, {" ": [1]}, {"word": []}):
        with pytest.raises(ValueError, match="give a word and one id or more"):
            tokenizer.expanded(wrong)
    with pytest.raises(ValueError, match="given twice"):
        tokenizer.expanded({"Cat": [1], "cat ": [2]})


def test_a_trigger_at_the_end_of_the_room_is_reported(tokenizer: ClipTokenizer) -> None:
    ours = tokenizer.expanded({"cute": [700, 701, 702]})
    tokens = ours.tokenize(["red " * 20 + "cute apple"])
    assert tokens.ids[0, 21:].tolist() == [700, 701, tokenizer.eos_id]
    assert tokens.cut == ("cute apple",)


def test_a_call_in_transformers_form_gives_what_transformers_gives(tokenizer: ClipTokenizer, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer.save(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    long = "a red apple " * tokenizer.max_length
    both: list[str | list[str]] = ["a red apple", ["a red apple", "two green frogs on it"], [long, ""]]
    forms = [
        {"padding": "max_length", "max_length": tokenizer.max_length, "truncation": True, "return_tensors": "pt"},
        {"padding": "max_length", "max_length": 9, "truncation": True, "return_tensors": "pt"},
        {"padding": "longest", "return_tensors": "pt"},
        {"padding": True, "truncation": True},
        {"truncation": True},
    ]
    for texts in both:
        for form in forms:
            ours, wanted = tokenizer(texts, **form), theirs(texts, **form)
            for name in ours.keys():  # noqa: SIM118
                assert (
                    torch.equal(torch.as_tensor(ours[name]), wanted[name])
                    if "return_tensors" in form
                    else (ours[name] == wanted[name])
                ), (texts, form)
    assert tokenizer("a red apple").input_ids == theirs("a red apple").input_ids
    assert {**tokenizer("a red apple", return_tensors="pt").to("cpu")}.keys() == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="padding='max_length'"):
        tokenizer(["a", "a red apple"], return_tensors="pt")
    with pytest.raises(ValueError, match="return_tensors = 'np'"):
        tokenizer("a", return_tensors="np")
