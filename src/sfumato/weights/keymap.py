"""Invertible tables between the names of two checkpoint layouts: read left to right to load, right to left to save.

"Ours" are the parameter names of this package's modules, which are those of the diffusers folder layout; "theirs"
are the names in the other file. A name that stands in no row is an error, so nothing is dropped in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor

from sfumato.models.config import check_choice

NAMES = 8  # names listed in an error before "and n more"
# Trailing axes of length 1 that theirs has where ours is a plain matrix.
AXES: Mapping[str, int] = {"": 0, "conv1d": 1, "conv1x1": 2, "transposed": 0, "swapped": 0}


@dataclass(frozen=True)
class Row:
    """One tensor of theirs and the tensor of ours that it is, or the several that it joins along axis 0.

    shape: "" as it is; "conv1x1" theirs is (O, I, 1, 1) for our (O, I); "conv1d" theirs is (O, I, 1);
    "transposed" theirs is (I, O); "swapped" theirs has the second half of our rows before the first.
    heads: with several `ours`, 0 when they follow one another whole; otherwise they are cut into this many parts
    and theirs has the first part of each, then the second of each, and so on.
    """

    ours: tuple[str, ...]
    theirs: str
    shape: str = ""
    heads: int = 0

    def __post_init__(self) -> None:
        check_choice(f"Row {self.theirs}: shape", self.shape, tuple(AXES))

    def load(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Theirs to ours: views of the same storage, except for parts that stand head by head.

        Raises ValueError when the shape does not allow it.
        """
        swaps = self.shape == "swapped"
        axes, count = AXES[self.shape], 2 if swaps else len(self.ours) * max(self.heads, 1)
        flat = swaps or not self.shape or (tensor.ndim == 2 + axes and tensor.shape[2:].numel() == 1)
        divides = count == 1 or (tensor.ndim > 0 and tensor.shape[0] % count == 0)
        if not (flat and divides):
            raise ValueError(
                f"{self.theirs} of shape {tuple(tensor.shape)} cannot become {', '.join(self.ours)}; "
                f"expected {self._expected(count)}: the file is of another kind than its names say"
            )
        if swaps:
            return (swapped(tensor),)
        tensor = tensor.T if self.shape == "transposed" else tensor.flatten(1) if axes else tensor
        if len(self.ours) == 1:
            return (tensor,)
        if not self.heads:
            return tensor.chunk(len(self.ours))
        parts = tensor.unflatten(0, (self.heads, len(self.ours), -1))  # (N, parts, O / N, ...)
        return tuple(part.flatten(0, 1) for part in parts.unbind(1))  # parts x (O, ...)

    def save(self, tensors: Sequence[Tensor]) -> Tensor:
        """Ours to theirs, the inverse of `load`: a view of the same storage unless several are joined."""
        if len(tensors) == 1:
            (tensor,) = tensors
        elif not self.heads:
            tensor = torch.cat(list(tensors))
        else:
            tensor = torch.stack([t.unflatten(0, (self.heads, -1)) for t in tensors], dim=1).flatten(0, 2)
        if self.shape == "transposed":
            return tensor.T
        if self.shape == "swapped":
            return swapped(tensor)
        return tensor[(..., *(None,) * AXES[self.shape])]

    def _expected(self, count: int) -> str:
        if self.shape == "transposed":
            return "(I, O)"
        rows = "O" if count == 1 else f"multiple of {count}"
        if self.shape in ("", "swapped"):
            return f"({rows}, ...)"
        return f"({rows}, {', '.join(('I', *('1',) * AXES[self.shape]))})"


