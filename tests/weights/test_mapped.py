"""Pages of mapped weights that go and come again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sfumato.weights.mapped import FileRanges, release_unwritten
from sfumato.weights.safe import read_tensors, write_tensors


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which pages were written")
def test_what_was_written_stays(tmp_path: Path) -> None:
    weights = {name: torch.randn(64, 1024) for name in ("read", "written")}
    write_tensors(tmp_path / "a.safetensors", weights)
    tensors, files = read_tensors(tmp_path / "a.safetensors"), FileRanges()
    assert all(tensor in files and torch.equal(tensor, weights[name]) for name, tensor in tensors.items())
    tensors["written"][40, 5] = 7
    assert release_unwritten(tensors["read"]) and not release_unwritten(tensors["written"])
    weights["written"][40, 5] = 7
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tensors.items())
    assert release_unwritten(torch.empty(0)) and not release_unwritten(torch.zeros(8192))
