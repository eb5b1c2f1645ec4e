"""Token ids in the form in which notebooks written for transformers ask for them and read them."""

from __future__ import annotations

from collections.abc import KeysView, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """Token ids of one or several texts: tensors (B, L) int64, or lists.

    attention_mask: 1 for start, pieces and end, 0 for padding.
    Its entries can be read as attributes and as items, and handed on with two asterisks.
    """

    input_ids: Any
    attention_mask: Any

    def keys(self) -> KeysView[str]:
        """The names of the entries."""
        return vars(self).keys()

    def __getitem__(self, name: str) -> Any:
        """An entry by its name."""
        return vars(self)[name]

    def to(self, device: torch.device | str) -> Encoded:
        """The same on another device."""
        return Encoded(*(part.to(device) if isinstance(part, Tensor) else part for part in vars(self).values()))


class Pieced(Protocol):
    """What of a tokenizer is needed here."""

    max_length: int
    bos_id: int
    eos_id: int
    pad_id: int

    def pieces(self, texts: Sequence[str]) -> Sequence[Any]:
        """The uncut pieces of each text, without start and end."""
        ...


def encode(
    tokenizer: Pieced,
    texts: str | Sequence[str],
    padding: bool | str | None = None,
    max_length: int | None = None,
    truncation: bool | str | None = None,
    return_tensors: str | None = None,
) -> Encoded:
    """Start, pieces and end of texts: of a bare string without return_tensors one row, else rows.

    padding:        "max_length" fills up to max_length, "longest" or True to the longest row, else rows stay apart.
    max_length:     the tokenizer's own length when None; with truncation longer rows are cut to it, end included.
    return_tensors: "pt" for tensors, None for lists.
    Raises ValueError for another value, and for rows of several lengths that are to become a tensor.
    """
    limit = max_length or tokenizer.max_length
    cut = limit - 2 if truncation and truncation != "do_not_truncate" else None
    found = tokenizer.pieces([texts] if isinstance(texts, str) else list(texts))
    rows = [[tokenizer.bos_id, *text.ids[:cut], tokenizer.eos_id] for text in found]
    return padded(rows, isinstance(texts, str), tokenizer.pad_id, limit, padding, return_tensors)


def padded(
    rows: list[list[int]],
    single: bool,
    pad: int,
    limit: int,
    padding: bool | str | None = None,
    return_tensors: str | None = None,
) -> Encoded:
    """Rows of ids filled up with the id `pad`, and what is padding in them.

    single: the one row is given out by itself, where lists are.
    limit:  the length for padding "max_length"; "longest" or True fills up to the longest row, else rows stay apart.
    Raises ValueError as `encode` does.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors = {return_tensors!r}; give 'pt' or leave it out")
    if padding not in (None, False, "do_not_pad", True, "longest", "max_length"):
        raise ValueError(f"padding = {padding!r}; give 'max_length', 'longest' or False")
    lengths = [len(row) for row in rows]
    if padding in (True, "longest"):
        limit = max(lengths, default=0)
    elif padding != "max_length":
        limit = 0
    masks = [[1] * n + [0] * (limit - n) for n in lengths]
    rows = [row + [pad] * (limit - n) for row, n in zip(rows, lengths, strict=True)]
    if return_tensors is None:
        return Encoded(rows[0], masks[0]) if single else Encoded(rows, masks)
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"texts of {', '.join(map(str, lengths))} tokens make no tensor; give padding='max_length'")
    return Encoded(torch.tensor(rows, dtype=torch.int64), torch.tensor(masks, dtype=torch.int64))
