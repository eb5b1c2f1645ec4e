"""The two public vocabularies that checkpoints in one file take for granted: CLIP's and BERT's.

Both lie in the package (see NOTICE), so that such a file needs nothing beside it.
"""

from __future__ import annotations

import gzip
from pathlib import Path

from sfumato.text.bert import BertTokenizer
from sfumato.text.tokenizer import END, START, WORD_END, ClipTokenizer, SpecialTokens, byte_alphabet

VOCABULARIES = Path(__file__).parents[1] / "assets" / "text"


def clip_tokenizer(pad: str = END) -> ClipTokenizer:
    """CLIP's tokeniser (49,408 ids, 77 tokens); `pad` is "!" (id 0) for the OpenCLIP towers of Stable Diffusion 2."""
    merges = [(first, second) for first, second in map(str.split, _lines("clip-merges.txt.gz"))]
    alphabet = byte_alphabet()
    pieces = [*alphabet, *(byte + WORD_END for byte in alphabet), *(a + b for a, b in merges), START, END]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return ClipTokenizer(vocabulary, merges, special=SpecialTokens(pad=pad))


def bert_tokenizer() -> BertTokenizer:
    """The uncased English BERT's tokeniser (30,522 ids), which latent diffusion's text-to-image model reads with."""
    return BertTokenizer({piece: i for i, piece in enumerate(_lines("bert-vocab.txt.gz"))})


def _lines(name: str) -> list[str]:
    return gzip.decompress((VOCABULARIES / name).read_bytes()).decode("utf-8").split("\n")[:-1]
