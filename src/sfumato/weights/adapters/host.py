"""Adapters on a model: put on merged or live, taken off without residue."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sfumato.weights.adapters.deltas import FAMILIES, Change, LowRank, wide
from sfumato.weights.adapters.names import TEXTS, TOWERS, UNET, ModuleNames, Spot, made_for
from sfumato.weights.adapters.read import Adapter
from sfumato.weights.keymap import listed
from sfumato.weights.streaming import Home, home_of

Term = Callable[[nn.Module, Tensor], Tensor]


@dataclass
class Target:
    """A module and what the wanted adapters do to it, with their strengths."""

    module: nn.Module
    changes: list[tuple[Change, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Swap:
    """A parameter that stands in the place of another."""

    module: nn.Module
    name: str
    original: nn.Parameter | None
    placed: nn.Parameter

    def undo(self) -> None:
        """Put the original back, on the device and in the dtype that its place has now.

        Where somebody put in a third parameter meanwhile, that one stays.
        """
        if self.module._parameters.get(self.name) is not self.placed:
            return
        if self.original is not None:
            moved = self.placed.device, self.placed.dtype
            if (self.original.device, self.original.dtype) != moved:
                self.original.data = self.original.data.to(*moved)
        self.module._parameters[self.name] = self.original


class AdapterHost:
    """What is applied to a denoiser and its text encoders, and how to take it off again.

    Merged (the default), each touched weight is replaced by base + sum of differences, computed in float32 and
    rounded once; the originals are kept by reference, which costs nothing while they are mapped from a file.
    Live, the weights stay as they are and each module's output gets the difference's share added: low-rank ones
    as two thin products, the others from the difference itself. Norms and biases, a few numbers each, are replaced
    in either case. Where weights come and go (`streaming.Residence`), they are merged whenever they come.
    Differences of several adapters are each taken from the untouched weights and added up.
    """

    def __init__(self, denoiser: nn.Module, *text_encoders: nn.Module | None) -> None:
        networks = dict(zip(TOWERS, (denoiser, *text_encoders), strict=False))
        self._towers: Mapping[str, nn.Module] = {k: network for k, network in networks.items() if network is not None}
        self._names: ModuleNames | None = None
        self._swaps: list[Swap] = []
        self._hooks: list[RemovableHandle] = []
        self._homes: list[Home] = []
        self._wanted: tuple[tuple[Adapter, float], ...] = ()
        self._live = False

    @property
    def applied(self) -> tuple[tuple[str, float], ...]:
        """Names and strengths of what is applied."""
        return tuple((adapter.name, strength) for adapter, strength in self._wanted)

    @property
    def live(self) -> bool:
        """Whether it is applied live."""
        return self._live and bool(self._wanted)

    @torch.no_grad()
    def apply(self, wanted: Sequence[tuple[Adapter, float]], live: bool = False) -> None:
        """Apply these adapters with these strengths in the place of what is applied; [] takes everything off.

        Taken off, weights are the same parameters as before, bit for bit. Asking for what is applied does nothing.
        Raises ValueError when an adapter has a module or a shape that the model has not; then everything stays as
        it was. When memory runs out in the middle, nothing is applied.
        """
        if self._is(wanted, live):
            return
        targets = self._fit(wanted)
        self._undo()
        try:
            for target in targets:
                self._apply(target, live)
        except BaseException:
            self._undo()
            raise
        self._wanted, self._live = tuple(wanted), live

    def _is(self, wanted: Sequence[tuple[Adapter, float]], live: bool) -> bool:
        """Whether exactly this is applied and nobody has replaced a weight since."""
        same = len(wanted) == len(self._wanted) and (live == self._live or not wanted)
        pairs = zip(wanted, self._wanted, strict=False)
        return (
            same
            and all(a[0] is b[0] and a[1] == b[1] for a, b in pairs)
            and all(s.module._parameters.get(s.name) is s.placed for s in self._swaps)
        )

    def _fit(self, wanted: Sequence[tuple[Adapter, float]]) -> list[Target]:
        """The modules that the adapters change; ValueError when a change has no module that it fits."""
        if self._names is None:
            self._names = ModuleNames(self._towers[UNET], *map(self._towers.get, TEXTS))
        targets: dict[tuple[str, str], Target] = {}
        for adapter, strength in wanted:
            if not math.isfinite(strength):
                raise ValueError(f"adapter {adapter.name!r}: strength {strength}; give a finite number, such as 0.8")
            for place, change in self._places(adapter, self._names).items():
                target = targets.setdefault(place, Target(self._module(place)))
                if strength:
                    target.changes.append((change, strength))
        return [target for target in targets.values() if target.changes]

    def _places(self, adapter: Adapter, names: ModuleNames) -> dict[tuple[str, str], Change]:
        """What an adapter does to each of our modules; ValueError where it does not fit the model."""
        places: dict[tuple[str, str], Change] = {}
        taken: dict[tuple[str, str], str] = {}
        missing, misfits = [], []
        for raw, change in adapter.changes.items():
            spots = names.find(raw)
            if not spots:
                missing.append(raw)
                continue
            for spot in spots:
                if spot.place in taken:
                    raise ValueError(f"{adapter.path}: {taken[spot.place]} and {raw} are two names of the same module")
                taken[spot.place] = raw
            own, problem = self._parted(change, spots)
            places |= own
            if problem:
                misfits.append(f"{raw} {problem}")
        if missing or misfits:
            fitting = len(adapter.changes) - len(missing) - len(misfits)
            raise ValueError(self._complaint(adapter, fitting, missing, misfits))
        return places

    def _parted(self, change: Change, spots: Sequence[Spot]) -> tuple[dict[tuple[str, str], Change], str]:
        """A change by the modules that it is for, and why it does not fit them, "" where it does."""
        own: dict[tuple[str, str], Change] = {}
        for spot in spots:
            try:
                own[spot.place] = part = change if spot.take is None else change.taking(spot.take)
            except ValueError as error:
                return {}, str(error)
            module = self._module(spot.place)
            problem = part.misfit(module.weight, module._parameters.get("bias"))  # type: ignore[arg-type]
            if problem:
                return {}, problem
        return own, ""

    def _complaint(self, adapter: Adapter, fitting: int, missing: list[str], misfits: list[str]) -> str:
        family = made_for(adapter.changes) or self._by_width(adapter)
        towers = "" if len(self._towers) > 1 else "; no text encoder was given"
        problems = [listed("match no module", missing), listed("have another shape", misfits)]
        return (
            f"{adapter.path}: {fitting} of {len(adapter.changes)} modules fit this model"
            + (f"; it looks made for {family}" if family else "")
            + "".join(f"; {problem}" for problem in problems if problem)
            + f"{towers}; nothing was applied, use an adapter that was made for this model"
        )

    def _by_width(self, adapter: Adapter) -> str:
        """The family by the width of the text states that its cross-attention reads."""
        for raw, change in adapter.changes.items():
            if raw.endswith(("attn2_to_k", "attn2.to_k")) and change.delta is not None:
                return FAMILIES.get(change.delta.size[1], "")
        return ""

    def _module(self, place: tuple[str, str]) -> nn.Module:
        return self._towers[place[0]].get_submodule(place[1])

    def _apply(self, target: Target, live: bool) -> None:
        module, changes, home = target.module, target.changes, home_of(target.module)
        weights = [(c, s) for c, s in changes if c.delta is not None or c.magnitude is not None]
        biases = [(c.bias, s) for c, s in changes if c.bias is not None]
        if weights and live and isinstance(module, nn.Linear | nn.Conv2d):
            terms = [_term(module, change, strength) for change, strength in weights]
            self._hooks.append(module.register_forward_hook(partial(_add_terms, terms)))
        elif weights and home is not None:
            self._homes.append(home)
            home.dress("weight", partial(_merged, weights))
        elif weights:
            base = module._parameters["weight"]
            assert base is not None
            self._swap(module, "weight", base, _merged(weights, base))
        if biases:
            old = module._parameters.get("bias")
            like = module.weight if old is None else old
            assert isinstance(like, Tensor)
            total = torch.stack([s * wide(b, like).flatten() for b, s in biases]).sum(0)
            dtype = like.dtype if home is None else home.target.dtype
            self._swap(module, "bias", old, total.to(dtype) if old is None else _sum(total, old))

    def _swap(self, module: nn.Module, name: str, old: nn.Parameter | None, new: Tensor) -> None:
        """Put `new` in the place of `old`."""
        placed = nn.Parameter(new, requires_grad=old is not None and old.requires_grad)
        self._swaps.append(Swap(module, name, old, placed))
        module._parameters[name] = placed

    def _undo(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for home in self._homes:
            home.undress()
        for swap in reversed(self._swaps):
            swap.undo()
        self._hooks, self._homes, self._swaps, self._wanted = [], [], [], ()


def _merged(changes: Sequence[tuple[Change, float]], base: Tensor) -> Tensor:
    """A weight with what the changes add to it, in its dtype and memory layout."""
    total, *others = (change.difference(base, strength) for change, strength in changes)
    for other in others:
        total.add_(other)
    return _sum(total, base)


def _sum(new: Tensor, old: Tensor) -> Tensor:
    """old + new in the dtype and memory layout of `old`; overwrites `new`."""
    new.add_(old)
    return new if (new.dtype, new.stride()) == (old.dtype, old.stride()) else torch.empty_like(old).copy_(new)


def _add_terms(terms: Sequence[Term], module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """A forward hook: the module's output and what the terms make of its input."""
    for term in terms:
        out = out + term(module, args[0])
    return out


