"""CLIP's byte-pair tokenisation, read from and written to the `tokenizer/` part of a model folder.

A text is normalised (NFC, white space to single blanks, lower case), cut into words by CLIP's pattern, each
word is spelled in bytes, and the bytes are merged in the order of `merges.txt`; the last piece of a word
carries `</w>`. Radford et al. 2021 (CLIP), section 2.4; Sennrich et al. 2016 for the merging.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor

from sfumato.files import read_json, replacing

START = "<|startoftext|>"
END = "<|endoftext|>"
WORD_END = "</w>"
CLIP_LENGTH = 77
# The contractions, then a run of letters, one digit, or a run of anything else that is not blank.
PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpecialTokens:
    """The roles a tokenizer folder names; `normalized`: they are looked for after lower-casing."""

    bos: str = START
    eos: str = END
    pad: str = END
    unk: str = END
    normalized: bool = False


@dataclass(frozen=True)
class Tokens:
    """Token ids of some texts.

    ids: (B, L) int64, start token, pieces, end token, padding.
    cut: for each text the part that did not fit, "" where everything did.
    """

    ids: Tensor
    cut: tuple[str, ...]


class ClipTokenizer:
    """Texts to CLIP token ids.

    vocabulary: piece -> id, as in `vocab.json`.
    merges:     pairs of pieces in order of precedence, as in `merges.txt`.
    max_length: tokens a text is padded or cut to, start and end included.
    special:    the start, end, padding and unknown tokens.
    added:      further tokens that are matched as a whole (textual inversion), numbered after the vocabulary.

    Raises ValueError when a special token is missing from the vocabulary.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        max_length: int = CLIP_LENGTH,
        special: SpecialTokens = SpecialTokens(),
        added: Sequence[str] = (),
    ) -> None:
        if max_length < 3:
            raise ValueError(f"max_length {max_length} leaves no room for a piece; give 3 or more")
        self.vocabulary = dict(vocabulary)
        self.merges = list(merges)
        self.max_length = max_length
        self.special = special
        self.added = tuple(added)
        self.backend = _backend(self.vocabulary, self.merges, special, self.added)
        self.bos_id, self.eos_id, self.pad_id = (self._id(t) for t in (special.bos, special.eos, special.pad))

    def __len__(self) -> int:
        """Number of ids, added tokens included."""
        return int(self.backend.get_vocab_size())

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, L) int64 of `texts`; logs a warning that quotes what was cut off."""
        tokens = self.tokenize(texts)
        for text, cut in zip(texts, tokens.cut, strict=True):
            if cut:
                log.warning("the prompt is longer than %d tokens; cut off: %r", self.max_length, cut)
                log.debug("the whole prompt was %r", text)
        return tokens.ids

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids of `texts` with the parts that did not fit; raises TypeError when given a bare string."""
        if isinstance(texts, str):
            raise TypeError(f"texts is the string {texts!r}; give a list of strings")
        room = self.max_length - 2
        rows, cut = [], []
        for text, encoding in zip(texts, self.pieces(texts), strict=True):
            kept = encoding.ids[:room]
            padding = [self.pad_id] * (room - len(kept))
            rows.append([self.bos_id, *kept, self.eos_id, *padding])
            cut.append(text[encoding.offsets[room][0] :] if len(encoding.ids) > room else "")
        ids = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.max_length)  # (B, L)
        return Tokens(ids, tuple(cut))

    def pieces(self, texts: Sequence[str]) -> list[Encoding]:
        """The uncut pieces of each text, without start and end: ids, tokens, word_ids, offsets."""
        return list(self.backend.encode_batch(list(texts), add_special_tokens=False))

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of some ids, without start, end and padding, words separated by blanks."""
        flat = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        text = str(self.backend.decode(flat, skip_special_tokens=True))
        return text.replace(WORD_END, " ").strip()

    def save(self, folder: Path | str) -> None:
        """Write the files of a `tokenizer/` folder, which transformers' CLIPTokenizer opens as well."""
        folder = Path(folder)
        special = self.special
        roles = {role: _added_dict(token, special.normalized) for role, token in _roles(special).items()}
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.max_length,
            "do_lower_case": True,
            "add_prefix_space": False,
            "errors": "replace",
            **roles,
        }
        ordered = dict(sorted(self.vocabulary.items(), key=lambda item: item[1]))
        _write_json(folder / "vocab.json", ordered, indent=None)
        lines = ["#version: 0.2", *(f"{a} {b}" for a, b in self.merges)]
        with replacing(folder / "merges.txt") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        _write_json(folder / "special_tokens_map.json", roles, indent=2)
        _write_json(folder / "tokenizer_config.json", config, indent=2)
        if self.added:
            numbers = {token: self._id(token) for token in self.added}
            _write_json(folder / "added_tokens.json", numbers, indent=2)

    @classmethod
    def from_folder(cls, folder: Path | str) -> ClipTokenizer:
        """Read a `tokenizer/` folder: vocab.json and merges.txt, or a tokenizer.json alone, and the two
        config files.

        Raises FileNotFoundError when neither form of the vocabulary is there, ValueError when it is not a
        BPE one.
        """
        folder = Path(folder)
        vocabulary, merges = _read_vocabulary(folder)
        config = _read_json(folder / "tokenizer_config.json")
        special = _read_special({**config, **_read_json(folder / "special_tokens_map.json")})
        extra = {token: int(i) for token, i in _read_json(folder / "added_tokens.json").items()}
        extra |= {entry["content"]: int(i) for i, entry in config.get("added_tokens_decoder", {}).items()}
        added = sorted((token for token in extra if token not in vocabulary), key=extra.__getitem__)
        # Some folders leave the length out, or write the "no limit" number 1e30.
        length = int(config.get("model_max_length", CLIP_LENGTH))
        tokenizer = cls(vocabulary, merges, length if length <= 10_000 else CLIP_LENGTH, special, added)
        for token in added:
            if tokenizer._id(token) != extra[token]:
                raise ValueError(
                    f"{folder}: added token {token!r} has number {extra[token]}, but follows the vocabulary "
                    f"as {tokenizer._id(token)}; number added tokens without gaps after the pieces"
                )
        return tokenizer

    def _id(self, token: str) -> int:
        number = self.backend.token_to_id(token)
        if number is None:
            raise ValueError(f"the token {token!r} is not in the vocabulary of {len(self.vocabulary)} pieces")
        return int(number)


