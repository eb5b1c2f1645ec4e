"""Which kernels are used, and that everything goes on without them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sfumato import kernels
from sfumato.kernels import build, library
from tests.kernels.conftest import needs_library


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The library is looked for again in each test."""
    library._open.cache_clear()
    yield
    library._open.cache_clear()


def qkv() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 4, 80, 40, generator=g) for _ in range(3))


def test_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_KERNELS", "off")
    assert kernels.available() is None and "SFUMATO_KERNELS=off" in kernels.library_reason()
    assert torch.equal(kernels.attention(*qkv()), F.scaled_dot_product_attention(*qkv()))
    x = torch.randn(1, 8, 4, 4)
    one, zero = torch.ones(8), torch.zeros(8)
    assert torch.equal(kernels.group_norm(x, 2, one, zero, 1e-5), F.group_norm(x, 2, one, zero, 1e-5))
    with pytest.raises(ValueError, match="no compiled kernels"):
        kernels.fused(*qkv())


@needs_library
def test_a_chosen_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    best = kernels.available()
    monkeypatch.setenv("SFUMATO_KERNELS", "avx2")
    library._open.cache_clear()
    assert kernels.available() == "avx2"
    if best == "avx2":
        monkeypatch.setenv("SFUMATO_KERNELS", "avx512")
        library._open.cache_clear()
        assert kernels.available() is None and "no avx512" in kernels.library_reason()


def test_an_unknown_choice_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_KERNELS", "sse9")
    with pytest.raises(ValueError, match=r"SFUMATO_KERNELS = 'sse9'; use one of off, avx2, avx512"):
        kernels.available()


def test_without_a_library_and_with_a_broken_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SFUMATO_KERNELS", raising=False)
    monkeypatch.setattr(library, "PATH", tmp_path / "none.so")
    assert kernels.available() is None and "not built" in kernels.library_reason()
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(library, "PATH", broken)
    library._open.cache_clear()
    assert kernels.available() is None and "do not load" in kernels.library_reason()
    assert torch.equal(kernels.attention(*qkv()), F.scaled_dot_product_attention(*qkv()))


@needs_library
def test_gradients_and_other_formats_go_through_pytorch() -> None:
    q, k, v = qkv()
    q.requires_grad_()
    got = kernels.attention(q, k, v)
    assert got.requires_grad and torch.equal(got, F.scaled_dot_product_attention(q, k, v))
    with torch.no_grad():
        assert not torch.equal(kernels.attention(q, k, v), got)  # the kernel's rounding: it did answer
    half = [t.detach().half() for t in (q, k, v)]
    assert torch.equal(kernels.attention(*half), F.scaled_dot_product_attention(*half))
    x = torch.randn(3, 8, requires_grad=True)
    assert kernels.geglu(x).requires_grad


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler found (no-such-compiler)" in str(build.build(tmp_path / "k.so"))
    monkeypatch.setenv("CXX", "false")
    assert "false failed" in str(build.build(tmp_path / "k.so"))
    assert not list(tmp_path.iterdir())


@needs_library
def test_what_is_built_is_not_built_again() -> None:
    before = build.LIBRARY.stat().st_mtime_ns
    assert build.build() is None
    assert build.LIBRARY.stat().st_mtime_ns == before
