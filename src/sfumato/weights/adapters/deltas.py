"""What an adapter does to one module: the difference that it makes to the module's weight, in a few numbers.

O and I output and input channels, k the kernel axes of a convolution (none for a linear layer), r the rank;
base is the weight without any adapter, (O, I, *k).
LoRA: Hu et al. 2021; LoHa, LoKr and the Tucker forms: Yeh et al. 2023 (LyCORIS); DoRA: Liu et al. 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Take = Callable[[Tensor], Tensor]  # some of the rows of a tensor
# The widths of the text states that the released families read, by which adapters give themselves away.
FAMILIES: Mapping[int, str] = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}


@dataclass(frozen=True)
class LowRank:
    """scale * up @ down, or with a core in the middle (LoRA on convolutions in Tucker form).

    down: (r, I, *k), with a core (r, I). up: (O, r). mid: (r, r, *k) or None. Axes of length 1 may follow.
    """

    down: Tensor
    up: Tensor
    mid: Tensor | None = None
    scale: float = 1.0

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the matrix that it makes: O and I times the kernel."""
        kernel = 1 if self.mid is None else self.mid[0, 0].numel()
        return self.up.shape[0], self.down[0].numel() * kernel

    def dense(self, base: Tensor, strength: float) -> Tensor:
        """The difference times `strength`: a new tensor shaped and placed as `base`, in float32 at least."""
        # The factors are small: whatever is done to them instead of to their product costs nothing.
        up = strength * self.scale * wide(self.up, base).flatten(1)  # (O, r)
        down = wide(self.down, base).flatten(1)  # (r, I k)
        if self.mid is None:
            return (up @ down).reshape(base.shape)
        return torch.einsum("or,rs...,si->oi...", up, wide(self.mid, base), down).reshape(base.shape)


@dataclass(frozen=True)
class Hadamard:
    """LoHa: the product, entry by entry, of two low-rank matrices (Yeh et al. 2023, equation 5).

    left, right: factors (O, r) and (r, I k) of each; with cores (r, r, *k) they are (r, O) and (r, I).
    """

    left: tuple[Tensor, Tensor]
    right: tuple[Tensor, Tensor]
    cores: tuple[Tensor, Tensor] | None = None
    scale: float = 1.0

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the matrix that it makes: O and I times the kernel."""
        a, b = self.left
        if self.cores is None:
            return a.shape[0], b[0].numel()
        return a.shape[1], b.shape[1] * self.cores[0][0, 0].numel()

    def dense(self, base: Tensor, strength: float) -> Tensor:
        """The difference times `strength`: a new tensor shaped and placed as `base`, in float32 at least."""
        cores = (None, None) if self.cores is None else self.cores
        factor = strength * self.scale
        one = product(factor * wide(self.left[0], base), self.left[1], cores[0], base)  # (O, I k) or (O, I, *k)
        two = product(self.right[0], self.right[1], cores[1], base)
        return one.mul_(two).reshape(base.shape)


@dataclass(frozen=True)
class Kronecker:
    """LoKr: the Kronecker product of two matrices, each whole or in low-rank factors (Yeh et al. 2023, equation 6).

    left: (a, c) or factors (a, r), (r, c). right: (b, d, *k) or factors (b, r), (r, d k); with a core (r, r, *k)
    the factors of `right` are (r, b) and (r, d). O = a b, I = c d.
    """

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    core: Tensor | None = None
    scale: float = 1.0

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the matrix that it makes: O and I times the kernel."""
        a, c = self.left[0].shape[0], self.left[-1][0].numel()
        if self.core is not None:
            b, d = self.right[0].shape[1], self.right[1].shape[1] * self.core[0, 0].numel()
        else:
            b, d = self.right[0].shape[0], self.right[-1][0].numel()
        return a * b, c * d

    def dense(self, base: Tensor, strength: float) -> Tensor:
        """The difference times `strength`: a new tensor shaped and placed as `base`, in float32 at least."""
        left, right = self.left, self.right
        one = wide(left[0], base) if len(left) == 1 else product(left[0], left[1], None, base)  # (a, c)
        two = wide(right[0], base) if len(right) == 1 else product(right[0], right[1], self.core, base)
        one, two = strength * self.scale * one.flatten(1), two.flatten(1).contiguous()  # (a, c), (b, d k)
        return torch.kron(one, two).reshape(base.shape)


@dataclass(frozen=True)
class Full:
    """The difference itself, (O, I, *k), or (D,) for a norm."""

    difference: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the matrix that it makes: O and I times the kernel."""
        return self.difference.shape[0], self.difference[0].numel()

    def dense(self, base: Tensor, strength: float) -> Tensor:
        """The difference times `strength`: a new tensor shaped and placed as `base`, in float32 at least."""
        return (strength * wide(self.difference, base)).reshape(base.shape)


@dataclass(frozen=True)
class Taken:
    """Some rows of a difference that has no factor whose rows are its own; `rows` of them are taken by `take`."""

    whole: Kronecker
    take: Take
    rows: int

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the matrix that it makes: O and I times the kernel."""
        return self.rows, self.whole.size[1]

    def dense(self, base: Tensor, strength: float) -> Tensor:
        """The difference times `strength`: a new tensor shaped and placed as `base`, in float32 at least."""
        return self.take(self.whole.dense(base.new_empty(self.whole.size), strength)).reshape(base.shape)


