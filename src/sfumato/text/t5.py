"""T5's tokenisation: the pieces of a unigram language model, from a `tokenizer.json` or a SentencePiece file.

A text is normalised by the file's table, cut at blanks, and each word, with a sign for the blank before it, is spelled
with the pieces that are likeliest together (Kudo 2018; Kudo and Richardson 2018).
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tokenizers import AddedToken, Encoding, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from torch import Tensor

from sfumato.files import read_json, replacing
from sfumato.text.encoded import Encoded, padded

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
T5_LENGTH = 256  # what Stable Diffusion 3 reads of T5
SENTINELS = 100  # <extra_id_0> and on, which no SentencePiece file has
JSON_FILE, MODEL_FILE = "tokenizer.json", "spiece.model"

log = logging.getLogger(__name__)


class T5Tokenizer:
    """Texts to T5's ids.

    backend:    cuts a text into pieces; it knows <pad> and </s>.
    max_length: tokens a text is padded or cut to, the end token included; there is no start token.
    files:      the files that it was read from by name, to be written again as they were.
    Raises ValueError when <pad> or </s> is missing.
    """

    def __init__(
        self, backend: Tokenizer, max_length: int = T5_LENGTH, files: Mapping[str, bytes] = MappingProxyType({})
    ) -> None:
        if max_length < 2:
            raise ValueError(f"max_length {max_length} leaves no room for a piece; give 2 or more")
        pad, end = backend.token_to_id(PAD), backend.token_to_id(END)
        if pad is None or end is None:
            missing = [token for token, number in ((PAD, pad), (END, end)) if number is None]
            raise ValueError(
                f"the vocabulary of {backend.get_vocab_size()} pieces has no {' and no '.join(missing)}; is it T5's?"
            )
        self.backend = backend
        self.max_length = max_length
        self.files = dict(files)
        self.eos_id, self.pad_id = end, pad

    def __len__(self) -> int:
        """Number of ids."""
        return int(self.backend.get_vocab_size())

    def __call__(self, texts: str | Sequence[str], **form: Any) -> Any:
        """Token ids (B, L) int64: pieces, end, padding; logs a warning that quotes what was cut off.

        A bare string or any keyword (padding, max_length, truncation, return_tensors, add_special_tokens=True) is a
        call in transformers' form, answered by `Encoded`, see there.
        """
        if isinstance(texts, str) or form:
            return self._encoded(texts, **form)
        room = self.max_length - 1
        rows = []
        for text, encoding in zip(texts, self.pieces(texts), strict=True):
            kept = encoding.ids[:room]
            rows.append([*kept, self.eos_id, *[self.pad_id] * (room - len(kept))])
            if len(encoding.ids) > room:
                cut = text[encoding.offsets[room][0] :]
                log.warning("the prompt is longer than %d tokens of T5; cut off: %r", self.max_length, cut)
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.max_length)  # (B, L)

    def pieces(self, texts: Sequence[str]) -> list[Encoding]:
        """The uncut pieces of each text, without the end: ids, tokens, word_ids, offsets."""
        return list(self.backend.encode_batch(list(texts), add_special_tokens=False))

    def batch_decode(self, rows: Sequence[Sequence[int]] | Tensor) -> list[str]:
        """The text of each row of ids, without end and padding."""
        lists = rows.tolist() if isinstance(rows, Tensor) else [list(row) for row in rows]
        tokens = [
            [self.backend.id_to_token(i) or "" for i in row if i not in (self.eos_id, self.pad_id)] for row in lists
        ]
        return ["".join(row).replace("▁", " ").strip() for row in tokens]

    @property
    def model_max_length(self) -> int:
        """`max_length` under transformers' name."""
        return self.max_length

    def save(self, folder: Path | str) -> None:
        """Write the files of a `tokenizer_3/` folder, which transformers' T5TokenizerFast opens as well."""
        folder = Path(folder)
        # A vocabulary that goes through text twice is not the same to the last digit.
        written = {JSON_FILE: self.backend.to_str(pretty=True).encode(), **self.files}
        for name, data in written.items():
            with replacing(folder / name) as temporary:
                temporary.write_bytes(data)
        roles = {"eos_token": END, "pad_token": PAD, "unk_token": UNKNOWN}
        config = {"tokenizer_class": "T5TokenizerFast", "model_max_length": self.max_length, "extra_ids": 0, **roles}
        with replacing(folder / "tokenizer_config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_folder(cls, folder: Path | str, max_length: int = T5_LENGTH) -> T5Tokenizer:
        """Read a `tokenizer_3/` folder: `tokenizer.json`, or `spiece.model` where that is not there.

        Raises FileNotFoundError without either, ValueError when it is not a unigram vocabulary with T5's tokens.
        """
        folder = Path(folder)
        there = [folder / name for name in (JSON_FILE, MODEL_FILE) if (folder / name).is_file()]
        if there:
            found = cls.from_file(there[0], max_length)
            found.files |= {path.name: path.read_bytes() for path in there[1:]}
            return found
        raise FileNotFoundError(
            f"{folder} has neither {JSON_FILE} nor {MODEL_FILE}: put T5's there (from the tokenizer_3 folder of Stable "
            "Diffusion 3, or any T5 v1.1), or leave the T5 encoder out"
        )

    @classmethod
    def from_file(cls, path: Path | str, max_length: int = T5_LENGTH) -> T5Tokenizer:
        """Read a `tokenizer.json` or a SentencePiece model; raises as `from_folder` does."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; give T5's {JSON_FILE} or {MODEL_FILE}")
        if path.suffix == ".json":
            kind = read_json(path).get("model", {}).get("type")
            if kind != "Unigram":
                raise ValueError(f"{path} holds a {kind} vocabulary; T5's is Unigram")
            backend = Tokenizer.from_file(str(path))
            backend.no_padding()
            backend.no_truncation()
            return cls(backend, max_length, {JSON_FILE: path.read_bytes()})
        data = path.read_bytes()
        return cls(unigram(read_sentencepiece(data, str(path))), max_length, {MODEL_FILE: data})

    def _encoded(
        self,
        texts: str | Sequence[str],
        padding: bool | str | None = None,
        max_length: int | None = None,
        truncation: bool | str | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
    ) -> Encoded:
        """Pieces and end of texts in transformers' form, see `encoded.padded`."""
        limit = max_length or self.max_length
        cut = limit - 1 if truncation and truncation != "do_not_truncate" else None
        end = [self.eos_id] if add_special_tokens else []
        found = self.pieces([texts] if isinstance(texts, str) else texts)
        rows = [[*text.ids[:cut], *end] for text in found]
        return padded(rows, isinstance(texts, str), self.pad_id, limit, padding, return_tensors)


@dataclass(frozen=True)
class SentencePiece:
    """What a SentencePiece model file says.

    pieces:  (piece, logarithm of its probability), in the order of their ids.
    special: the pieces that stand for themselves alone: controls and symbols of the user's.
    unknown: id of the piece for what cannot be spelled.
    table:   the compiled normalisation, b"" for none.
    """

    pieces: tuple[tuple[str, float], ...]
    special: tuple[str, ...]
    unknown: int
    table: bytes


def unigram(model: SentencePiece) -> Tokenizer:
    """The tokenizer of a SentencePiece model, with T5's sentinels after its pieces."""
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(SENTINELS))]
    backend = Tokenizer(Unigram([*model.pieces, *((token, 0.0) for token in sentinels)], model.unknown, False))
    if model.table:
        backend.normalizer = normalizers.Precompiled(model.table)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    special = [*model.special, *sentinels]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return backend


