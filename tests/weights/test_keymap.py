from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.weights.keymap import KeyMap, Row


def numbers(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def shares_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("shape", "theirs"), [("", (3, 2)), ("conv1x1", (3, 2, 1, 1)), ("conv1d", (3, 2, 1)), ("transposed", (2, 3))]
)
def test_a_tensor_changes_its_shape_without_a_copy(shape: str, theirs: tuple[int, ...]) -> None:
    row, x = Row(("a",), "b", shape), numbers(3, 2)
    saved = row.save([x])
    (loaded,) = row.load(saved)
    assert saved.shape == theirs and shares_storage(saved, x) and shares_storage(loaded, x)
    assert torch.equal(loaded, x) and loaded.stride() == x.stride()


def test_joined_parts_follow_one_another() -> None:
    row = Row(("q", "k", "v"), "qkv")
    q, k, v = numbers(2, 5), numbers(2, 5) + 10, numbers(2, 5) + 20
    saved = row.save([q, k, v])
    assert torch.equal(saved, torch.cat([q, k, v]))
    for part, loaded in zip((q, k, v), row.load(saved), strict=True):
        assert torch.equal(part, loaded) and shares_storage(loaded, saved)


def test_parts_of_heads_take_turns() -> None:
    row = Row(("q", "k", "v"), "qkv", heads=2)
    q, k, v = torch.tensor([1, 2, 3, 4]), torch.tensor([11, 12, 13, 14]), torch.tensor([21, 22, 23, 24])
    saved = row.save([q, k, v])
    assert saved.tolist() == [1, 2, 11, 12, 21, 22, 3, 4, 13, 14, 23, 24]
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), row.load(saved), strict=True))


@settings(max_examples=60, deadline=None)
@given(
    parts=st.integers(1, 4),
    heads=st.integers(0, 4),
    rows=st.integers(1, 3),
    width=st.integers(1, 4),
    shape=st.sampled_from(["", "conv1x1", "conv1d", "transposed"]),
)
def test_loading_undoes_saving_and_saving_loading(parts: int, heads: int, rows: int, width: int, shape: str) -> None:
    if shape == "transposed":
        parts, heads = 1, 0
    row = Row(tuple(map(str, range(parts))), "all", shape, heads)
    ours = list(numbers(parts, max(heads, 1) * rows, width))
    theirs = row.save(ours)
    assert all(torch.equal(a, b) for a, b in zip(row.load(theirs), ours, strict=True))
    assert torch.equal(row.save(row.load(theirs)), theirs)


@pytest.mark.parametrize(
    ("row", "shape", "expected"),
    [
        (Row(("a",), "b", "conv1x1"), (3, 2), r"b of shape \(3, 2\) cannot become a; expected \(O, I, 1, 1\)"),
        (Row(("a",), "b", "conv1x1"), (3, 2, 3, 3), r"expected \(O, I, 1, 1\)"),
        (Row(("a",), "b", "conv1d"), (3, 2, 1, 1), r"expected \(O, I, 1\)"),
        (Row(("a",), "b", "transposed"), (3,), r"expected \(I, O\)"),
        (Row(("q", "k", "v"), "b", heads=2), (9, 2), r"cannot become q, k, v; expected \(multiple of 6, \.\.\.\)"),
        (Row(("q", "k"), "b"), (), r"expected \(multiple of 2, \.\.\.\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(row: Row, shape: tuple[int, ...], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        row.load(torch.zeros(shape))


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="Row b: shape = 'conv3d' is not supported; allowed: '', 'conv1d'"):
        Row(("a",), "b", "conv3d")


MAP = KeyMap((Row(("x.weight",), "y.w"), Row(("q", "k"), "qk")), extras=("position_ids", "loss.*"))
THEIRS = {"y.w": numbers(2), "qk": numbers(4)}


def test_names_are_exchanged_both_ways() -> None:
    ours = MAP.load(THEIRS)
    assert {name: t.tolist() for name, t in ours.items()} == {"x.weight": [0, 1], "q": [0, 1], "k": [2, 3]}
    back = MAP.save(ours)
    assert back.keys() == THEIRS.keys() and all(torch.equal(back[name], THEIRS[name]) for name in back)
    assert (MAP.ours, MAP.theirs) == (("x.weight", "q", "k"), ("y.w", "qk"))


def test_names_that_do_not_fit_are_listed() -> None:
    wrong = {"y.w": numbers(2), "z": numbers(1), "qk2": numbers(4)}
    with pytest.raises(ValueError, match=r"^f\.ckpt: names do not fit the key map; 1 missing: qk; 2 unknown: qk2, z; "):
        MAP.load(wrong, "f.ckpt")
    with pytest.raises(ValueError, match=r"2 missing: k, q; 1 unknown: loss\.x"):
        MAP.save({"x.weight": numbers(2), "loss.x": numbers(1)})
    with pytest.raises(ValueError, match=r"20 unknown: .* and 12 more"):
        MAP.load(THEIRS | {f"n{i}": numbers(1) for i in range(20)})


def test_extras_are_passed_over_in_loading() -> None:
    carried = THEIRS | {"position_ids": numbers(3), "loss.discriminator.main.0.weight": numbers(3)}
    assert MAP.load(carried).keys() == {"x.weight", "q", "k"}
    assert MAP.is_extra("loss.logvar") and not MAP.is_extra("qk")


def test_tensors_are_fetched_when_they_are_asked_for() -> None:
    asked: list[str] = []

    class Watched(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            asked.append(name)
            return super().__getitem__(name)

    theirs = Watched(THEIRS)
    lazy = MAP.loading(theirs)
    assert list(lazy) == ["x.weight", "q", "k"] and len(lazy) == 3 and "q" in lazy and asked == []
    assert lazy["k"].tolist() == [2, 3] and asked == ["qk"]
    assert list(MAP.saving(lazy)) == ["y.w", "qk"] and asked == ["qk"]


def test_a_map_is_moved_behind_a_prefix() -> None:
    moved = MAP.prefixed("m.")
    assert moved.theirs == ("m.y.w", "m.qk") and moved.ours == MAP.ours
    assert moved.is_extra("m.loss.x") and not moved.is_extra("loss.x")
    assert moved.fits({"m.y.w", "m.qk", "other"}) and not moved.fits({"m.y.w"}) and not moved.fits(MAP.theirs)


def test_a_name_stands_in_one_row() -> None:
    with pytest.raises(ValueError, match="1 of our names in several rows: a;"):
        KeyMap((Row(("a",), "x"), Row(("b", "a"), "y")))
    with pytest.raises(ValueError, match="1 of their names in several rows: x;"):
        KeyMap((Row(("a",), "x"), Row(("b",), "x")))
