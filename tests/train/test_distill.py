"""Teaching the text tower, with a tiny random teacher and a tiny emoji list."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from sfumato.data.words import plain_words, plural
from sfumato.models.clip import CLIPTextConfig, CLIPTextModel
from sfumato.text.tokenizer import ClipTokenizer, train_vocabulary
from sfumato.train import distill as module
from sfumato.train.distill import DistillConfig, batch_rows, distill, learning_rate, make_lessons
from sfumato.train.phrases import Corpus, build_corpus, foreign_names, misspell, whole_words
from sfumato.train.teacher import SentenceModel

WORDS = ("dog", "cat", "apple", "car", "red", "blue", "green", "puppy", "bike", "gift", "tree", "house", "left", "two")


@pytest.fixture(scope="module")
def teacher_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights, in the files of the real teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789,'-"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + c for c in letters), *WORDS]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(pieces), hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def config(teacher_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DistillConfig:
    monkeypatch.setattr(module, "teacher_folder", lambda: teacher_files)
    entries = [
        {"label": "dog face", "hexcode": "1F436", "emoji": "🐶", "tags": ["puppy", "pet"]},
        {"label": "red apple", "hexcode": "1F34E", "emoji": "🍎", "tags": ["fruit"]},
        {"label": "bicycle", "hexcode": "1F6B2", "emoji": "🚲", "tags": ["bike"]},
        {"label": "flag: Fiji", "hexcode": "1F1EB-1F1EF", "emoji": "🇫🇯", "tags": ["FJ"]},
    ]
    base, lib = tmp_path / "npm/emojibase-data/en", tmp_path / "npm/emojilib/dist"
    base.mkdir(parents=True)
    lib.mkdir(parents=True)
    (base / "data.json").write_text(json.dumps(entries))
    (lib / "emoji-en-US.json").write_text(json.dumps({"🐶": ["dog_face", "woof"]}))
    return DistillConfig(
        packages=str(tmp_path / "npm"), vocabulary_size=640, max_length=16, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, pairs=30, near_words=8, steps=12, batch=16, warmup=2,
        checkpoint_every=4, full_length_share=0.5,
    )  # fmt: skip


def test_teacher_matches_transformers(teacher_files: Path) -> None:
    model = SentenceModel(teacher_files)
    reference = transformers.BertModel.from_pretrained(teacher_files).eval()
    texts = ["a red apple", "dog", "two zebras left of a car, 3d style", "a blue fish", ""]
    expected = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([model.tokenizer.encode(text).ids])
            expected.append(reference(ids).last_hidden_state.mean(1)[0])
    difference = (model.embed(texts) - torch.nn.functional.normalize(torch.stack(expected), dim=-1)).abs().max()
    print(f"largest difference {difference:.2e}")
    assert difference < 1e-5


def test_words_are_placed_where_they_end(teacher_files: Path) -> None:
    tokenizer = train_vocabulary(["a red dog and two"] * 3, 540, max_length=12)
    corpus = Corpus(("a red dog", "dog and cat's"), ())
    lessons = make_lessons(corpus, tokenizer, SentenceModel(teacher_files))
    pieces = [encoding.tokens for encoding in tokenizer.pieces(corpus.texts)]
    red, dog, cat = 0, 1, 2
    assert pieces[0] == ["a</w>", "red</w>", "dog</w>"]
    assert lessons.own[0, :5].tolist() == [-1, -1, red, dog, -1]
    assert lessons.previous[0, :5].tolist() == [-1, -1, -1, red, -1]
    place = 1 + pieces[1].index("t</w>")  # the last piece of "cat", which the vocabulary does not know
    assert lessons.own[1, place] == cat
    assert lessons.previous[1, place] == dog
    assert (lessons.own[1] >= 0).sum() == 2
    assert lessons.lengths.tolist() == [5, len(pieces[1]) + 2]
    assert lessons.words.shape == (3, 48)


def test_an_epoch_shows_every_text_once() -> None:
    config = DistillConfig(batch=8, full_length_share=0.25)
    lengths = torch.arange(803) % 11 + 2
    seen = torch.cat([batch_rows(config, lengths, step)[0] for step in range(100)])
    assert len(seen.unique()) == len(seen) == 800
    assert torch.equal(batch_rows(config, lengths, 17)[0], batch_rows(config, lengths, 17)[0])
    assert not torch.equal(batch_rows(config, lengths, 17)[0], batch_rows(config, lengths, 117)[0])


def test_the_rate_rises_and_falls() -> None:
    config = DistillConfig(steps=100, warmup=10, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.02


def test_learns_and_writes_what_transformers_opens(config: DistillConfig, tmp_path: Path) -> None:
    losses: list[float] = []

    def progress(step: int, steps: int, values: Mapping[str, float]) -> None:
        if "loss" in values:
            losses.append(values["loss"])

    out = distill(dataclasses.replace(config, steps=60, learning_rate=3e-3), tmp_path / "run", progress)
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    print(f"mean loss of ten steps: first {first:.3f}, last {last:.3f}")
    assert len(losses) == 60
    assert last < 0.8 * first
    tokenizer = ClipTokenizer.from_folder(out / "tokenizer")
    settings = json.loads((out / "text_encoder/config.json").read_text())
    model = CLIPTextModel(CLIPTextConfig.from_dict(settings))
    model.load_state_dict(load_file(out / "text_encoder/model.safetensors"))
    theirs = transformers.CLIPTextModel.from_pretrained(out / "text_encoder").eval()
    their_tokenizer = transformers.CLIPTokenizer.from_pretrained(out / "tokenizer")
    texts = ["a red apple", "two dogs left of a bicycle"]
    ids = their_tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected, ours = theirs(ids), model(tokenizer(texts))
    difference = (ours.last_hidden_state - expected.last_hidden_state).abs().max().item()
    print(f"largest difference {difference:.2e}")
    assert difference < 1e-5
    assert (ours.pooled - expected.pooler_output).abs().max() < 1e-5


def test_an_interrupted_run_ends_the_same(config: DistillConfig, tmp_path: Path) -> None:
    class Interrupt(RuntimeError):
        pass

    def stop_at_seven(step: int, steps: int, values: Mapping[str, float]) -> None:
        if "loss" in values and step == 7:
            raise Interrupt

    whole = load_file(distill(config, tmp_path / "whole") / "text_encoder/model.safetensors")
    with pytest.raises(Interrupt):
        distill(config, tmp_path / "parts", stop_at_seven)
    assert not (tmp_path / "parts/text_encoder").exists()
    steps: list[int] = []
    parts = load_file(
        distill(config, tmp_path / "parts", lambda step, *_: steps.append(step)) / "text_encoder/model.safetensors"
    )
    assert steps == [5, 6, 7, 8, 9, 10, 11, 12]
    difference = max((whole[name] - parts[name]).abs().max().item() for name in whole)
    print(f"largest difference {difference:.2e}")
    assert difference == 0


def test_a_run_of_another_config_is_refused(config: DistillConfig, tmp_path: Path) -> None:
    distill(config, tmp_path / "run")
    with pytest.raises(ValueError, match="learning_rate"):
        distill(dataclasses.replace(config, learning_rate=0.1), tmp_path / "run")
    with pytest.raises(ValueError, match="another configuration"):
        distill(dataclasses.replace(config, pairs=31), tmp_path / "run")
    with pytest.raises(ValueError, match="unknown options"):
        DistillConfig.from_dict({"stepz": 3})


def test_corpus() -> None:
    corpus = build_corpus(["dog face"], ["puppy"], ["the", "pony"], ["pony"], 5, 5, 20, seed=0)
    assert {"dog face", "puppy", "the", "pony"} <= set(corpus.texts)
    assert len(set(corpus.texts)) == len(corpus.texts)
    weights = dict(corpus.words)
    assert weights["pony"] > weights["dog"] >= weights["the"] > weights["puppy"] > 1
    assert not any(text.startswith(("a orange", "a apple")) for text in corpus.texts)
    assert corpus == build_corpus(["dog face"], ["puppy"], ["the", "pony"], ["pony"], 5, 5, 20, seed=0)
    assert [plural(w) for w in ("dog", "box", "cherry", "key", "hot dog")] == [
        "dogs",
        "boxes",
        "cherries",
        "keys",
        "hot dogs",
    ]
    assert plain_words("Snow_man’s  №1: Hut") == "snow man's 1 hut"
    assert whole_words(["[CLS]", "the", "##ing", "x", "dog", "1990", "é"]) == ["the", "dog"]


def test_the_recipe_of_the_built_in_tower_is_readable() -> None:
    path = Path(__file__).parents[2] / "recipes/mini.yaml"
    config = DistillConfig.from_dict(yaml.safe_load(path.read_text())["text"])
    assert (config.hidden_size, config.max_length) == (256, 32)


def test_foreign_and_misspelt_names_mean_the_english_ones(config: DistillConfig, teacher_files: Path) -> None:
    folder = Path(config.packages) / "emojibase-data/zh"
    folder.mkdir()
    entries = [
        {"label": "狗脸", "hexcode": "1F436"},
        {"label": "OK", "hexcode": "1F34E"},
        {"label": "旗", "hexcode": "1F1EB-1F1EF"},
    ]
    (folder / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    names = foreign_names(Path(config.packages), ["zh"])
    assert names == {"狗脸": "dog face"}
    with pytest.raises(ValueError, match="no emoji names in 'xx'"):
        foreign_names(Path(config.packages), ["xx"])
    corpus = build_corpus(["bicycle"], [], ["dog"], ["dog"], 3, 3, 4, seed=0, foreign=names, typos_per_name=4)
    plain = build_corpus(["bicycle"], [], ["dog"], ["dog"], 3, 3, 4, seed=0)
    assert corpus.texts[: len(plain.texts)] == plain.texts and not plain.meant
    assert set(corpus.texts) == {*plain.texts, *corpus.meant}
    for text, meaning in corpus.meant.items():
        assert ("狗脸" in text) == ("dog face" in meaning) and ("dog face" in meaning or "bicycle" in meaning)
        assert text != meaning and "{" not in text + meaning
    teacher = SentenceModel(teacher_files)
    words = (word for word, weight in corpus.words for _ in range(weight))
    lessons = make_lessons(corpus, train_vocabulary(words, 640, 16), teacher)
    row = corpus.texts.index("狗脸")
    assert torch.equal(lessons.targets[row], teacher.embed(["dog face"])[0].half())
    end = int(lessons.lengths[row]) - 2
    assert torch.equal(lessons.words[int(lessons.own[row, end])], teacher.embed(["dog face"])[0].half())


def test_a_misspelt_word_is_one_slip_away_and_keeps_its_first_letter() -> None:
    draw = random.Random(0)
    slips = {misspell("bicycle", draw) for _ in range(300)}
    assert {"bciycle", "bcycle", "bicyycle"} <= slips
    assert all(word[0] == "b" and 6 <= len(word) <= 8 for word in slips)
