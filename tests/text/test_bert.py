"""The word-piece tokenizer against transformers' BertTokenizer."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer as Reference

from sfumato.text.bert import BertTokenizer
from sfumato.text.standard import bert_tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789ßöñøжя中한"
WORDS = ("a", "the", "red", "apple", "painting", "of", "naive", "##s", "##ing", "##ed", "##ll", "##ple", "un", "##even")
SIGNS = ".,!?'\"-_/\\()<>|~[]#@:"
VOCABULARY = dict.fromkeys([*SPECIAL, *SIGNS, *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS])
AWKWARD = [
    "",
    " \t\n",
    "A painting of RED apples, unevenly don't",
    "Naïve café É ÅÅ ﬁ ½ İstanbul ẞ",
    "日本語 中中 한국어 العربية हिन्दी 😀 ❤️",
    "[CLS] in the [SEP] middle [MASK] [PAD] [unk] [UNK]",
    "\x00\x01 control \x7f \u200b zero \u00a0width \ufeff \u2028 line \ufffd",
    "x" * 101 + " " + "a" * 99,
    "red apple " * 60,
    "##ing ## # a-b_c (a:1.2) [a|b]",
]


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    return BertTokenizer({piece: i for i, piece in enumerate(VOCABULARY)}, max_length=24)


def probes() -> list[str]:
    draw = random.Random(0)
    signs = LETTERS + SIGNS + "ABCÉÖ  \t\u0301\u200d😀"
    return AWKWARD + ["".join(draw.choices(signs, k=draw.randrange(60))) for _ in range(300)]


def check_same(ours: BertTokenizer, folder: Path) -> None:
    """Equal ids on all probes, for transformers' reading of a folder."""
    theirs = Reference.from_pretrained(folder)
    expected = theirs(
        probes(), padding="max_length", max_length=ours.max_length, truncation=True, return_tensors="pt"
    ).input_ids
    ids = ours(probes())
    different = [probes()[i] for i in (ids != expected).any(1).nonzero().flatten().tolist()]
    print(f"{len(probes())} texts, {len(different)} differ")
    assert not different


@pytest.mark.parametrize("lowercase", [True, False])
def test_parity_with_transformers(tokenizer: BertTokenizer, tmp_path: Path, lowercase: bool) -> None:
    ours = BertTokenizer(tokenizer.vocabulary, 24, lowercase)
    ours.save(tmp_path)
    check_same(ours, tmp_path)
    again = BertTokenizer.from_folder(tmp_path)
    assert (again.vocabulary, again.max_length, again.lowercase) == (ours.vocabulary, 24, lowercase)
    assert torch.equal(again(probes()), ours(probes()))


def test_parity_on_the_published_vocabulary(tmp_path: Path) -> None:
    ours = bert_tokenizer()
    ours.save(tmp_path)
    assert (len(ours), ours.max_length) == (30522, 77)
    assert (ours.pad_id, ours.bos_id, ours.eos_id) == (0, 101, 102)
    assert ours(["a painting of a squirrel"])[0, :8].tolist() == [101, 1037, 4169, 1997, 1037, 18197, 102, 0]
    check_same(ours, tmp_path)


def test_reads_a_tokenizer_json_alone(tokenizer: BertTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "ours")
    Reference.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "vocab.txt").unlink(missing_ok=True)
    assert (tmp_path / "theirs" / "tokenizer.json").is_file()
    assert torch.equal(BertTokenizer.from_folder(tmp_path / "theirs")(probes()), tokenizer(probes()))


def test_layout(tokenizer: BertTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    ids = tokenizer(["A red naïve apples", "Ω"])
    pieces = ("[CLS]", "a", "red", "naive", "apple", "##s", "[SEP]")
    assert ids[0].tolist() == [*(tokenizer.vocabulary[piece] for piece in pieces), *[0] * 17]
    assert ids[1, :3].tolist() == [tokenizer.vocabulary[piece] for piece in ("[CLS]", "[UNK]", "[SEP]")]
    assert tokenizer([]).shape == (0, 24)
    assert len(tokenizer) == len(VOCABULARY)
    with caplog.at_level(logging.WARNING):
        assert tokenizer(["red " * 22 + "apple a"])[0, -1] == tokenizer.eos_id
    assert "longer than 24 tokens; cut off: 'apple a'" in caplog.text


def test_lines_number_the_pieces(tokenizer: BertTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert (tmp_path / "vocab.txt").read_text(encoding="utf-8").split("\n")[:3] == ["[PAD]", "[UNK]", "[CLS]"]
    read = BertTokenizer.from_vocab(tmp_path / "vocab.txt")
    assert read.vocabulary == tokenizer.vocabulary and read.max_length == 77


def test_errors_say_what_to_do(tokenizer: BertTokenizer, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="list of strings"):
        tokenizer("a red apple")
    with pytest.raises(ValueError, match=r"vocabulary of 1 pieces has no \[CLS\], \[SEP\], \[UNK\]"):
        BertTokenizer({"[PAD]": 0})
    with pytest.raises(ValueError, match="max_length 2"):
        BertTokenizer(tokenizer.vocabulary, 2)
    with pytest.raises(FileNotFoundError, match=r"vocab\.txt is not there"):
        BertTokenizer.from_vocab(tmp_path / "vocab.txt")
    with pytest.raises(FileNotFoundError, match=r"neither vocab\.txt nor tokenizer\.json"):
        BertTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}}}))
    with pytest.raises(ValueError, match="holds a BPE vocabulary; BERT's is WordPiece"):
        BertTokenizer.from_folder(tmp_path)
