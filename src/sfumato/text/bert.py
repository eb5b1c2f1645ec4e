"""BERT's word-piece tokenisation, which the latent-diffusion text-to-image model reads prompts with.

A text is cleaned, lower-cased, stripped of accents and cut at blanks and punctuation; each word is spelled with the
longest pieces of the vocabulary, from its beginning on. Wu et al. 2016, section 4.1; Devlin et al. 2019 (BERT).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from torch import Tensor

from sfumato.files import read_json, replacing

START, END, PAD, UNKNOWN, MASK = "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"
BERT_LENGTH = 77  # of the latent-diffusion model; BERT itself reads 512

log = logging.getLogger(__name__)


class BertTokenizer:
    """Texts to word-piece ids.

    vocabulary: piece -> id, as in `vocab.txt`; it holds [CLS], [SEP], [PAD] and [UNK].
    max_length: tokens a text is padded or cut to, start and end included.
    lowercase:  lower-case letters and strip accents first, as the "uncased" vocabularies need.

    Raises ValueError when one of these four is missing.
    """

    def __init__(self, vocabulary: Mapping[str, int], max_length: int = BERT_LENGTH, lowercase: bool = True) -> None:
        missing = [token for token in (START, END, PAD, UNKNOWN) if token not in vocabulary]
        if missing:
            raise ValueError(f"the vocabulary of {len(vocabulary)} pieces has no {', '.join(missing)}; is it BERT's?")
        if max_length < 3:
            raise ValueError(f"max_length {max_length} leaves no room for a piece; give 3 or more")
        self.vocabulary = dict(vocabulary)
        self.max_length = max_length
        self.lowercase = lowercase
        self.bos_id, self.eos_id, self.pad_id = (self.vocabulary[token] for token in (START, END, PAD))
        self.backend = Tokenizer(WordPiece(self.vocabulary, unk_token=UNKNOWN))
        self.backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        self.backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = [token for token in (PAD, UNKNOWN, START, END, MASK) if token in self.vocabulary]
        self.backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    def __len__(self) -> int:
        """Number of ids."""
        return len(self.vocabulary)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, L) int64: start, pieces, end, padding; logs a warning that quotes what was cut off.

        Raises TypeError when given a bare string.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts is the string {texts!r}; give a list of strings")
        room = self.max_length - 2
        rows = []
        for text, encoding in zip(texts, self.backend.encode_batch(list(texts), add_special_tokens=False), strict=True):
            kept = encoding.ids[:room]
            rows.append([self.bos_id, *kept, self.eos_id, *[self.pad_id] * (room - len(kept))])
            if len(encoding.ids) > room:
                cut = text[encoding.offsets[room][0] :]
                log.warning("the prompt is longer than %d tokens; cut off: %r", self.max_length, cut)
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.max_length)  # (B, L)

    def save(self, folder: Path | str) -> None:
        """Write the files of a `tokenizer/` folder, which transformers' BertTokenizer opens as well."""
        folder = Path(folder)
        pieces = sorted(self.vocabulary, key=self.vocabulary.__getitem__)
        with replacing(folder / "vocab.txt") as temporary:
            temporary.write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8", newline="\n")
        roles = {"cls": START, "sep": END, "pad": PAD, "unk": UNKNOWN, "mask": MASK}
        config: dict[str, Any] = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.lowercase,
            "model_max_length": self.max_length,
            **{f"{role}_token": token for role, token in roles.items() if token in self.vocabulary},
        }
        with replacing(folder / "tokenizer_config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_vocab(cls, path: Path | str, max_length: int = BERT_LENGTH, lowercase: bool = True) -> BertTokenizer:
        """Read a `vocab.txt`, a piece a line, numbered from 0; FileNotFoundError when it is not there."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; give BERT's vocab.txt, a piece a line")
        with path.open(encoding="utf-8") as lines:
            return cls({line.rstrip("\n"): i for i, line in enumerate(lines)}, max_length, lowercase)

    @classmethod
    def from_folder(cls, folder: Path | str) -> BertTokenizer:
        """Read a `tokenizer/` folder: `vocab.txt`, or a `tokenizer.json` alone, and `tokenizer_config.json`.

        The length is the folder's, but at most 77: folders made for BERT say 512, which no denoiser here was trained
        with. Raises FileNotFoundError without a vocabulary, ValueError when it is not one of word pieces.
        """
        folder = Path(folder)
        described = folder / "tokenizer_config.json"
        config = read_json(described) if described.is_file() else {}
        length = min(int(config.get("model_max_length", BERT_LENGTH)), BERT_LENGTH)
        lowercase = bool(config.get("do_lower_case", True))
        if (folder / "vocab.txt").is_file():
            return cls.from_vocab(folder / "vocab.txt", length, lowercase)
        if (folder / "tokenizer.json").is_file():
            model = read_json(folder / "tokenizer.json").get("model", {})
            if model.get("type") != "WordPiece":
                raise ValueError(f"{folder}/tokenizer.json holds a {model.get('type')} vocabulary; BERT's is WordPiece")
            return cls(model["vocab"], length, lowercase)
        raise FileNotFoundError(f"{folder} has neither vocab.txt nor tokenizer.json")
