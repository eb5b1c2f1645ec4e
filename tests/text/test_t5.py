"""T5's tokenizer beside transformers', on a small vocabulary."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from sfumato.text.t5 import SENTINELS, T5Tokenizer, fields, read_sentencepiece, unigram

WORDS = ["▁a", "▁red", "▁fox", "▁fo", "x", "▁", "jumps", "▁ju", "mps", "s", "é", "▁over", "er", "!", ",", "日"]
LETTERS = list("abcdefghijklmnopqrstuvwxyz")
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
PIECES += [(word, -1.0 - 0.25 * i) for i, word in enumerate(WORDS)]
PIECES += [(letter, -9.0 - 0.1 * i) for i, letter in enumerate(LETTERS) if letter not in WORDS]
KINDS = {"<pad>": 3, "</s>": 3, "<unk>": 2}
TEXTS = ["a red fox", "A red  fox\tjumps over!", "", "  x ", "foxes, 日本 é e\u0301", "Ω<extra_id_3>a</s>b", "fo" * 200]


def varint(n: int) -> bytes:
    return bytes([n]) if n < 0x80 else bytes([n & 0x7F | 0x80]) + varint(n >> 7)


def record(number: int, value: bytes | int | float) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def lowering() -> bytes:
    """A compiled table that writes "A" as "a": a double array of 256 units, then the replacements."""
    units = [0] * 256
    units[0x41] = 0x80 << 10 | 1 << 8 | 0x41  # the letter, a leaf, and where its value stands
    units[0x41 ^ 0x80] = 1 << 31  # value 0: the first replacement
    trie = struct.pack("<256I", *units)
    return struct.pack("<I", len(trie)) + trie + b"a\0"


def spiece(table: bytes = b"", model_type: int = 1, pieces: list[tuple[str, float]] = PIECES) -> bytes:
    parts = [
        record(1, record(1, piece.encode()) + record(2, score) + (record(3, KINDS[piece]) if piece in KINDS else b""))
        for piece, score in pieces
    ]
    more = [record(2, record(3, model_type) + record(4, 32000)), record(3, record(1, b"nmt") + record(2, table))]
    return b"".join([*parts, *more])


def theirs(table: bytes = b"") -> transformers.T5Tokenizer:
    extra = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))]
    return transformers.T5Tokenizer(
        vocab=[*((p, struct.unpack("<f", struct.pack("<f", s))[0]) for p, s in PIECES), *extra],
        _spm_precompiled_charsmap=table or None,
    )


@pytest.mark.parametrize("table", [b"", lowering()], ids=["plain", "with a table"])
def test_the_ids_are_transformers(tmp_path: Path, table: bytes) -> None:
    (tmp_path / "spiece.model").write_bytes(spiece(table))
    ours, other = T5Tokenizer.from_folder(tmp_path, 40), theirs(table)
    expected = other(TEXTS, padding="max_length", max_length=40, truncation=True, return_tensors="pt")
    assert torch.equal(ours(TEXTS), expected.input_ids)
    assert len(ours) == len(other) and (ours.pad_id, ours.eos_id) == (0, 1)
    given = ours(TEXTS, padding="max_length", truncation=True, add_special_tokens=True, return_tensors="pt")
    assert torch.equal(given.input_ids, expected.input_ids)
    assert torch.equal(given.attention_mask, expected.attention_mask)
    assert ours(TEXTS[0]).input_ids == other(TEXTS[0]).input_ids
    assert ours.batch_decode(ours(["a red fox"])) == ["a red fox"]
    lowered = ours(["A red fox"]).equal(ours(["a red fox"]))
    assert lowered == bool(table)


def test_a_folder_survives_the_round_trip_through_transformers(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(spiece(lowering()))
    first = T5Tokenizer.from_folder(tmp_path, 30)
    first.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "spiece.model").read_bytes() == spiece(lowering())
    again = T5Tokenizer.from_folder(tmp_path / "saved", 30)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    loaded.save_pretrained(tmp_path / "theirs")
    back = T5Tokenizer.from_folder(tmp_path / "theirs", 30)
    expected = loaded(TEXTS, padding="max_length", max_length=30, truncation=True, return_tensors="pt").input_ids
    for tokenizer in (first, again, back):
        assert torch.equal(tokenizer(TEXTS), expected)


def test_what_is_cut_off_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = T5Tokenizer(unigram(read_sentencepiece(spiece(), "a file")), 4)
    with caplog.at_level(logging.WARNING):
        ids = tokenizer(["a red fox jumps over"])
    assert ids.shape == (1, 4) and ids[0, -1] == 1
    assert "longer than 4 tokens of T5; cut off: 'jumps over'" in caplog.text


def test_what_is_missing_or_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor spiece\.model: put T5's there") as error:
        T5Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(ValueError, match="holds a BPE vocabulary; T5's is Unigram"):
        T5Tokenizer.from_folder(tmp_path)
    for data, message in {
        spiece(model_type=2): "it is not a unigram model",
        spiece(pieces=[*PIECES[:2], *PIECES[3:]]): "it has no piece for the unknown",
        spiece()[:-3]: "its bytes are damaged",
        b"\xff" * 30: "its bytes are damaged",
        b"\x0b": "a field of form 3",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_sentencepiece(data, "spiece.model")
    with pytest.raises(ValueError, match=r"has no <pad>; is it T5's"):
        T5Tokenizer(unigram(read_sentencepiece(spiece(pieces=PIECES[1:]), "a file")))


@given(st.binary(max_size=60))
def test_any_bytes_give_one_clear_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="is no SentencePiece model for T5"):
        read_sentencepiece(data, "x")


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 2**63) | st.binary(max_size=200)), max_size=5))
def test_messages_are_read_as_they_are_written(written: list[tuple[int, int | bytes]]) -> None:
    assert list(fields(b"".join(record(number, value) for number, value in written))) == written