def _term(module: nn.Linear | nn.Conv2d, change: Change, strength: float) -> Term:
    """The share of one change in the module's output, as a function of its input."""
    weight, delta = module.weight, change.delta
    if change.magnitude is None and isinstance(delta, LowRank):
        up = strength * delta.scale * wide(delta.up, weight).flatten(1)  # (O, r)
        down = wide(delta.down, weight)
        if isinstance(module, nn.Linear):
            return partial(_thin_linear, [down.flatten(1).to(weight.dtype), up.to(weight.dtype)])
        kernel, last = module.kernel_size, up[:, :, None, None]
        if delta.mid is None:
            convs = [down.reshape(len(down), -1, *kernel), last]  # (r, I, *k)
        else:
            core = wide(delta.mid, weight)
            convs = [down.reshape(len(down), -1, 1, 1), core.reshape(*core.shape[:2], *kernel), last]
        return partial(_thin_conv, [c.to(weight.dtype) for c in convs])
    difference = change.difference(weight, strength).to(weight.dtype)
    return partial(_dense_linear if isinstance(module, nn.Linear) else _dense_conv, [difference])


def _thin_linear(parts: list[Tensor], module: nn.Linear, x: Tensor) -> Tensor:
    down, up = _near(parts, x)
    return F.linear(F.linear(x, down), up)


def _dense_linear(parts: list[Tensor], module: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, _near(parts, x)[0])


def _thin_conv(parts: list[Tensor], module: nn.Conv2d, x: Tensor) -> Tensor:
    first, *middle, last = _near(parts, x)
    h = _strided(module, F.conv2d(x, first), middle[0]) if middle else _strided(module, x, first)
    return F.conv2d(h, last)


def _dense_conv(parts: list[Tensor], module: nn.Conv2d, x: Tensor) -> Tensor:
    return _strided(module, x, _near(parts, x)[0])


def _strided(module: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """The module's convolution with another weight and no bias."""
    return F.conv2d(x, weight, None, module.stride, module.padding, module.dilation)


def _near(parts: list[Tensor], x: Tensor) -> list[Tensor]:
    """The parts where the input is; the model may have been moved since they were made."""
    return [part.to(device=x.device, dtype=x.dtype) for part in parts]
