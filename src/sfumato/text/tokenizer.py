"""CLIP's byte-pair tokenisation, read from and written to the `tokenizer/` part of a model folder.

A text is normalised (NFC, white space to single blanks, lower case), cut into words by CLIP's pattern, each
word is spelled in bytes, and the bytes are merged in the order of `merges.txt`; the last piece of a word
carries `</w>`. Radford et al. 2021 (CLIP), section 2.4; Sennrich et al. 2016 for the merging.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor

from sfumato.files import read_json, replacing
from sfumato.text.encoded import encode

START = "<|startoftext|>"
END = "<|endoftext|>"
WORD_END = "</w>"
CLIP_LENGTH = 77
QUOTED = 200  # letters of what was cut off, in the warning
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


@dataclass(frozen=True)
class Pieces:
    """The uncut pieces of one text with triggers in it, under the names that `tokenizers.Encoding` has.

    offsets: where each piece stands in the text; all ids of a trigger have the trigger's place.
    word_ids: the number of the word that each piece belongs to.
    """

    ids: list[int]
    tokens: list[str]
    word_ids: list[int | None]
    offsets: list[tuple[int, int]]


class ClipTokenizer:
    """Texts to CLIP token ids.

    vocabulary: piece -> id, as in `vocab.json`.
    merges:     pairs of pieces in order of precedence, as in `merges.txt`.
    max_length: tokens a text is padded or cut to, start and end included.
    special:    the start, end, padding and unknown tokens.
    added:      further tokens that are matched as a whole (textual inversion), numbered after the vocabulary.

    `expansions` are the trigger words that `expanded` gave it, and the ids that each stands for; none at first.
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
        self.expansions: dict[str, tuple[int, ...]] = {}
        self._order: list[str] = []
        self._triggers: re.Pattern[str] | None = None
        self.backend = _backend(self.vocabulary, self.merges, special, self.added)
        self.bos_id, self.eos_id, self.pad_id = (self._id(t) for t in (special.bos, special.eos, special.pad))

    def expanded(self, expansions: Mapping[str, Sequence[int]]) -> ClipTokenizer:
        """A tokenizer that also knows these triggers, in the place of those that this one knows.

        expansions: a word, or several with blanks between, and the ids that it stands for in every text. It is
        found whatever its case, as CLIP reads everything in lower case, and only as a whole: "cat" not in "cats".
        A word of the vocabulary loses its own meaning while it is a trigger, as in other programs.
        Raises ValueError for an empty trigger, one without ids, or two that differ in case or blanks alone.
        """
        new = copy.copy(self)
        new.expansions = {word: tuple(ids) for word, ids in expansions.items()}
        folded = Counter(self.folded(word) for word in expansions)
        for word, ids in new.expansions.items():
            if not self.folded(word) or not ids:
                raise ValueError(f"trigger {word!r} with {len(ids)} ids; give a word and one id or more")
            if folded[self.folded(word)] > 1:
                raise ValueError(f"the trigger {word!r} is given twice; case and blanks do not tell words apart")
        # Where one trigger begins like another, the longer one is meant.
        new._order = sorted(new.expansions, key=len, reverse=True)
        groups = "|".join(f"({_whole_word(word)})" for word in new._order)
        new._triggers = re.compile(groups, re.IGNORECASE) if groups else None
        return new

    def folded(self, text: str) -> str:
        """`text` as CLIP compares it: composed characters, single blanks, lower case."""
        return str(self.backend.normalizer.normalize_str(text)).strip()

    def __len__(self) -> int:
        """Number of ids, added tokens included, those of triggers not."""
        return int(self.backend.get_vocab_size())

    def __call__(self, texts: str | Sequence[str], **form: Any) -> Any:
        """Token ids (B, L) int64 of `texts`; logs a warning that quotes what was cut off.

        A bare string or any keyword (padding, max_length, truncation, return_tensors) is a call in transformers'
        form, answered by `Encoded`, see there.
        """
        if isinstance(texts, str) or form:
            return encode(self, texts, **form)
        tokens = self.tokenize(texts)
        for text, cut in zip(texts, tokens.cut, strict=True):
            if cut:
                log.warning("the prompt is longer than %d tokens; cut off: %r", self.max_length, shorten(cut, QUOTED))
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

    def pieces(self, texts: Sequence[str]) -> list[Encoding | Pieces]:
        """The uncut pieces of each text, without start and end: ids, tokens, word_ids, offsets."""
        if self._triggers is not None:
            return [self._expand(text, self._triggers) for text in texts]
        return list(self.backend.encode_batch(list(texts), add_special_tokens=False))

    def _expand(self, text: str, triggers: re.Pattern[str]) -> Pieces:
        """The pieces of what lies between triggers, and the triggers' ids."""
        found = Pieces([], [], [], [])
        end = words = 0
        for match in (*triggers.finditer(text), None):
            start = len(text) if match is None else match.start()
            plain = self.backend.encode(text[end:start], add_special_tokens=False)
            found.ids.extend(plain.ids)
            found.tokens.extend(plain.tokens)
            found.word_ids.extend(None if word is None else words + word for word in plain.word_ids)
            found.offsets.extend((end + a, end + b) for a, b in plain.offsets)
            words += 1 + max((word for word in plain.word_ids if word is not None), default=-1)
            if match is not None and match.lastindex is not None:
                trigger = self._order[match.lastindex - 1]
                ids, end = self.expansions[trigger], match.end()
                found.ids.extend(ids)
                found.tokens.extend([trigger] * len(ids))
                found.word_ids.extend([words] * len(ids))
                found.offsets.extend([match.span()] * len(ids))
                words += 1
        return found

    @property
    def model_max_length(self) -> int:
        """`max_length` under transformers' name."""
        return self.max_length

    def batch_decode(self, rows: Iterable[Iterable[int] | Tensor]) -> list[str]:
        """The text of each row of ids, see `decode`."""
        return [self.decode(row) for row in rows]

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of some ids, without start, end and padding, words separated by blanks.

        Of a trigger's ids the first is written as the trigger and the others as nothing.
        """
        flat = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        triggers = {id: word if i == 0 else "" for word, row in self.expansions.items() for i, id in enumerate(row)}
        parts: list[str] = []
        for is_trigger, run in itertools.groupby(flat, key=triggers.__contains__):
            if is_trigger:
                parts.extend(triggers[id] for id in run)
            else:
                text = str(self.backend.decode(list(run), skip_special_tokens=True))
                parts.append(text.replace(WORD_END, " ").strip())
        return " ".join(part for part in parts if part)

    def save(self, folder: Path | str) -> None:
        """Write the files of a `tokenizer/` folder, which transformers' CLIPTokenizer opens as well.

        Raises ValueError while it has triggers, whose embeddings no folder of the same model has.
        """
        if self.expansions:
            raise ValueError(
                f"a tokenizer with triggers cannot be saved; first remove the embeddings {', '.join(self.expansions)}"
            )
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


def _whole_word(trigger: str) -> str:
    """A pattern for a trigger: any white space for its blanks, no letters or digits right before or after it."""
    spellings = {unicodedata.normalize(form, trigger).strip() for form in ("NFC", "NFD")}
    patterns = (r"\s+".join(re.escape(word) for word in spelling.split()) for spelling in sorted(spellings))
    before = r"(?<!\w)" if trigger.strip()[0].isalnum() else ""
    after = r"(?!\w)" if trigger.strip()[-1].isalnum() else ""
    return f"{before}(?:{'|'.join(patterns)}){after}"


def train_vocabulary(texts: Iterable[str], size: int, max_length: int = CLIP_LENGTH) -> ClipTokenizer:
    """Learn a byte-pair vocabulary of at most `size` pieces from `texts`; the same texts give the same pieces.

    The layout is CLIP's: 256 bytes, the same 256 as word ends, the merges in order, start and end token last;
    so every text can be spelled and nothing is unknown. Raises ValueError when `size` has no room for the 514
    fixed pieces.
    """
    alphabet = byte_alphabet()
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


def byte_alphabet() -> list[str]:
    """The 256 letters that bytes are spelled with, in the order of CLIP's vocabulary ("!" is number 0)."""
    # Printable characters stand for themselves and come first.
    return sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda symbol: (ord(symbol) >= 256, ord(symbol)))


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
