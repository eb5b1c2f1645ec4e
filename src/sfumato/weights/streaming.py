"""Weights that are ready only while they are needed, and otherwise stay in their file.

A network is opened with its weights as the file has them: views of the mapped file, in the file's dtype, which take
no memory. A `Residence` then has each module's large weights converted when the module is called. Streamed, they go
after that call; else they stay until another stage of the work begins. The pages that were read go back to the system
at once. Small weights (norms, biases, tables of positions) are converted once and stay.

Parameters keep their names, and the numbers that a network computes with are the same as if it had been converted as
a whole. What is put on a weight (`Home.dress`) is put on whenever the weight comes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.weights.mapped import FileRanges, release, trim
from sfumato.weights.packed import Packed

SMALL = 2**18  # numbers of a tensor; with fewer it stays
ALIGNED = 64  # bytes: where PyTorch's own tensors begin, and where kernels are quickest
Dress = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """What weights become: where, in which dtype, and whether kernels of convolutions are channels-last."""

    device: torch.device
    dtype: torch.dtype
    channels_last: bool

    def like(self, stored: Tensor) -> Tensor:
        """A tensor on `meta` with the dtype and strides of a stored one when it is ready."""
        dtype = self.dtype if stored.is_floating_point() else stored.dtype
        turned = self.channels_last and stored.ndim == 4
        turned = turned and not stored.is_contiguous(memory_format=torch.channels_last)
        kind = torch.channels_last if turned else torch.preserve_format
        return torch.empty_like(stored, dtype=dtype, device="meta", memory_format=kind)


class Scratch:
    """Memory on the CPU that one module's weights are converted into after the other's."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._taken = 0

    def clear(self, needed: int) -> None:
        """Begin anew, with room for so many bytes."""
        self._taken = 0
        if self._memory.numel() < needed:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old one goes first
            self._memory = torch.empty(needed, dtype=torch.uint8)

    def take(self, like: Tensor) -> Tensor:
        """Memory for a tensor of this shape, dtype and these strides."""
        size = nbytes(like)
        raw = self._memory[self._taken : self._taken + size].view(like.dtype)
        self._taken += rounded(size)
        return raw.as_strided(like.shape, like.stride())

    def drop(self) -> None:
        """Give the memory back."""
        self.clear(0)
        self._memory = torch.empty(0, dtype=torch.uint8)