def swapped(tensor: Tensor) -> Tensor:
    """The second half of the rows before the first."""
    return torch.cat(tensor.chunk(2)[::-1])


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each fetched when it is asked for and not kept."""

    def __init__(self, fetch: Mapping[str, Callable[[], Tensor]]) -> None:
        self._fetch = fetch

    def __getitem__(self, name: str) -> Tensor:
        return self._fetch[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._fetch

    def __iter__(self) -> Iterator[str]:
        return iter(self._fetch)

    def __len__(self) -> int:
        return len(self._fetch)


@dataclass(frozen=True)
class KeyMap:
    """The rows for one component.

    extras: patterns (`*` stands for anything) of names that files of this kind may carry beside the rows and that
    no module needs; loading passes over them, saving does not write them.
    Raises ValueError when a name stands in two rows.
    """

    rows: tuple[Row, ...]
    extras: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for side, names in (("our", self.ours), ("their", self.theirs)):
            twice = sorted(name for name, n in Counter(names).items() if n > 1)
            if twice:
                raise ValueError(f"key map: {listed(f'of {side} names in several rows', twice)}; each may stand in one")

    @property
    def ours(self) -> tuple[str, ...]:
        """The names of this package's side."""
        return tuple(name for row in self.rows for name in row.ours)

    @property
    def theirs(self) -> tuple[str, ...]:
        """The names of the other side, without extras."""
        return tuple(row.theirs for row in self.rows)

    def load(self, theirs: Mapping[str, Tensor], source: str = "the given weights") -> dict[str, Tensor]:
        """Their tensors under our names and in our shapes, sharing storage where nothing has to be rearranged.

        source: what an error calls the tensors.
        Raises ValueError listing the names that are missing or unknown, or naming a shape that does not fit.
        """
        return dict(self.loading(theirs, source))

    def save(self, ours: Mapping[str, Tensor], source: str = "the given weights") -> dict[str, Tensor]:
        """Our tensors under their names and in their shapes: the inverse of `load`, with the same errors."""
        return dict(self.saving(ours, source))

    def loading(self, theirs: Mapping[str, Tensor], source: str = "the given weights") -> LazyTensors:
        """As `load`, but only names are read now; a tensor is touched when it is asked for."""
        self._check(theirs, self.theirs, self.extras, source)

        def part(row: Row, i: int) -> Tensor:
            return row.load(theirs[row.theirs])[i]

        return LazyTensors({name: partial(part, row, i) for row in self.rows for i, name in enumerate(row.ours)})

    def saving(self, ours: Mapping[str, Tensor], source: str = "the given weights") -> LazyTensors:
        """As `save`, but only names are read now; a tensor is touched when it is asked for."""
        self._check(ours, self.ours, (), source)

        def whole(row: Row) -> Tensor:
            return row.save([ours[name] for name in row.ours])

        return LazyTensors({row.theirs: partial(whole, row) for row in self.rows})

    def fits(self, names: Collection[str]) -> bool:
        """Whether every name that `load` needs is there."""
        return all(row.theirs in names for row in self.rows)

    def is_extra(self, name: str) -> bool:
        """Whether `load` passes over this name."""
        return any(fnmatchcase(name, pattern) for pattern in self.extras)

    def renamed(self, rename: Callable[[str], str]) -> KeyMap:
        """The same rows with each of their names given to `rename`; extras are left out."""
        return KeyMap(tuple(replace(row, theirs=rename(row.theirs)) for row in self.rows))

    def prefixed(self, prefix: str) -> KeyMap:
        """The same rows and extras with `prefix` in front of their names."""
        rows = self.renamed(lambda name: prefix + name).rows
        return KeyMap(rows, tuple(prefix + pattern for pattern in self.extras))

    def _check(self, found: Iterable[str], wanted: Iterable[str], extras: Sequence[str], source: str) -> None:
        names, needed = set(found), set(wanted)
        unknown = [n for n in sorted(names - needed) if not any(fnmatchcase(n, pattern) for pattern in extras)]
        problems = (listed("missing", sorted(needed - names)), listed("unknown", unknown))
        if any(problems):
            raise ValueError(
                f"{source}: names do not fit the key map; {'; '.join(p for p in problems if p)}; "
                "check that the weights are whole and of the kind that the config describes"
            )


def listed(what: str, names: Sequence[str]) -> str:
    """'2 missing: a, b', cut after some names; empty when there are none."""
    if not names:
        return ""
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    shown = (name if name.isprintable() else repr(name) for name in names[:NAMES])
    return f"{len(names)} {what}: {', '.join(shown)}{more}"