def train_vocabulary(texts: Iterable[str], size: int, max_length: int = CLIP_LENGTH) -> ClipTokenizer:
    """Learn a byte-pair vocabulary of at most `size` pieces from `texts`; the same texts give the same pieces.

    The layout is CLIP's: 256 bytes, the same 256 as word ends, the merges in order, start and end token last;
    so every text can be spelled and nothing is unknown. Raises ValueError when `size` has no room for the 514
    fixed pieces.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_order)
    fixed = [*alphabet, *(byte + WORD_END for byte in alphabet)]
    if size < len(fixed) + 2:
        raise ValueError(f"size {size} is too small: bytes, start and end token take {len(fixed) + 2}")
    # A word's last byte becomes a letter of its own. The trainer's suffix option would do the same, but numbers
    # the suffixed bytes in the order of a hash table, by which it then decides between pairs of equal count.
    last = {byte: chr(0xE000 + i) for i, byte in enumerate(alphabet)}
    ends = {letter: byte + WORD_END for byte, letter in last.items()}
    words = sorted(_count_words(texts).items())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=[*alphabet, *ends], show_progress=False, min_frequency=2
    )
    learner = Tokenizer(BPE())
    learner.train_from_iterator((word[:-1] + last[word[-1]] for word, n in words for _ in range(n)), trainer)
    pieces = dict.fromkeys(fixed)
    merges = []
    for found in json.loads(learner.to_str())["model"]["merges"]:
        if len(pieces) >= size - 2:
            break
        first, second = _pair(found)
        second = second[:-1] + ends.get(second[-1], second[-1])
        pieces[first + second] = None  # two merges may spell the same piece; it is one entry
        merges.append((first, second))
    vocabulary = {piece: i for i, piece in enumerate([*pieces, START, END])}
    return ClipTokenizer(vocabulary, merges, max_length)


def _count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs, spelled in bytes."""
    clean, cut = _normalizer(), _pre_tokenizer()
    words: Counter[str] = Counter()
    for text, count in Counter(texts).items():
        for word, _ in cut.pre_tokenize_str(clean.normalize_str(text)):
            words[word] += count
    return words


def _byte_order(symbol: str) -> tuple[bool, int]:
    # Printable characters stand for themselves and come first, as in CLIP's own vocabulary ("!" is number 0).
    return ord(symbol) >= 256, ord(symbol)


def _normalizer() -> normalizers.Normalizer:
    blank = normalizers.Replace(Regex(r"\s+"), " ")
    return normalizers.Sequence([normalizers.NFC(), blank, normalizers.Lowercase()])


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _backend(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], special: SpecialTokens, added: Sequence[str]
) -> Tokenizer:
    for token in _roles(special).values():
        if token not in vocabulary and token not in added:
            raise ValueError(f"the special token {token!r} is not in the vocabulary of {len(vocabulary)} pieces")
    model = BPE(vocab=vocabulary, merges=merges, unk_token=special.unk, end_of_word_suffix=WORD_END)
    backend = Tokenizer(model)
    backend.normalizer = _normalizer()
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    roles = dict.fromkeys(_roles(special).values())
    backend.add_tokens([AddedToken(token, normalized=False) for token in added if token not in roles])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=special.normalized) for token in roles])
    return backend


def _roles(special: SpecialTokens) -> dict[str, str]:
    return {
        "bos_token": special.bos,
        "eos_token": special.eos,
        "pad_token": special.pad,
        "unk_token": special.unk,
    }


def _added_dict(token: str, normalized: bool) -> dict[str, Any]:
    return {
        "content": token,
        "lstrip": False,
        "normalized": normalized,
        "rstrip": False,
        "single_word": False,
    }


def _read_special(config: Mapping[str, Any]) -> SpecialTokens:
    # A role is written as a plain string or as a description of an added token.
    entries = {role: config.get(f"{role}_token") for role in ("bos", "eos", "pad", "unk")}
    names = {
        role: entry["content"] if isinstance(entry, dict) else str(entry)
        for role, entry in entries.items()
        if entry is not None
    }
    normalized = any(isinstance(entry, dict) and entry.get("normalized", False) for entry in entries.values())
    return SpecialTokens(**names, normalized=normalized)


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        rows = [line for line in lines if line.strip() and not line.startswith("#version")]
        return _read_json(folder / "vocab.json"), [_pair(row) for row in rows]
    if (folder / "tokenizer.json").is_file():
        model = _read_json(folder / "tokenizer.json")["model"]
        if model.get("type", "BPE") != "BPE":
            raise ValueError(f"{folder}/tokenizer.json holds a {model['type']} vocabulary; CLIP's is BPE")
        return model["vocab"], [_pair(row) for row in model["merges"]]
    raise FileNotFoundError(f"{folder} has neither vocab.json with merges.txt nor tokenizer.json")


def _pair(row: str | Sequence[str]) -> tuple[str, str]:
    first, second = row.split() if isinstance(row, str) else row
    return first, second


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one when there is no such file."""
    return read_json(path) if path.is_file() else {}


def _write_json(path: Path, content: Mapping[str, Any], indent: int | None) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
