"""Textual inversion: learned words for the text tower (Gal et al. 2022).

An embedding file holds n vectors that stand in the token table for a word of their own, its trigger. Four
layouts are read: AUTOMATIC1111's pickle (`string_to_param`), its safetensors (`emb_params`), diffusers'
(`{trigger: vectors}`), and for Stable Diffusion XL and 3, which read with two CLIP towers, `clip_l` and `clip_g`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.models.clip import CLIPTextModel
from sfumato.text.tokenizer import ClipTokenizer
from sfumato.text.towers import Towers
from sfumato.weights.adapters.deltas import FAMILIES
from sfumato.weights.keymap import listed
from sfumato.weights.source import open_weights
from sfumato.weights.streaming import home_of

PICKLED = "string_to_param."
PLAIN = "emb_params"
TWO_TOWERS = ("clip_l", "clip_g")


@dataclass(frozen=True, eq=False)
class Embedding:
    """A learned word: its trigger `name`, and the vectors (n, D) that it puts in the place of token embeddings.

    second: those for the second of two towers; None where the word is for models with one.
    """

    name: str
    path: Path
    vectors: Tensor
    second: Tensor | None = None


def read_embedding(path: Path | str, name: str | None = None) -> Embedding:
    """Read a textual-inversion file.

    name: the trigger. By default the token that a diffusers file names, and otherwise the file's name without
          ending, which is what AUTOMATIC1111 goes by, whatever name the file has inside.
    Raises FileNotFoundError, or ValueError when it is damaged or no embedding.
    """
    path = Path(path)
    with open_weights(path) as weights:
        return _embedding(path, weights, name)


def embedding_of(content: Tensor | Mapping[str, Any], name: str | None = None) -> Embedding:
    """A learned word from vectors (n, D), or from what the layouts have in them; name: the trigger.

    Raises ValueError for vectors without a name, and for what is no embedding.
    """
    found = content if isinstance(content, Mapping) else {PLAIN: content}
    nested = found.get("string_to_param")
    if isinstance(nested, Mapping):
        found = {PICKLED + str(token): vectors for token, vectors in nested.items()}
    tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    made = _embedding(Path("embedding"), tensors, name)
    if name is None and made.name == "embedding":
        raise ValueError("vectors of a learned word come without its name; give token = the word for prompts")
    return made


def _embedding(path: Path, tensors: Mapping[str, Tensor], name: str | None) -> Embedding:
    """The word that some tensors are, by the names of the layouts."""
    if set(TWO_TOWERS) <= set(tensors):
        first, second = (_checked(path, token, tensors[token]) for token in TWO_TOWERS)
        return Embedding(path.stem if name is None else name, path, first, second)
    token, vectors = _vectors(path, tensors)
    if name is None:
        name = path.stem if token == PLAIN or token.startswith(PICKLED) else token
    return Embedding(name, path, _checked(path, token, vectors))


class Lexicon:
    """The learned words of all CLIP towers of a model, each with its tokenizer."""

    def __init__(self, towers: Towers) -> None:
        self.hosts = {
            place: EmbeddingHost(tokenizer, tower)
            for place, (tower, tokenizer) in enumerate(zip(towers.encoders, towers.tokenizers, strict=False))
            if isinstance(tower, CLIPTextModel) and isinstance(tokenizer, ClipTokenizer)
        }

    @property
    def tokenizers(self) -> list[ClipTokenizer]:
        """The tokenizers that know the words, by the order of their towers."""
        return [host.tokenizer for host in self.hosts.values()]

    def apply(self, wanted: Sequence[Embedding]) -> None:
        """Know these words and no other learned ones; [] takes all off.

        Raises ValueError as `EmbeddingHost.apply` does, and for a word that is not made for as many towers; then
        some of them may know the words, and [] takes these off.
        """
        if wanted and not self.hosts:
            raise ValueError(f"{wanted[0].path}: learned words are for models with CLIP towers; leave it out")
        for place, host in self.hosts.items():
            host.apply([self.share(one, place) for one in wanted])

    def share(self, embedding: Embedding, place: int) -> Embedding:
        """What the tower at a place learns of a word; ValueError for one that is made for another number of towers."""
        return embedding if list(self.hosts) == [0] else share(embedding, place)


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
            if embedding.second is not None:
                raise ValueError(
                    f"{embedding.path} is an embedding for two text towers ({', '.join(TWO_TOWERS)}), as SDXL has "
                    "them; this model has one, use an embedding that was made for it"
                )
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


def share(embedding: Embedding, place: int) -> Embedding:
    """What one of two towers learns of a word."""
    if embedding.second is None:
        raise ValueError(
            f"{embedding.path} is an embedding for one text tower; this model reads with two "
            f"({', '.join(TWO_TOWERS)}), use an embedding that was made for it"
        )
    return replace(embedding, vectors=embedding.second if place else embedding.vectors, second=None)


def _checked(path: Path, token: str, vectors: Tensor) -> Tensor:
    """Vectors as (n, D); ValueError when they are none."""
    if not vectors.is_floating_point() or not 1 <= vectors.ndim <= 2 or vectors.numel() == 0:
        raise ValueError(
            f"{path}: {token!r} is {vectors.dtype} of shape {tuple(vectors.shape)}; "
            "an embedding is one vector (D,) or several (n, D)"
        )
    if not torch.isfinite(vectors.float()).all():
        raise ValueError(f"{path}: {token!r} holds infinite numbers or NaN; the file is damaged, fetch it again")
    return vectors.detach().reshape(-1, vectors.shape[-1])


def _lengthened(added: Sequence[Tensor], table: Tensor) -> Tensor:
    """A table with further rows."""
    return torch.cat([table, *(vectors.to(table) for vectors in added)])


def _table(layer: nn.Embedding) -> nn.Parameter:
    table = layer.weight
    assert isinstance(table, nn.Parameter)
    return table


def _vectors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """The one tensor of an embedding, with its name; ValueError saying what is there instead."""
    names = list(tensors)
    for chosen in ([n for n in names if n == PLAIN], [n for n in names if n.startswith(PICKLED)], names):
        if len(chosen) == 1:
            return chosen[0], tensors[chosen[0]]
    raise ValueError(
        f"{path} is no textual inversion with one trigger: "
        f"{listed('tensors', sorted(names)) or 'it has no tensors'}; "
        "expected emb_params, string_to_param or one trigger"
    )
