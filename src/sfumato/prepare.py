"""A loaded network made ready to denoise on a CPU: the same numbers to rounding, in less time.

`prepare(net)` puts faster ways to compute in the place of some modules' `forward` and returns what takes them away
again. Parameters stay where and what they are, so files, adapters and training see nothing of it. What is kept
(packed kernels, joined weights, keys and values of a context) knows the weights that it was made from and is made anew
when they are others. With gradients on, under torch.compile, on other devices, and where hooks listen to a part, the
modules compute as they always do.

B batch, C channels, H W height and width, L tokens, K tokens of the context, D width, N heads, E width of the time.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.kernels import attention, available, geglu, group_norm
from sfumato.models.layers import GEGLU, Attention, GroupNorm, ResnetBlock2D, pixels_to_tokens, tokens_to_pixels
from sfumato.models.unet import UNet
from sfumato.runtime import cpu_has_tiles

VARIABLE = "SFUMATO_PREPARE"
CONTEXTS = 4  # whose keys and values an attention keeps: prompt and negative prompt, together or apart, and two others
# Pixels of all pictures up to which the layout of a convolution's weights costs more than a copy of them is worth.
FEW_PIXELS, FEW_PIXELS_WITH_TILES = 512, 16384
M = TypeVar("M", bound=nn.Module)
Stamp = tuple[tuple[int, int, int], ...]


def prepare(net: nn.Module, only: Sequence[str] | None = None) -> Callable[[], None]:
    """Let a network's modules compute in faster ways; returns the function that undoes it.

    only: names of `WAYS`; all by default. Nothing is done where it was done before, and none with SFUMATO_PREPARE=off.
    Raises ValueError for an unknown name.
    """
    names = tuple(WAYS) if only is None else tuple(only)
    unknown = [name for name in names if name not in WAYS]
    if unknown:
        raise ValueError(f"unknown preparation {unknown[0]!r}; known: {', '.join(WAYS)}")
    if os.environ.get(VARIABLE) == "off":
        return lambda: None
    changed: list[tuple[nn.Module, str]] = []
    for module in list(net.modules()):
        for name in names:
            kind, attribute, way = WAYS[name]
            if type(module) is kind and attribute not in module.__dict__ and way.fits(module):
                object.__setattr__(module, attribute, way(module))
                changed.append((module, attribute))

    def undo() -> None:
        for module, attribute in changed:
            module.__dict__.pop(attribute, None)

    return undo


class Way(Generic[M]):
    """A faster way to compute a module. Copies and pickles of it start anew, with nothing kept."""

    def __init__(self, module: M) -> None:
        self.module = module

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the module is of the kind that this way is for."""
        return True

    def plain(self, *args: Any) -> Any:
        """What the module's own class computes."""
        return type(self.module).forward(self.module, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module,)


class Convolution(Way[nn.Conv2d]):
    """A convolution whose weights stay in oneDNN's own layout, where putting them into it each time takes long."""

    def __init__(self, module: nn.Conv2d) -> None:
        super().__init__(module)
        self.made: tuple[Stamp, Tensor, Tensor] | None = None
        self.few = FEW_PIXELS_WITH_TILES if cpu_has_tiles() else FEW_PIXELS

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        assert isinstance(module, nn.Conv2d)
        regular = module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
        return regular and module.kernel_size == (3, 3) and isinstance(module.padding, tuple) and _has_onednn()

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C_out, H', W')."""
        return self.biased(x, self.module.bias)

    def biased(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with a bias of its own."""
        conv = self.module
        few = x.ndim == 4 and x.shape[0] * x.shape[2] * x.shape[3] <= self.few * conv.stride[0] * conv.stride[1]
        free = few and quick(x, conv.weight) and unwatched(conv) and onednn_takes(x.dtype)
        if not free or not x.is_contiguous(memory_format=torch.channels_last):
            return conv._conv_forward(x, conv.weight, bias)
        assert isinstance(conv.padding, tuple)
        form = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
        now = stamp(conv.weight)
        if self.made is None or self.made[0] != now:
            packed = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *form, list(x.shape))
            self.made = now, packed, conv.weight
        return torch.ops.mkldnn._convolution_pointwise(x, self.made[1], bias, *form, "none", [], "")


