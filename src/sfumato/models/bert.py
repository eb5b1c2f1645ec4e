"""The text encoder of the latent-diffusion text-to-image model (Rombach et al. 2022, section 4.3.1).

A transformer over BERT's word pieces, trained from scratch with the U-Net; a token sees the whole prompt.

B batch, L tokens, D width, N attention heads, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.config import check_choice


@dataclass(frozen=True)
class LDMBertConfig:
    """The entries of `bert/config.json` that shape the encoder; defaults are those of the published model.

    head_dim: width of one of the heads, whose sum need not be d_model.
    """

    vocab_size: int = 30522
    max_position_embeddings: int = 77
    encoder_layers: int = 32
    encoder_ffn_dim: int = 5120
    encoder_attention_heads: int = 8
    head_dim: int = 64
    activation_function: str = "gelu"
    d_model: int = 1280
    init_std: float = 0.02
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        check_choice("LDMBertConfig: activation_function", self.activation_function, ("gelu",))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> LDMBertConfig:
        """Read the entries of a `config.json`; ValueError on an encoder of another kind.

        Options of transformers that do not change what the encoder says are passed over: each version writes others.
        """
        check_choice("LDMBertConfig: model_type", raw.get("model_type", "ldmbert"), ("ldmbert",))
        check_choice("LDMBertConfig: scale_embedding", raw.get("scale_embedding", False), (False,))
        known = cls.__dataclass_fields__
        return cls(**{k: v for k, v in raw.items() if k in known and v is not None})

    def to_dict(self) -> dict[str, Any]:
        """The entries of a `config.json` that diffusers opens as well."""
        return {
            "_class_name": "LDMBertModel",
            "architectures": ["LDMBertModel"],
            "model_type": "ldmbert",
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
        }


@dataclass(frozen=True)
class LDMBertOutput:
    """What the encoder says of B prompts: last_hidden_state (B, L, D), after the final layer norm."""

    last_hidden_state: Tensor

    def __getitem__(self, index: int) -> Tensor:
        """[0] is last_hidden_state, as notebooks written for diffusers expect."""
        return (self.last_hidden_state,)[index]


class LDMBertAttention(nn.Module):
    """Multi-head self-attention over the whole prompt; only the last projection has a bias."""

    def __init__(self, c: LDMBertConfig) -> None:
        super().__init__()
        self.heads = c.encoder_attention_heads
        width = self.heads * c.head_dim
        self.k_proj = nn.Linear(c.d_model, width, bias=False)
        self.v_proj = nn.Linear(c.d_model, width, bias=False)
        self.q_proj = nn.Linear(c.d_model, width, bias=False)
        self.out_proj = nn.Linear(width, c.d_model)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, L, head_dim)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        h = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(h.transpose(1, 2).flatten(2))  # (B, L, D)


class LDMBertEncoderLayer(nn.Module):
    """Attention and two linear layers around GELU, each on the layer norm of x and added to it."""

    def __init__(self, c: LDMBertConfig) -> None:
        super().__init__()
        self.self_attn = LDMBertAttention(c)
        self.self_attn_layer_norm = nn.LayerNorm(c.d_model)
        self.fc1 = nn.Linear(c.d_model, c.encoder_ffn_dim)
        self.fc2 = nn.Linear(c.encoder_ffn_dim, c.d_model)
        self.final_layer_norm = nn.LayerNorm(c.d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))  # (B, L, D)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class LDMBertEncoder(nn.Module):
    """Token and learned position embeddings, layers, final norm."""

    def __init__(self, c: LDMBertConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.d_model)
        self.embed_positions = nn.Embedding(c.max_position_embeddings, c.d_model)
        self.layers = nn.ModuleList([LDMBertEncoderLayer(c) for _ in range(c.encoder_layers)])
        self.layer_norm = nn.LayerNorm(c.d_model)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids) + self.embed_positions.weight[: input_ids.shape[1]]  # (B, L, D)
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)


class LDMBertModel(nn.Module):
    """Token ids (B, L) to token states (B, L, D); parameters named as in `bert/`.

    `to_logits`, D -> V, stands in the files and takes no part: it guessed words in training.
    """

    def __init__(self, config: LDMBertConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LDMBertEncoder(config)
        self.to_logits = nn.Linear(config.d_model, config.vocab_size)

    def forward(self, input_ids: Tensor) -> LDMBertOutput:
        """Read B prompts of L token ids each; ValueError when L exceeds the position table."""
        length, limit = input_ids.shape[1], self.config.max_position_embeddings
        if length > limit:
            raise ValueError(f"{length} tokens; this text encoder reads at most {limit}, cut the prompt")
        return LDMBertOutput(self.model(input_ids))
