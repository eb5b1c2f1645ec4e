"""The text tower of CLIP (Radford et al. 2021, section 2.4), which Stable Diffusion reads prompts with.

B batch, L tokens, D width, N attention heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.config import check_choice, frozen, thawed
from sfumato.models.network import Network


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}

PROJECTED = "CLIPTextModelWithProjection"


@dataclass(frozen=True)
class CLIPTextConfig:
    """The entries of `text_encoder/config.json` that shape the tower; defaults are those of transformers.

    eos_token_id: where `pooled` is read; 2 is what old files say and means "at the largest token id".
    projected: whether there is a projection to projection_dim (transformers' CLIPTextModelWithProjection).
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1
    projected: bool = False

    def __post_init__(self) -> None:
        check_choice("CLIPTextConfig: hidden_act", self.hidden_act, tuple(ACTIVATIONS))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"CLIPTextConfig: num_attention_heads = {self.num_attention_heads} does not divide "
                f"hidden_size = {self.hidden_size}; choose a divisor"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> CLIPTextConfig:
        """Read the entries of a `config.json`; ValueError on a tower of another kind.

        Options of transformers that do not concern a text tower are passed over: each version writes others.
        """
        check_choice("CLIPTextConfig: model_type", raw.get("model_type", "clip_text_model"), ("clip_text_model",))
        for name in ("dropout", "attention_dropout"):
            check_choice(f"CLIPTextConfig: {name}", raw.get(name, 0.0), (0.0,))
        known = cls.__dataclass_fields__
        kind = raw.get("_class_name") or next(iter(raw.get("architectures") or ()), None)
        given = {"projected": kind == PROJECTED, **raw}
        return cls(**{k: frozen(v) for k, v in given.items() if k in known and v is not None})

    def to_dict(self) -> dict[str, Any]:
        """The entries of a `config.json` that transformers and diffusers open as well."""
        fields = {name: thawed(getattr(self, name)) for name in self.__dataclass_fields__ if name != "projected"}
        kind = PROJECTED if self.projected else "CLIPTextModel"
        return {
            "_class_name": kind,
            "architectures": [kind],
            "model_type": "clip_text_model",
            "attention_dropout": 0.0,
            **fields,
        }


@dataclass(frozen=True)
class CLIPTextOutput:
    """What the tower says of B prompts.

    last_hidden_state: (B, L, D) after the final layer norm.
    pooled: (B, D), its row at the end-of-text token.
    hidden_states: on request the embeddings and each layer's output, (B, L, D) each, without the final norm.
    text_embeds: (B, P), `pooled` projected; None for a tower without a projection.
    """

    last_hidden_state: Tensor
    pooled: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    text_embeds: Tensor | None = None

    @property
    def pooler_output(self) -> Tensor:
        """`pooled` under transformers' name."""
        return self.pooled

    def __getitem__(self, index: int | str) -> Any:
        """[0] is last_hidden_state, [1] pooled, [2] hidden_states, as notebooks written for transformers expect.

        Of a tower with a projection, [0] is text_embeds and [1] last_hidden_state. Names stand for attributes.
        """
        if isinstance(index, str):
            return getattr(self, index)
        parts: tuple[Any, ...] = self.last_hidden_state, self.pooled
        if self.text_embeds is not None:
            parts = self.text_embeds, self.last_hidden_state
        return (parts if self.hidden_states is None else (*parts, self.hidden_states))[index]


class CLIPTextEmbeddings(nn.Module):
    """Token and learned position embeddings, added."""

    def __init__(self, c: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embedding = nn.Embedding(c.max_position_embeddings, c.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = self.position_embedding.weight[: input_ids.shape[1]]  # (L, D)
        return self.token_embedding(input_ids) + positions  # (B, L, D)


class CLIPAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and the tokens before it."""

    def __init__(self, c: CLIPTextConfig) -> None:
        super().__init__()
        self.heads = c.num_attention_heads
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.k_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.v_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, L, D / N)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(h.transpose(1, 2).flatten(2))  # (B, L, D)


class CLIPMLP(nn.Module):
    """Two linear layers around the activation."""

    def __init__(self, c: CLIPTextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[c.hidden_act]
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """Attention and MLP, each on the layer norm of x and added to it."""

    def __init__(self, c: CLIPTextConfig) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(c)
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.mlp = CLIPMLP(c)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))  # (B, L, D)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, c: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([CLIPEncoderLayer(c) for _ in range(c.num_hidden_layers)])


class CLIPTextTransformer(nn.Module):
    """Embeddings, layers, final norm; one module deeper than needed because the files' names are."""

    def __init__(self, c: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(c)
        self.encoder = CLIPEncoder(c)
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)


class CLIPTextModel(Network):
    """Token ids (B, L) to token states (B, L, D), and with a projection to a vector (B, P) of each text.

    Parameters are named as in `text_encoder/` and `text_encoder_2/`.
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)
        projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = projection if config.projected else None
        self.apply(self._init)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> CLIPTextOutput:
        """Read B prompts of L token ids each; ValueError when L exceeds the position table.

        attention_mask: for notebooks: None, as Stable Diffusion reads the padding, too. return_dict likewise.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("attention_mask hides tokens, but these towers were used without one; leave it out")
        length, limit = input_ids.shape[1], self.config.max_position_embeddings
        if length > limit:
            raise ValueError(f"{length} tokens; this text encoder reads at most {limit}, cut the prompt")
        x = self.text_model.embeddings(input_ids)  # (B, L, D)
        states = [x]
        for layer in self.text_model.encoder.layers:
            x = layer(x)
            states.append(x)
        last = self.text_model.final_layer_norm(x)  # (B, L, D)
        pooled = last[torch.arange(len(last), device=last.device), self._end(input_ids)]  # (B, D)
        projected = None if self.text_projection is None else self.text_projection(pooled)  # (B, P)
        return CLIPTextOutput(last, pooled, tuple(states) if output_hidden_states else None, projected)

    def _end(self, input_ids: Tensor) -> Tensor:
        """Place of the first end-of-text token of each prompt: (B,)."""
        eos = self.config.eos_token_id
        if eos == 2:  # old files name the wrong token; in CLIP's vocabulary the right one has the largest id
            return input_ids.argmax(dim=-1)
        return (input_ids == eos).int().argmax(dim=-1)

    def _init(self, module: nn.Module) -> None:
        """CLIP's own initialisation: embeddings as small as the layers expect, far from PyTorch's N(0, 1)."""
        c = self.config
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=c.initializer_range * c.initializer_factor)
        elif isinstance(module, nn.Linear):
            # residual branches shrink with depth, so that the sum keeps its size
            std = c.hidden_size**-0.5 * (2 * c.num_hidden_layers) ** -0.5 * c.initializer_factor
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