class Residual(Way[ResnetBlock2D]):
    """A residual block that adds the time to the bias of its first convolution instead of to a picture.

    For one time for all pictures, (1, E); the sum with x is written over the second convolution's answer.
    """

    def __call__(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (1 or B, E) -> (B, C_out, H, W)."""
        block = self.module
        if not quick(x, block.conv1.weight) or not unwatched(block.conv1, block.conv2):
            return self.plain(x, temb)
        h = block.norm1(x)
        if block.time_emb_proj is None or temb is None:
            h = block.conv1(h)  # (B, C_out, H, W)
        elif len(temb) == 1 and block.conv1.bias is not None:
            shift = block.time_emb_proj(F.silu(temb))[0] + block.conv1.bias  # (C_out,)
            way = block.conv1.__dict__.get("forward")
            biased = way.biased if isinstance(way, Convolution) else None
            h = biased(h, shift) if biased else block.conv1._conv_forward(h, block.conv1.weight, shift)
        else:
            h = block.conv1(h).add_(block.time_emb_proj(F.silu(temb))[:, :, None, None])
        h = block.conv2(block.norm2(h)).add_(x if block.conv_shortcut is None else block.conv_shortcut(x))
        return h if block.out_scale == 1.0 else h.div_(block.out_scale)


class Time(Way[UNet]):
    """The time embedding of one row, (1, E), where all pictures are at the same time."""

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The U-Net's own, of fewer rows."""
        if quick(x, self.module.conv_in.weight) and isinstance(t, Tensor) and t.ndim == 1 and bool((t == t[0]).all()):
            return UNet._time(self.module, x[:1], t[:1])
        return UNet._time(self.module, x, t)


class Joined(Way[Attention]):
    """Attention with queries, keys and values of a picture in one product, and those of a context computed once."""

    def __init__(self, module: Attention) -> None:
        super().__init__(module)
        self.made: tuple[Stamp, Tensor, Tensor | None, list[Tensor]] | None = None
        self.contexts: list[tuple[Tensor, Stamp, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, L, D) or (B, C, H, W) -> the same."""
        own = self.module
        parts = own.to_q, own.to_k, own.to_v
        if not quick(x, own.to_q.weight) or own.identity or not unwatched(*parts):
            return self.plain(x, context)
        if own.group_norm is not None:
            h = self._attend(*self._joined(pixels_to_tokens(own.group_norm(x))))  # (B, L, D)
            return x + tokens_to_pixels(h, x)
        if context is None:
            return self._attend(*self._joined(x))
        return self._attend(self._heads(own.to_q(x)), *self._told(context))

    def _joined(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a picture's own tokens: 3 x (B, N, L, D / N)."""
        parts = self.module.to_q, self.module.to_k, self.module.to_v
        weights: list[Tensor] = [part.weight for part in parts]
        biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
        now = stamp(*weights, *biases)
        if self.made is None or self.made[0] != now:
            self.made = now, torch.cat(weights), torch.cat(biases) if biases else None, [*weights, *biases]
        qkv = F.linear(x, self.made[1], self.made[2]).unflatten(-1, (3, self.module.heads, -1))  # (B, L, 3, N, D / N)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return q, k, v

    def _told(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a context, 2 x (B, N, K, D / N), kept for as long as it and the weights stay."""
        key, value = self.module.to_k, self.module.to_v
        now = stamp(context, key.weight, value.weight, *(p.bias for p in (key, value) if p.bias is not None))
        for kept, then, k, v in self.contexts:
            if kept is context and then == now:
                return k, v
        k, v = (self._heads(part(context)) for part in (key, value))
        self.contexts = [entry for entry in self.contexts if entry[0] is not context][1 - CONTEXTS :]
        self.contexts.append((context, now, k, v))
        return k, v

    def _heads(self, h: Tensor) -> Tensor:
        return h.unflatten(-1, (self.module.heads, -1)).transpose(1, 2)  # (B, N, L, D / N)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = self.module
        if own.upcast or own.sliced is not None:
            kind = torch.float32 if own.upcast else v.dtype
            h = own._attended(q.to(kind), k.to(kind), v.to(kind)).to(v.dtype)
        else:
            h = attention(q, k, v)  # (B, N, L, D / N)
        return own.to_out[0](h.transpose(1, 2).flatten(2))  # (B, L, D)


class Gated(Way[GEGLU]):
    """GEGLU by the compiled kernel; with AMX in bfloat16 as two products that oneDNN ends with GELU and with `*`."""

    def __init__(self, module: GEGLU) -> None:
        super().__init__(module)
        self.made: tuple[Stamp, list[Tensor], list[Tensor]] | None = None
        self.tiles = cpu_has_tiles() and _has_onednn() and onednn_takes(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, hidden)."""
        proj = self.module.proj
        if not quick(x, proj.weight):
            return self.plain(x)
        if self.tiles and x.dtype == torch.bfloat16 and unwatched(proj):
            return self.in_tiles(x)
        if available() is not None:
            return geglu(proj(x))
        h, gate = proj(x).chunk(2, dim=-1)  # 2 x (B, L, hidden)
        return F.gelu(gate).mul_(h)

    def in_tiles(self, x: Tensor) -> Tensor:
        """h * gelu(gate), both halves of the weights packed; no number goes to memory but the gate and the answer."""
        proj = self.module.proj
        now = stamp(proj.weight, proj.bias)
        if self.made is None or self.made[0] != now:
            rows = x.shape[:-1].numel()
            halves = [torch.ops.mkldnn._reorder_linear_weight(w.contiguous(), rows) for w in proj.weight.chunk(2)]
            self.made = now, [*halves, *proj.bias.chunk(2)], [proj.weight, proj.bias]
        to_h, to_gate, h_bias, gate_bias = self.made[1]
        gate = torch.ops.mkldnn._linear_pointwise(x, to_gate, gate_bias, "gelu", [], "none")
        return torch.ops.mkldnn._linear_pointwise.binary(x, gate, to_h, h_bias, "mul")


class Normed(Way[GroupNorm]):
    """Group norm and SiLU in one pass of the compiled kernel."""

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        own = self.module
        taken = x.dtype == own.weight.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
        if not taken or not quick(x, own.weight) or available() is None:
            return self.plain(x)
        return group_norm(x, own.num_groups, own.weight, own.bias, own.eps, own.silu)


# Name -> the module's class, the attribute in whose place the way stands, the way.
WAYS: dict[str, tuple[type[nn.Module], str, type[Way[Any]]]] = {
    "convolutions": (nn.Conv2d, "forward", Convolution),
    "residuals": (ResnetBlock2D, "forward", Residual),
    "time": (UNet, "_time", Time),
    "attention": (Attention, "forward", Joined),
    "geglu": (GEGLU, "forward", Gated),
    "norms": (GroupNorm, "forward", Normed),
}


def quick(x: Tensor, weight: Tensor) -> bool:
    """Whether the faster ways are for these: on a CPU, of one dtype, with no gradients and no tracing."""
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def unwatched(*modules: nn.Module) -> bool:
    """Whether modules are PyTorch's own and nobody listens to them, so that another may compute what they would."""
    return all(
        type(module) in (nn.Linear, nn.Conv2d) and not module._forward_hooks and not module._forward_pre_hooks
        for module in modules
    )


def stamp(*tensors: Tensor) -> Stamp:
    """What tells whether tensors are what they were: which, where their numbers lie, how often they were changed."""
    return tuple((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


@functools.cache
def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN has packed weights of this dtype on this processor."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _has_onednn() -> bool:
    names = "_reorder_convolution_weight", "_convolution_pointwise", "_reorder_linear_weight", "_linear_pointwise"
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
