"""The condition that networks are given."""

from __future__ import annotations

import pytest
import torch

from sfumato.cond import Cond

FULL = Cond(torch.ones(2, 3, 4), torch.tensor([[7], [300]]), torch.zeros(2, 5, 8, 8))


def test_only_context_and_concat_change_their_dtype() -> None:
    moved = FULL.to("cpu", torch.bfloat16)
    assert [p.dtype for p in moved.parts if p is not None] == [torch.bfloat16, torch.int64, torch.bfloat16]
    assert moved.pooled is not None
    assert moved.pooled.tolist() == [[7], [300]]
    sizes = Cond(pooled=torch.tensor([[1023.0]])).to(dtype=torch.bfloat16).pooled
    assert sizes is not None
    assert sizes.tolist() == [[1023]]  # bfloat16 would make it 1024
    assert FULL.to().parts == FULL.parts
    assert Cond().to(dtype=torch.float16) == Cond()


def test_rows_are_cut_and_joined() -> None:
    halves = [FULL[:1], FULL[1:]]
    assert halves[0].signature() == FULL.signature() == ((3, 4), (1,), (5, 8, 8))
    for part, whole in zip(Cond.cat(halves).parts, FULL.parts, strict=True):
        assert part is not None
        assert whole is not None
        assert torch.equal(part, whole)
    assert Cond.cat([FULL]) is FULL


def test_conditions_of_different_shapes_are_not_joined() -> None:
    with pytest.raises(ValueError, match="conditions of different shapes cannot share a batch"):
        Cond.cat([FULL, Cond(FULL.context)])
