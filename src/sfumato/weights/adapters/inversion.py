"""Textual inversion: learned words for the text tower (Gal et al. 2022).

An embedding file holds n vectors that stand in the token table for a word of their own, its trigger. Three
layouts are read: AUTOMATIC1111's pickle (`string_to_param`), its safetensors (`emb_params`) and diffusers'
(`{trigger: vectors}`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.models.clip import CLIPTextModel
from sfumato.text.tokenizer import ClipTokenizer
from sfumato.weights.adapters.deltas import FAMILIES
from sfumato.weights.keymap import listed
from sfumato.weights.source import Weights, open_weights
from sfumato.weights.streaming import home_of

PICKLED = "string_to_param."
PLAIN = "emb_params"
TWO_TOWERS = {"clip_l", "clip_g"}


@dataclass(frozen=True, eq=False)
class Embedding:
    """A learned word: its trigger `name`, and the vectors (n, D) that it puts in the place of token embeddings."""

    name: str
    path: Path
    vectors: Tensor


def read_embedding(path: Path | str, name: str | None = None) -> Embedding:
    """Read a textual-inversion file.

    name: the trigger. By default the token that a diffusers file names, and otherwise the file's name without
          ending, which is what AUTOMATIC1111 goes by, whatever name the file has inside.
    Raises FileNotFoundError, or ValueError when it is damaged, no embedding, or one for two text towers (SDXL).
    """
    path = Path(path)
    with open_weights(path) as weights:
        token, vectors = _vectors(weights)
    if not vectors.is_floating_point() or not 1 <= vectors.ndim <= 2 or vectors.numel() == 0:
        raise ValueError(
            f"{path}: {token!r} is {vectors.dtype} of shape {tuple(vectors.shape)}; "
            "an embedding is one vector (D,) or several (n, D)"
        )
    if not torch.isfinite(vectors.float()).all():
        raise ValueError(f"{path}: {token!r} holds infinite numbers or NaN; the file is damaged, fetch it again")
    if name is None:
        name = path.stem if token == PLAIN or token.startswith(PICKLED) else token
    return Embedding(name, path, vectors.detach().reshape(-1, vectors.shape[-1]))


class EmbeddingHost:
    """The learned words of a text encoder and its tokenizer.

    The tower's token table is replaced by a longer one whose first rows are the old ones; the tokenizer is never
    changed, `tokenizer` is a new one that knows the triggers. Without embeddings both are the original objects.
    """

    def __init__(self, tokenizer: ClipTokenizer, text_encoder: CLIPTextModel) -> None:
        self._original = self.tokenizer = tokenizer
        self._layer: nn.Embedding = text_encoder.text_model.embeddings.token_embedding
        self._table = _table(self._layer)
        self._wanted: tuple[Embedding, ...] = ()

    @property
    def applied(self) -> tuple[str, ...]:
        """The triggers."""
        return tuple(embedding.name for embedding in self._wanted)

    @torch.no_grad()
    def apply(self, wanted: Sequence[Embedding]) -> ClipTokenizer:
        """Know these words and no other learned ones, and return the tokenizer for them; [] takes all off.

        A trigger may be a word that CLIP knows already, which it then overrides, as in AUTOMATIC1111.
        Raises ValueError when an embedding is made for another width, is longer than a prompt or shares its
        trigger with another; then everything stays as it was.
        """
        if tuple(map(id, wanted)) == tuple(map(id, self._wanted)):
            return self.tokenizer
        home = home_of(self._layer)
        if not self._wanted:
            if home is not None:
                home.leave()  # what is stored is the original
            self._table = _table(self._layer)
        rows, width = self._table.shape
        room = self._original.max_length - 2
        expansions: dict[str, range] = {}
        for embedding in wanted:
            count, found = embedding.vectors.shape
            if found != width:
                family = f", as {FAMILIES[found]} has it" if found in FAMILIES else ""
                raise ValueError(
                    f"{embedding.path}: vectors of {found} numbers{family}; this text encoder reads {width}, "
                    "use an embedding that was made for this model"
                )
            if count > room:
                raise ValueError(f"{embedding.path}: {count} vectors, but a prompt has room for {room}")
            if embedding.name in expansions:
                raise ValueError(f"{embedding.path}: the trigger {embedding.name!r} is taken by another embedding")
            expansions[embedding.name] = range(rows, rows + count)
            rows += count
        tokenizer = self._original.expanded(expansions) if wanted else self._original
        added = [embedding.vectors for embedding in wanted]
        if home is None:
            self._put(_lengthened(added, self._table) if wanted else None)
        else:
            home.undress()
            if wanted:
                home.dress("weight", partial(_lengthened, added))
            self._layer.num_embeddings = rows
        self.tokenizer, self._wanted = tokenizer, tuple(wanted)
        return tokenizer

    def _put(self, longer: Tensor | None) -> None:
        """Put a longer table in the place of the original, or the original back, where the tower is now."""
        now = self._layer.weight
        if (self._table.device, self._table.dtype) != (now.device, now.dtype):
            self._table.data = self._table.data.to(now.device, now.dtype)
        table = self._table
        if longer is not None:
            table = nn.Parameter(longer.to(now.device, now.dtype), requires_grad=self._table.requires_grad)
        self._layer.weight = table
        self._layer.num_embeddings = table.shape[0]


def _lengthened(added: Sequence[Tensor], table: Tensor) -> Tensor:
    """A table with further rows."""
    return torch.cat([table, *(vectors.to(table) for vectors in added)])


def _table(layer: nn.Embedding) -> nn.Parameter:
    table = layer.weight
    assert isinstance(table, nn.Parameter)
    return table


def _vectors(weights: Weights) -> tuple[str, Tensor]:
    """The one tensor of an embedding file, with its name; ValueError saying what the file holds instead."""
    names = list(weights)
    if TWO_TOWERS.issubset(names):
        raise ValueError(
            f"{weights.path} is an embedding for SDXL's two text towers (clip_l, clip_g); "
            "this model has one, use an embedding that was made for it"
        )
    for chosen in ([n for n in names if n == PLAIN], [n for n in names if n.startswith(PICKLED)], names):
        if len(chosen) == 1:
            return chosen[0], weights[chosen[0]]
    raise ValueError(
        f"{weights.path} is no textual inversion with one trigger: "
        f"{listed('tensors', sorted(names)) or 'it has no tensors'}; "
        "expected emb_params, string_to_param or one trigger"
    )
