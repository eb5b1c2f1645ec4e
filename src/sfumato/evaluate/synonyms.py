"""Does a text encoder find the concept behind a word that no caption contains, dog behind puppy?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import torch.nn.functional as F
import yaml
from torch import Tensor


@dataclass(frozen=True)
class SynonymScore:
    """How many of `count` words have their concept first, and among the first three; each word's rank."""

    count: int
    top1: int
    top3: int
    ranks: Mapping[str, int]


def read_synonyms() -> dict[str, tuple[str, ...]]:
    """The fixed list of the package: word -> labels that mean the same."""
    text = files("sfumato.data").joinpath("synonyms.yaml").read_text(encoding="utf-8")
    return {str(word): tuple(map(str, labels)) for word, labels in yaml.safe_load(text).items()}


def score_synonyms(
    embed: Callable[[Sequence[str]], Tensor], labels: Sequence[str], synonyms: Mapping[str, Sequence[str]]
) -> SynonymScore:
    """Rank all `labels` by cosine similarity to each synonym, under `embed`: texts -> vectors (N, D).

    A word's rank is that of the best of its accepted labels. Labels that equal a synonym are left out for
    that word. Raises ValueError when an accepted label is not among `labels`.
    """
    place = {label: i for i, label in enumerate(labels)}
    missing = sorted({label for accepted in synonyms.values() for label in accepted if label not in place})
    if missing:
        raise ValueError(f"labels {missing} are not among the {len(labels)} concepts")
    words = list(synonyms)
    keys = F.normalize(embed(labels).float(), dim=-1)  # (C, D)
    queries = F.normalize(embed(words).float(), dim=-1)  # (W, D)
    similar = queries @ keys.T  # (W, C)
    ranks = {}
    for word, row in zip(words, similar, strict=True):
        if word in place:
            row[place[word]] = -1
        best = max(row[place[label]].item() for label in synonyms[word])
        ranks[word] = int((row > best).sum()) + 1
    return SynonymScore(len(words), sum(r == 1 for r in ranks.values()), sum(r <= 3 for r in ranks.values()), ranks)