# Numbers of the fields in sentencepiece_model.proto, and of the kinds of pieces.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
TEXT, SCORE, KIND = 1, 2, 3
UNKNOWN_KIND, CONTROL, USER = 2, 3, 4
MODEL_TYPE, UNIGRAM = 3, 1
TABLE = 2


def read_sentencepiece(data: bytes, source: str) -> SentencePiece:
    """Read the bytes of a SentencePiece model; ValueError in one line when they are none, or not a unigram model."""
    pieces: list[tuple[str, float]] = []
    special, unknown, table = [], None, b""
    try:
        for field, value in fields(data):
            if field == PIECES:
                entries = dict(fields(_bytes(value)))
                piece, kind = _bytes(entries[TEXT]).decode(), entries.get(KIND, 1)
                if kind in (CONTROL, USER, UNKNOWN_KIND):
                    special.append(piece)
                if kind == UNKNOWN_KIND:
                    unknown = len(pieces)
                score = entries.get(SCORE, bytes(4))
                pieces.append((piece, struct.unpack("<f", _bytes(score))[0]))
            elif field == TRAINER and dict(fields(_bytes(value))).get(MODEL_TYPE, UNIGRAM) != UNIGRAM:
                raise ValueError("it is not a unigram model")
            elif field == NORMALIZER:
                table = _bytes(dict(fields(_bytes(value))).get(TABLE, b""))
        if unknown is None:
            raise ValueError("it has no piece for the unknown")
    except (IndexError, KeyError, UnicodeDecodeError, struct.error, ValueError) as error:
        why = f"{error}" if type(error) is ValueError else "its bytes are damaged"
        raise ValueError(f"{source} is no SentencePiece model for T5: {why}; fetch {MODEL_FILE} again") from None
    return SentencePiece(tuple(pieces), tuple(special), unknown, table)


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol-buffer message: (number, value); whole numbers as int, all others as bytes.

    Raises IndexError or ValueError where the bytes end too early or are of a form that is not in use any more.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, form = key >> 3, key & 7
        if form == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if form == 2:
            length, at = _varint(data, at)
        elif form in (1, 5):
            length = 8 if form == 1 else 4
        else:
            raise ValueError(f"a field of form {form}")
        if at + length > len(data):
            raise IndexError
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and the place after it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes should be")
    return value
