"""Ranking synonyms, with vectors made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sfumato.evaluate.synonyms import read_synonyms, score_synonyms

VECTORS = {"dog": (1.0, 0.0), "cat": (0.0, 1.0), "fox": (1.0, 0.9), "wolf": (1.0, 0.2), "puppy": (2.0, 0.1)}


def embed(texts: Sequence[str]) -> Tensor:
    return torch.tensor([VECTORS[text] for text in texts])


def test_ranks() -> None:
    score = score_synonyms(embed, ["dog", "cat", "fox", "wolf"], {"puppy": ["dog"], "wolf": ["cat", "fox"]})
    # "wolf" is a label itself and is not offered as its own answer; the dog is nearer to it than the fox.
    assert score.ranks == {"puppy": 1, "wolf": 2}
    assert (score.count, score.top1, score.top3) == (2, 1, 2)


def test_unknown_labels_are_named() -> None:
    with pytest.raises(ValueError, match="horse"):
        score_synonyms(embed, ["dog"], {"puppy": ["horse"]})


def test_the_list_is_long_enough_and_has_no_trivial_pairs() -> None:
    synonyms = read_synonyms()
    assert len(synonyms) >= 56
    assert not [word for word, labels in synonyms.items() if word in labels]
