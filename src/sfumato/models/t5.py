"""The encoder of T5 v1.1 (Raffel et al. 2020, section 2.1; Shazeer 2020), the third text tower of Stable Diffusion 3.

B batch, L tokens, D width, N attention heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.config import check_choice
from sfumato.models.layers import RMSNorm
from sfumato.models.network import Network

# Entries that decide what the encoder says and have one value here; `gelu_new` is the tanh approximation.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("t5",),
    "feed_forward_proj": ("gated-gelu",),
    "dense_act_fn": ("gelu_new",),
    "is_gated_act": (True,),
}


@dataclass(frozen=True)
class T5Config:
    """The entries of `text_encoder_3/config.json` that shape the encoder; defaults are those of T5 v1.1 XXL.

    relative_attention_num_buckets, relative_attention_max_distance: how finely distances between tokens are told
    apart: one by one up to a quarter of the buckets, then in growing steps up to the largest distance.
    """

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    pad_token_id: int = 0
    eos_token_id: int = 1

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> T5Config:
        """Read the entries of a `config.json`; ValueError on an encoder of another kind.

        Options of transformers that do not change what the encoder says are passed over: each version writes others.
        """
        for name, allowed in FIXED.items():
            check_choice(f"T5Config: {name}", raw.get(name, allowed[0]), allowed)
        known = cls.__dataclass_fields__
        return cls(**{name: value for name, value in raw.items() if name in known and value is not None})

    def to_dict(self) -> dict[str, Any]:
        """The entries of a `config.json` that transformers and diffusers open as well."""
        return {
            "_class_name": "T5EncoderModel",
            "architectures": ["T5EncoderModel"],
            **{name: allowed[0] for name, allowed in FIXED.items()},
            "is_encoder_decoder": False,
            "tie_word_embeddings": False,
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
        }


@dataclass(frozen=True)
class T5Output:
    """What the encoder says of B prompts: last_hidden_state (B, L, D), after the final norm."""

    last_hidden_state: Tensor

    def __getitem__(self, index: int | str) -> Tensor:
        """[0] is last_hidden_state, as notebooks written for transformers expect."""
        return {0: self.last_hidden_state, "last_hidden_state": self.last_hidden_state}[index]


def buckets(length: int, config: T5Config) -> Tensor:
    """The bucket of the distance from each token to each: (L, L), rows looking at columns.

    Half of them are for tokens behind. Of each half the first half is one distance a bucket, the rest grows
    logarithmically; the largest distance and all beyond share the last one (Raffel et al. 2020, section 2.1).
    """
    place = torch.arange(length)
    offset = place[None] - place[:, None]  # (L, L)
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    distance = offset.abs()
    # float32, so that a distance on the edge of two buckets falls as it does in the original
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(config.relative_attention_max_distance / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


class T5Attention(nn.Module):
    """Multi-head self-attention over the whole prompt; scores are not scaled but biased by distance."""

    def __init__(self, c: T5Config, biased: bool) -> None:
        super().__init__()
        self.config = c
        width = c.num_heads * c.d_kv
        self.q = nn.Linear(c.d_model, width, bias=False)
        self.k = nn.Linear(c.d_model, width, bias=False)
        self.v = nn.Linear(c.d_model, width, bias=False)
        self.o = nn.Linear(width, c.d_model, bias=False)
        # The first layer has the biases, which all layers use.
        self.relative_attention_bias = nn.Embedding(c.relative_attention_num_buckets, c.num_heads) if biased else None

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)  # (B, N, L, d_kv)
            for layer in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(h.transpose(1, 2).flatten(2))  # (B, L, D)

    def bias(self, length: int) -> Tensor:
        """What distances add to the scores: (1, N, L, L)."""
        assert self.relative_attention_bias is not None
        table = self.relative_attention_bias
        return table(buckets(length, self.config).to(table.weight.device)).permute(2, 0, 1)[None]


class WideLinear(nn.Linear):
    """A linear layer that multiplies in float32 where it is in float16, and so answers in float32.

    Its largest numbers are beyond what float16 holds. bfloat16 needs no such care.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float16:
            return super().forward(x)
        return F.linear(x.float(), self.weight.float())


class T5GatedFeedForward(nn.Module):
    """Two linear layers, the one gated by the GELU of the other, and one back (Shazeer 2020)."""

    def __init__(self, c: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.wi_1 = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.wo = WideLinear(c.d_ff, c.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)  # (B, L, d_ff)
        return self.wo(h)  # (B, L, D)


class T5SelfAttentionLayer(nn.Module):
    """Attention on the norm of x, added to it."""

    def __init__(self, c: T5Config, biased: bool) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(c, biased)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class T5FeedForwardLayer(nn.Module):
    """The feed-forward network on the norm of x, added to it."""

    def __init__(self, c: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = T5GatedFeedForward(c)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nn.Module):
    """One layer of the encoder; a list because the files' names are."""

    def __init__(self, c: T5Config, biased: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([T5SelfAttentionLayer(c, biased), T5FeedForwardLayer(c)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, bias))


class T5Stack(nn.Module):
    """The layers and the final norm."""

    def __init__(self, c: T5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList([T5Block(c, biased=i == 0) for i in range(c.num_layers)])
        self.final_layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def bias(self, length: int) -> Tensor:
        """What distances add to the scores of every layer, kept in the first: (1, N, L, L)."""
        first = cast(T5SelfAttentionLayer, cast(T5Block, self.block[0]).layer[0])
        return first.SelfAttention.bias(length)


class T5EncoderModel(Network):
    """Token ids (B, L) to token states (B, L, D); parameters named as in `text_encoder_3/`."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config)
        self._init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, return_dict: bool = True) -> T5Output:
        """Read B prompts of L token ids each, of any length.

        attention_mask: (B, L), 0 for tokens that are not looked at; Stable Diffusion 3 gives none, and so reads the
        padding, too. return_dict: for notebooks, True.
        """
        x = self.shared(input_ids)  # (B, L, D)
        bias = self.encoder.bias(input_ids.shape[1]).to(x.dtype)  # (1, N, L, L)
        if attention_mask is not None:
            bias = bias.masked_fill(attention_mask[:, None, None] == 0, torch.finfo(bias.dtype).min)
        for block in self.encoder.block:
            x = block(x, bias)
        return T5Output(self.encoder.final_layer_norm(x))

    def _init(self) -> None:
        """Initial numbers as in the original: what a product sums up decides its spread."""
        c = self.config
        spread = {
            "shared": 1.0,
            "q": (c.d_model * c.d_kv) ** -0.5,
            "k": c.d_model**-0.5,
            "v": c.d_model**-0.5,
            "o": (c.num_heads * c.d_kv) ** -0.5,
            "relative_attention_bias": c.d_model**-0.5,
            "wi_0": c.d_model**-0.5,
            "wi_1": c.d_model**-0.5,
            "wo": c.d_ff**-0.5,
        }
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=spread[name.rpartition(".")[2]] * c.initializer_factor)
