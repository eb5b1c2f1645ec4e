"""Faster ways for what works on tokens: attention, gates, whole transformer blocks.

B batch, C channels, H W height and width, L tokens, K tokens of the context, D width, N heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.kernels import attention, available, geglu, layer_norm
from sfumato.kernels.product import PACKED_UP_TO
from sfumato.models.layers import (
    GEGLU,
    Attention,
    BasicTransformerBlock,
    Transformer2DModel,
    pixels_to_tokens,
    tokens_to_pixels,
)
from sfumato.prepare.way import (
    Stamp,
    Way,
    has_onednn,
    multiplies,
    onednn_takes,
    quick,
    stamp,
    unheard,
    unhooked,
    unwatched,
)
from sfumato.runtime import cpu_has_tiles

CONTEXTS = 4  # whose keys and values an attention keeps: prompt and negative prompt, together or apart, and two others


class Joined(Way[Attention]):
    """Attention with queries, keys and values of a picture in one product, and those of a context computed once.

    Large weights are not joined, which would take their memory again and gain nothing.
    """

    def __init__(self, module: Attention) -> None:
        super().__init__(module)
        self.made: tuple[Stamp, Tensor, Tensor | None, list[Tensor]] | None = None
        self.contexts: list[tuple[Tensor, Stamp, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, L, D) or (B, C, H, W) -> the same."""
        own = self.module
        parts = own.to_q, own.to_k, own.to_v
        free = unwatched(*parts) if context is None else unhooked(*parts)
        if not quick(x, own.to_q.weight) or own.identity or not free:
            return self.plain(x, context)
        if own.group_norm is not None:
            h = self._attend(*self._joined(pixels_to_tokens(own.group_norm(x))))  # (B, L, D)
            return x + tokens_to_pixels(h, x)
        if context is None:
            return self._attend(*self._joined(x))
        return self._attend(self.heads(own.to_q(x)), *self.told(context))

    def _joined(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a picture's own tokens: 3 x (B, N, L, D / N)."""
        parts = self.module.to_q, self.module.to_k, self.module.to_v
        if sum(part.weight.numel() for part in parts) > PACKED_UP_TO:
            q, k, v = (self.heads(part(x)) for part in parts)
            return q, k, v
        weights: list[Tensor] = [part.weight for part in parts]
        biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
        now = stamp(*weights, *biases)
        if self.made is None or self.made[0] != now:
            self.made = now, torch.cat(weights), torch.cat(biases) if biases else None, [*weights, *biases]
        qkv = F.linear(x, self.made[1], self.made[2]).unflatten(-1, (3, self.module.heads, -1))  # (B, L, 3, N, D / N)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return q, k, v

    def told(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a context, 2 x (B, N, K, D / N), kept for as long as it and the weights stay."""
        key, value = self.module.to_k, self.module.to_v
        now = stamp(context, key.weight, value.weight, *(p.bias for p in (key, value) if p.bias is not None))
        for kept, then, k, v in self.contexts:
            if kept is context and then == now:
                return k, v
        k, v = (self.heads(part(context)) for part in (key, value))
        self.contexts = [entry for entry in self.contexts if entry[0] is not context][1 - CONTEXTS :]
        self.contexts.append((context, now, k, v))
        return k, v

    def heads(self, h: Tensor) -> Tensor:
        """(B, L, D) -> (B, N, L, D / N)."""
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
        self.tiles = cpu_has_tiles() and has_onednn() and onednn_takes(torch.bfloat16)

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


class Block(Way[BasicTransformerBlock]):
    """A transformer block of few tokens by our products: with bias, sum and joined weights in one pass each."""

    def __call__(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, L, D), (B, K, D_c) -> (B, L, D)."""
        block = self.module
        one, two = block.attn1, block.attn2
        way = two.__dict__.get("forward")
        if not isinstance(way, Joined) or not self._free(x):
            return self.plain(x, context)
        q, k, v = self._own(one, normed(block.norm1, x))
        x = self._back("one", one.to_out[0], seen(attention(q, k, v)), x)
        q = way.heads(self.product("q", two.to_q.weight).linear(normed(block.norm2, x)))  # (B, N, L, D / N)
        x = self._back("two", two.to_out[0], seen(attention(q, *way.told(context))), x)
        gated, back = block.ff.net[0], block.ff.net[2]
        assert isinstance(gated, GEGLU)
        gate = gated.proj
        h = self.product("gate", gate.weight).linear(normed(block.norm3, x), gate.bias)  # (B, L, 2 hidden)
        return self._back("back", back, geglu(h), x)

    def _free(self, x: Tensor) -> bool:
        """Whether the block is as its class has it, with nobody listening, and of few tokens."""
        block = self.module
        one, two, gate = block.attn1, block.attn2, block.ff.net[0]
        if not quick(x, one.to_q.weight) or not x.is_contiguous() or not isinstance(gate, GEGLU) or block.only_cross:
            return False
        if (
            not multiplies(x.shape[0] * x.shape[1], gate.proj.weight.numel(), x)
            or type(block.ff.net[1]) is not nn.Identity
        ):
            return False
        for attend in (one, two):
            usual = not (attend.identity or attend.upcast or attend.sliced is not None or attend.group_norm is not None)
            if not usual or not unheard(attend) or not unwatched(attend.to_q, attend.to_out[0]):
                return False
        biased = any([layer.bias is not None for layer in (one.to_q, one.to_k, one.to_v, two.to_q)])
        inside = one.to_k, one.to_v, block.norm1, block.norm2, block.norm3, gate.proj, block.ff.net[2]
        heard = not unheard(block.ff, block.ff.net, gate) or not unhooked(two.to_k, two.to_v)
        return not biased and not heard and unwatched(*inside)

    def _own(self, attend: Attention, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the picture's own tokens, 3 x (B, N, L, D / N)."""
        weights = attend.to_q.weight, attend.to_k.weight, attend.to_v.weight
        if sum(weight.numel() for weight in weights) > PACKED_UP_TO:
            each = [self.product(f"own {i}", weight).linear(h) for i, weight in enumerate(weights)]
            q, k, v = (part.unflatten(-1, (attend.heads, -1)).transpose(1, 2) for part in each)
        else:
            whole = self.product("own", *weights).linear(h).unflatten(-1, (3, attend.heads, -1))  # (B, L, 3, N, D / N)
            q, k, v = whole.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _back(self, name: str, layer: nn.Module, h: Tensor, x: Tensor) -> Tensor:
        """A linear layer, added to x."""
        assert isinstance(layer, nn.Linear)
        return self.product(name, layer.weight).linear(h, layer.bias, x)


class Tokens(Way[Transformer2DModel]):
    """The projections around transformer blocks by our products, the last with the sum in the same pass."""

    def __call__(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        own = self.module
        before, after = own.proj_in, own.proj_out
        rows = x.shape[0] * x.shape[2] * x.shape[3]
        free = quick(x, before.weight) and unwatched(before, after) and multiplies(rows, before.weight.numel(), x)
        if not free or not x.is_contiguous(memory_format=torch.channels_last):
            return self.plain(x, context)
        h = pixels_to_tokens(own.norm(x).contiguous(memory_format=torch.channels_last))  # (B, L, C)
        h = self.product("in", before.weight).linear(h, before.bias)
        for block in own.transformer_blocks:
            h = block(h, context)  # (B, L, C)
        h = self.product("out", after.weight).linear(h.contiguous(), after.bias, pixels_to_tokens(x))
        return tokens_to_pixels(h, x)


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """A layer norm."""
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


def seen(h: Tensor) -> Tensor:
    """Heads side by side: (B, N, L, D / N) -> contiguous (B, L, D)."""
    return h.transpose(1, 2).flatten(2).contiguous()