class Home:
    """A module's own weights: where they are stored, and what is computed with while the module is called.

    target: what they become. Found on the module as `module._home`, see `home_of`.
    """

    def __init__(self, module: nn.Module, owner: Residence, stage: str, target: Target) -> None:
        self.module, self.target = module, target
        self._owner, self._stage = owner, stage
        self._stored = dict(own_tensors(module))
        self._large = [name for name, tensor in self._stored.items() if tensor.numel() >= owner.smallest]
        self._placed: dict[str, Tensor] = {}
        self._dressed: dict[str, Dress] = {}
        self._here = False
        self._handles: list[Any] = []
        if self._large:
            self._handles.append(module.register_forward_pre_hook(self._arrive))
            self._handles.append(module.register_forward_hook(self._depart, always_call=True))

    @property
    def largest(self) -> int:
        """Bytes of the large weights when they are ready."""
        return sum(rounded(nbytes(self.target.like(self._stored[name]))) for name in self._large)

    def dress(self, name: str, change: Dress) -> None:
        """Put `change` on a weight whenever it is made ready; it gets and gives a tensor as `target` says."""
        self.leave()
        self._dressed[name] = change
        if name not in self._large:
            self.settle()

    def undress(self) -> None:
        """Take off what `dress` put on."""
        self.leave()
        small = [name for name in self._dressed if name not in self._large]
        self._dressed.clear()
        if small:
            self.settle()

    def settle(self, target: Target | None = None) -> None:
        """Make the small weights ready, anew where something about them changed."""
        self.leave()
        self.target = target or self.target
        for name in self._stored.keys() - set(self._large):
            self._place(name, None)

    def restore(self) -> None:
        """Put everything back as it was stored."""
        self._return(list(self._stored))
        self._here = False

    def leave(self) -> None:
        """Let the large weights go; their file's pages go with them."""
        if self._here:
            self._return(self._large)
            self._here = False

    def release(self) -> None:
        """Hand back the file's pages of everything that is stored."""
        for tensor in self._stored.values():
            self._owner.release(tensor)

    def close(self) -> None:
        """As `restore`, for good; weights that have to be unpacked are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.restore()
        for name, tensor in self._stored.items():
            if isinstance(tensor, Packed):
                table(self.module, name)[name] = nn.Parameter(tensor.unpack(), requires_grad=False)
        del self.module._home

    def _arrive(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._owner.turn(self._stage)
        if not self._here and not self._looks_up():
            self._bring(torch.is_grad_enabled())
        if isinstance(module, nn.Embedding):
            return tuple(arg.to(module.weight.device) for arg in args)
        return None

    def _depart(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        if self._owner.stream:
            self.leave()
        if isinstance(module, nn.Embedding) and isinstance(out, Tensor):
            return out.to(self.target.device, self.target.dtype)
        return None

    def _looks_up(self) -> bool:
        """Whether rows are read from the stored table, and only they are converted."""
        if not isinstance(self.module, nn.Embedding) or not self._owner.stream or self._dressed:
            return False
        weight = self.module.weight
        return not isinstance(weight, Packed) and weight.dtype.itemsize > 1

    @torch.inference_mode(False)
    @torch.no_grad()
    def _bring(self, gradients: bool) -> None:
        # Scratch belongs to one module at a time, and what autograd keeps must not be overwritten.
        alone = self._owner.stream and self.target.device.type == "cpu" and not any(self.module.children())
        scratch = self._owner.scratch if alone and not gradients else None
        if scratch is not None:
            scratch.clear(self.largest)
        for name in self._large:
            self._place(name, scratch)
        self._here = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def _place(self, name: str, scratch: Scratch | None) -> None:
        stored, tensors = self._stored[name], table(self.module, name)
        if tensors[name] is not stored and tensors[name] is not self._placed.get(name):
            return  # somebody put in another one, which is theirs to take out
        ready = self._ready(stored, scratch)
        if name in self._dressed:
            ready = self._dressed[name](ready)
        placed = nn.Parameter(ready, requires_grad=False) if name in self.module._parameters else ready
        tensors[name] = self._placed[name] = placed

    def _ready(self, stored: Tensor, scratch: Scratch | None) -> Tensor:
        like, device = self.target.like(stored), self.target.device
        source = stored.unpack() if isinstance(stored, Packed) else stored.data
        if (source.dtype, source.device, source.stride()) == (like.dtype, device, like.stride()):
            return source
        if scratch is None:
            fresh = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
        else:
            fresh = scratch.take(like)
        fresh.copy_(source)
        self._owner.release(source)
        return fresh

    def _return(self, names: Sequence[str]) -> None:
        for name in names:
            tensors = table(self.module, name)
            placed = self._placed.pop(name, None)
            if placed is not None and tensors[name] is placed:
                tensors[name] = self._stored[name]
                if placed.data_ptr() == self._stored[name].data_ptr():
                    self._owner.release(self._stored[name])


class Residence:
    """Networks whose weights come and go. Whoever opens it does not write to their stored weights.

    stages:        networks by the stage of the work that needs them; those of one stage stay together.
    device, dtype: where and in what they compute, whatever their weights are stored in.
    stream:        each module's weights go after its call; False: with the end of their stage.
    channels_last: networks whose kernels of convolutions are laid out so.
    smallest:      numbers from which on a tensor is large.
    dtypes:        networks that compute in another dtype than the rest.
    """

    def __init__(
        self,
        stages: Mapping[str, Sequence[nn.Module]],
        device: torch.device,
        dtype: torch.dtype,
        stream: bool,
        channels_last: Collection[nn.Module] = (),
        smallest: int = SMALL,
        dtypes: Mapping[nn.Module, torch.dtype] = MappingProxyType({}),
    ) -> None:
        self.stream, self.smallest = stream, smallest
        self.scratch = Scratch()
        self._device, self._dtype, self._dtypes = device, dtype, dict(dtypes)
        self._networks: dict[int, nn.Module] = {}
        self._last: set[int] = set()
        self._homes: dict[str, list[Home]] = {}
        self._of: dict[int, list[Home]] = {}
        self._current: str | None = None
        self._files = FileRanges()
        self.add(stages, channels_last)

    def add(self, stages: Mapping[str, Sequence[nn.Module]], channels_last: Collection[nn.Module] = ()) -> None:
        """Have the weights of further networks come and go as well.

        Raises ValueError where those of a network do so already.
        """
        self._files = FileRanges()
        self._last |= {id(network) for network in channels_last}
        for stage, some in stages.items():
            for network in some:
                self._move_in(stage, network)

    def to(
        self,
        device: torch.device,
        dtype: torch.dtype,
        dtypes: Mapping[nn.Module, torch.dtype] = MappingProxyType({}),
    ) -> None:
        """Compute elsewhere, or in another dtype, from now on; dtypes: as when it was opened."""
        self.leave()
        self._device, self._dtype, self._dtypes = device, dtype, dict(dtypes)
        for key, network in self._networks.items():
            target = self._target(network)
            network.runs_in = target.device, target.dtype  # type: ignore[assignment]
            for home in self._of[key]:
                home.settle(target)

    def turn(self, stage: str) -> None:
        """A module of this stage is called: the weights of other stages go."""
        if stage != self._current:
            self.leave()
            self._current = stage

    def leave(self) -> None:
        """Let all large weights go, until they are needed again."""
        for homes in self._homes.values():
            for home in homes:
                home.leave()
        if self._current is not None:
            for home in self._homes.get(self._current, ()):
                home.release()  # what the system read ahead
        self.scratch.drop()
        if self._current is not None:
            trim()
        self._current = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def stored(self) -> Iterator[None]:
        """Everything as it is stored meanwhile, to be written to a file."""
        self.leave()
        homes = [home for some in self._homes.values() for home in some]
        for home in homes:
            home.restore()
        try:
            yield
        finally:
            for home in homes:
                home.settle()
                home.release()

    def close(self) -> None:
        """Put everything back as it was stored, and leave the networks alone from now on."""
        self.leave()
        for homes in self._homes.values():
            for home in homes:
                home.close()
            homes.clear()
        for network in self._networks.values():
            network.__dict__.pop("runs_in", None)

    def release(self, tensor: Tensor) -> None:
        """Hand back the pages of a tensor that is a view of a file; others are left alone."""
        if tensor in self._files:
            release(tensor)

    def _target(self, network: nn.Module) -> Target:
        return Target(self._device, self._dtypes.get(network, self._dtype), id(network) in self._last)

    def _move_in(self, stage: str, network: nn.Module) -> None:
        target = self._target(network)
        self._networks[id(network)] = network
        homes = self._of.setdefault(id(network), [])
        for module in network.modules():
            if home_of(module) is not None:
                raise ValueError(f"the weights of this {type(network).__name__} come and go already; close that first")
            if any(True for _ in own_tensors(module)):
                home = Home(module, self, stage, target)
                module._home = home  # type: ignore[assignment]
                self._homes.setdefault(stage, []).append(home)
                homes.append(home)
                home.settle()
        network.runs_in = target.device, target.dtype  # type: ignore[assignment]


def home_of(module: nn.Module) -> Home | None:
    """Where a module's weights are while they come and go; None for a module of which they are always there."""
    home = module.__dict__.get("_home")
    return home if isinstance(home, Home) else None


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a module itself."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def table(module: nn.Module, name: str) -> dict[str, Any]:
    """Parameters or buffers of a module, wherever the name is."""
    return module._parameters if name in module._parameters else module._buffers


def nbytes(tensor: Tensor) -> int:
    """The bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def rounded(size: int) -> int:
    """Bytes rounded up to where the next tensor may begin."""
    return -(-size // ALIGNED) * ALIGNED