Delta = LowRank | Hadamard | Kronecker | Full | Taken


@dataclass(frozen=True)
class Magnitude:
    """DoRA: lengths that the rows of base + difference are brought to (Liu et al. 2024, equation 5).

    lengths: (O), one a row, or with on_input (I), one a column, as early LyCORIS files have it.
    inside:  how a strength other than 1 is meant. True, PEFT's rule: it scales the low-rank difference before the
             rows are brought to their lengths. False, the rule of programs that read `dora_scale`: it scales the
             way from the base to the finished weight.
    """

    lengths: Tensor
    on_input: bool = False
    inside: bool = False

    def difference(self, base: Tensor, delta: Delta | None, strength: float) -> Tensor:
        """What is added to `base` (O, I, *k), on its way to its lengths in the direction that `delta` gives it."""
        base = base.to(torch.promote_types(base.dtype, torch.float32))
        target = base if delta is None else delta.dense(base, strength if self.inside else 1.0).add_(base)
        kept = 1 if self.on_input else 0
        axes = [axis for axis in range(base.ndim) if axis != kept]
        norms = torch.linalg.vector_norm(target, dim=axes, keepdim=True)
        # A row of zeros has no direction and stays one.
        norms = norms.clamp(min=torch.finfo(norms.dtype).tiny)
        lengths = wide(self.lengths, base).reshape(norms.shape)
        return (1.0 if self.inside else strength) * (lengths / norms * target - base)


@dataclass(frozen=True)
class Change:
    """All that one adapter does to one module: to its weight and, seldom, to its bias.

    bias: (O,), added to the module's own times the strength.
    """

    delta: Delta | None = None
    magnitude: Magnitude | None = None
    bias: Tensor | None = None

    def difference(self, base: Tensor, strength: float) -> Tensor:
        """What is added to the weight `base`: a new tensor shaped and placed as `base`, in float32 at least.

        Raises ValueError when it has to do with the bias alone.
        """
        if self.magnitude is not None:
            return self.magnitude.difference(base, self.delta, strength)
        if self.delta is None:
            raise ValueError("this change has nothing to do with the weight")
        return self.delta.dense(base, strength)

    def taking(self, take: Take) -> Change:
        """The same for some of the module's rows, which `take` picks from a tensor of as many rows.

        Raises ValueError for DoRA with one length a column, which holds for all rows together.
        """
        magnitude = self.magnitude
        if magnitude is not None and magnitude.on_input:
            raise ValueError("has DoRA lengths by columns, which cannot be cut into the rows of several modules")
        return Change(
            None if self.delta is None else taken(self.delta, take),
            None if magnitude is None else replace(magnitude, lengths=take(magnitude.lengths)),
            None if self.bias is None else take(self.bias),
        )

    def misfit(self, weight: Tensor, bias: Tensor | None) -> str:
        """Why it does not fit a module with this weight and bias; "" where it does."""
        rows = weight.shape[0]
        size = rows, weight.numel() // rows
        if self.delta is not None and self.delta.size != size:
            return f"{shape_text(self.delta.size)} instead of {shape_text(size)}"
        if self.magnitude is not None:
            wanted = weight.shape[1] if self.magnitude.on_input else rows
            if self.magnitude.lengths.numel() != wanted:
                return f"{self.magnitude.lengths.numel()} DoRA lengths instead of {wanted}"
        if self.bias is not None and self.bias.numel() != (rows if bias is None else bias.numel()):
            return f"bias of {self.bias.numel()} instead of {rows}"
        return ""


def taken(delta: Delta, take: Take) -> Delta:
    """The rows of a difference that `take` picks."""
    if isinstance(delta, LowRank):
        return replace(delta, up=take(delta.up))
    if isinstance(delta, Full):
        return Full(take(delta.difference))
    if isinstance(delta, Hadamard):
        (a, b), (c, d), tucker = delta.left, delta.right, delta.cores is not None
        left, right = (take(t.T).T if tucker else take(t) for t in (a, c))
        return replace(delta, left=(left, b), right=(right, d))
    assert isinstance(delta, Kronecker)
    return Taken(delta, take, len(take(torch.empty(delta.size[0], 0))))


def product(a: Tensor, b: Tensor, core: Tensor | None, like: Tensor) -> Tensor:
    """a @ b, or in Tucker form: core (r, r, *k) with a (r, O) and b (r, I) gives (O, I, *k)."""
    a, b = wide(a, like), wide(b, like).flatten(1)
    if core is None:
        return a @ b
    return torch.einsum("rs...,ro,si->oi...", wide(core, like), a, b)


def wide(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` on the device of `like`, in float32, or in float64 when that is what `like` has."""
    return tensor.to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))


def shape_text(size: tuple[int, int]) -> str:
    """(320, 768) as "320x768"."""
    return f"{size[0]}x{size[1]}"
