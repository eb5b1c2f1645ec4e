"""The multimodal diffusion transformer of Stable Diffusion 3 and 3.5 (Esser et al. 2024, section 4).

B batch, C latent channels, H W height and width of the latent picture, P side of a patch, L patches (H W / P²),
K tokens of the context, D width, N attention heads, t the network's time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.cond import Cond
from sfumato.models.config import check_choice, read_config, write_config
from sfumato.models.layers import RMSNorm, TimestepEmbedding, sinusoidal
from sfumato.models.network import Network, NetworkOutput

EPS = 1e-6
TIME_FEATURES = 256


@dataclass(frozen=True)
class MMDiTConfig:
    """The entries of `transformer/config.json`; defaults are those of diffusers' SD3Transformer2DModel.

    sample_size:           side of the latents in training; fixes how far apart neighbouring positions are.
    pos_embed_max_size:    side of the table of positions, in patches; larger pictures are refused.
    joint_attention_dim:   width of the context; pooled_projection_dim: width of the pooled text.
    dual_attention_layers: blocks in which the picture also attends to itself alone (SD 3.5 medium).
    qk_norm:               "rms_norm" normalises queries and keys (SD 3.5).
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self) -> None:
        check_choice("MMDiTConfig: qk_norm", self.qk_norm, (None, "rms_norm"))
        check_choice("MMDiTConfig: caption_projection_dim", self.caption_projection_dim, (self.width,))
        if self.width % 4:
            raise ValueError(f"MMDiTConfig: {self.width} channels; positions need a multiple of 4")
        for layer in self.dual_attention_layers:
            if not 0 <= layer < self.num_layers:
                raise ValueError(
                    f"MMDiTConfig: dual_attention_layers entry {layer}; there are blocks 0 to {self.num_layers - 1}"
                )

    @property
    def width(self) -> int:
        """D, the width of both streams."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> MMDiTConfig:
        """Read the entries of a `config.json`; ValueError on an option that is not implemented."""
        return read_config(cls, {**raw, "out_channels": raw.get("out_channels") or raw.get("in_channels", 16)}, {})

    def to_dict(self) -> dict[str, Any]:
        """The entries of a `config.json` that diffusers opens as well."""
        return write_config(self, "SD3Transformer2DModel")


def positions(config: MMDiTConfig) -> Tensor:
    """Sines and cosines of the patches' places, (1, M * M, D) for a table of side M.

    A half of the width is for the column, the other for the row: sines of D / 4 geometric frequencies, then their
    cosines (Vaswani et al. 2017, section 3.5). Places are scaled so that the table spans one training picture.
    """
    side, quarter = config.pos_embed_max_size, config.width // 4
    scale = (config.sample_size // config.patch_size) / side
    places = torch.arange(side, dtype=torch.float64) * scale
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = places[:, None] * frequencies  # (M, D / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1).float()  # (M, D / 2)
    columns, rows = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, -1)  # (1, M * M, D)


class PatchEmbed(nn.Module):
    """Patches to tokens, with the middle of the table of positions added."""

    pos_embed: Tensor

    def __init__(self, c: MMDiTConfig) -> None:
        super().__init__()
        self.side, self.patch = c.pos_embed_max_size, c.patch_size
        self.proj = nn.Conv2d(c.in_channels, c.width, c.patch_size, stride=c.patch_size)
        table = torch.empty(1, self.side**2, c.width)
        self.register_buffer("pos_embed", table if table.is_meta else positions(c))

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj(x)  # (B, D, H / P, W / P)
        rows, columns = h.shape[2:]
        if max(rows, columns) > self.side:
            raise ValueError(
                f"a latent picture of {x.shape[2]}x{x.shape[3]}; this transformer has positions for at most "
                f"{self.side * self.patch} a side: make a smaller picture"
            )
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        table = self.pos_embed.view(self.side, self.side, -1)[top : top + rows, left : left + columns]
        h = h.flatten(2).transpose(1, 2) + table.reshape(1, rows * columns, -1)  # (B, L, D)
        return h.to(x.dtype).contiguous()


class TextProjection(nn.Module):
    """The pooled text lifted to width D: two linear layers around SiLU."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(pooled)))  # (B, D)


class TimeTextEmbedding(nn.Module):
    """What the modulations read: the time and the pooled text, added."""

    def __init__(self, c: MMDiTConfig) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(TIME_FEATURES, c.width)
        self.text_embedder = TextProjection(c.pooled_projection_dim, c.width)

    def forward(self, t: Tensor, pooled: Tensor) -> Tensor:
        features = sinusoidal(t, TIME_FEATURES, flip_sin_to_cos=True, freq_shift=0).to(pooled.dtype)
        return self.timestep_embedder(features) + self.text_embedder(pooled)  # (B, D)


class Modulation(nn.Module):
    """Shifts, scales and gates of a layer norm without weights (adaLN; Peebles & Xie 2023, section 3.2)."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, temb: Tensor) -> tuple[Tensor, ...]:
        """(B, D) to as many (B, 1, D) as there are parts."""
        return self.linear(F.silu(temb))[:, None].chunk(self.parts, dim=-1)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The layer norm of x (B, L, D), scaled and shifted."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


class GELU(nn.Module):
    """A linear layer and the tanh approximation of GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """To four times the width and back; `net.1` is the place of a dropout that is never used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class JointAttention(nn.Module):
    """One attention over the tokens of the picture and of the text, each with projections of its own.

    joint:   whether there is a text; without, the picture attends to itself.
    answers: whether the text is told what it found, too.
    `identity` lets each token of the picture see no other one, only the text; set by `perturb.perturbed`.
    """

    def __init__(self, c: MMDiTConfig, joint: bool, answers: bool) -> None:
        super().__init__()
        self.heads = c.num_attention_heads
        self.identity = False
        self.to_q, self.to_k, self.to_v = (nn.Linear(c.width, c.width) for _ in range(3))
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(c.width, c.width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(c.width, c.width)])
        self.to_add_out = nn.Linear(c.width, c.width) if joint and answers else None

        def norm(wanted: bool) -> RMSNorm | None:
            return RMSNorm(c.attention_head_dim, EPS) if wanted and c.qk_norm else None

        self.norm_q, self.norm_k = norm(True), norm(True)
        self.norm_added_q, self.norm_added_k = norm(joint), norm(joint)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) and (B, K, D) to what each found; None where there is no text or it is not told."""
        q, k, v = self._heads(x, (self.to_q, self.to_k, self.to_v), self.norm_q, self.norm_k)
        if context is not None:
            layers = self.add_q_proj, self.add_k_proj, self.add_v_proj
            text = self._heads(context, layers, self.norm_added_q, self.norm_added_k)
            q, k, v = (torch.cat(pair, dim=2) for pair in zip((q, k, v), text, strict=True))  # (B, N, L + K, D / N)
        h = F.scaled_dot_product_attention(q, k, v, self._mask(x.shape[1], q) if self.identity else None)
        found, told = h[:, :, : x.shape[1]], h[:, :, x.shape[1] :]
        out = self.to_out[0](found.transpose(1, 2).flatten(2))  # (B, L, D)
        if self.to_add_out is None or context is None:
            return out, None
        return out, self.to_add_out(told.transpose(1, 2).flatten(2))  # (B, K, D)

    def _mask(self, patches: int, q: Tensor) -> Tensor:
        """What may be seen when the picture's tokens do not see one another: (L + K, L + K)."""
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
        seen[:patches, :patches] = torch.eye(patches, dtype=torch.bool, device=q.device)
        return seen

    def _heads(
        self, x: Tensor, layers: tuple[nn.Module, nn.Module, nn.Module], norm_q: RMSNorm | None, norm_k: RMSNorm | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: 3 x (B, N, L, D / N)."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)
        return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v


class JointTransformerBlock(nn.Module):
    """Joint attention and a feed-forward network for each stream, modulated and gated by time and pooled text.

    last: the text is read here and not written any more.
    dual: the picture also attends to itself alone.
    `skipped` makes the block hand on what it is given; set by `perturb.perturbed`.
    """

    def __init__(self, c: MMDiTConfig, last: bool, dual: bool) -> None:
        super().__init__()
        self.skipped = False
        self.norm1 = Modulation(c.width, 9 if dual else 6)
        self.norm1_context = Modulation(c.width, 2 if last else 6)
        self.attn = JointAttention(c, joint=True, answers=not last)
        self.attn2 = JointAttention(c, joint=False, answers=False) if dual else None
        self.ff = FeedForward(c.width)
        self.ff_context = None if last else FeedForward(c.width)

    def forward(self, x: Tensor, context: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) and (B, K, D) to the same."""
        if self.skipped:
            return x, context
        shift, scale, gate, ff_shift, ff_scale, ff_gate, *second = self.norm1(temb)
        text = self.norm1_context(temb)
        # The last block has the two the other way round, as the norm before the output has.
        seen = modulated(context, text[1], text[0]) if self.ff_context is None else modulated(context, *text[:2])
        out, told = self.attn(modulated(x, shift, scale), seen)
        alone = None if self.attn2 is None else self.attn2(modulated(x, second[0], second[1]))[0]
        x = x + gate * out
        if alone is not None:
            x = x + second[2] * alone
        x = x + ff_gate * self.ff(modulated(x, ff_shift, ff_scale))
        if self.ff_context is None:
            return x, context
        context = context + text[2] * told
        return x, context + text[5] * self.ff_context(modulated(context, text[3], text[4]))


class MMDiT(Network):
    """A noisy picture, its time and the condition to a prediction; parameters named as in `transformer/`."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.pos_embed = PatchEmbed(c)
        self.time_text_embed = TimeTextEmbedding(c)
        self.context_embedder = nn.Linear(c.joint_attention_dim, c.width)
        self.transformer_blocks = nn.ModuleList(
            [
                JointTransformerBlock(c, last=i == c.num_layers - 1, dual=i in c.dual_attention_layers)
                for i in range(c.num_layers)
            ]
        )
        self.norm_out = Modulation(c.width, 2)
        self.proj_out = nn.Linear(c.width, c.patch_size**2 * c.out_channels)
        self.apply(_init)
        nn.init.zeros_(self.proj_out.weight)

    def __call__(  # beside the package's own net(x, t, cond)
        self,
        hidden_states: Tensor,
        t: Tensor | float | None = None,
        cond: Cond | None = None,
        *,
        timestep: Tensor | float | None = None,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Evaluate the network: `forward` where the third argument is a Cond, else in the form that notebooks use.

        There, timestep is 0 to 1000, encoder_hidden_states (B, K, joint_attention_dim), pooled_projections
        (B, pooled_projection_dim), and the answer is an object with `.sample`, or a tuple with return_dict=False.
        Raises ValueError for an option of diffusers' network that this one has not.
        """
        given = {name: value for name, value in others.items() if value is not None and value != {}}
        if given:
            name, value = next(iter(given.items()))
            raise ValueError(f"MMDiT: {name} = {value!r} is not supported; leave it out")
        if isinstance(cond, Cond):
            return super().__call__(hidden_states, t, cond)
        time = t if timestep is None else timestep
        out = super().__call__(hidden_states, time, Cond(encoder_hidden_states, pooled_projections))
        return NetworkOutput(out) if return_dict else (out,)

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond) -> Tensor:
        """Evaluate the network.

        x: (B, C, H, W) with the model's latent channels; `cond.concat` adds further input channels.
        t: time, 0 to 1000, as a number or tensor, one for all or one a picture (B,).
        cond: context (B, K, joint_attention_dim) and pooled (B, pooled_projection_dim).
        Returns (B, C_out, H, W). Raises ValueError when the condition or the size does not fit the config.
        """
        h, context, temb = self.entered(x, t, cond)
        for block in self.transformer_blocks:
            h, context = block(h, context, temb)
        return self.left(h, temb, x.shape[2:])

    def entered(self, x: Tensor, t: Tensor | float, cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
        """A network's input as its blocks take it: the picture's tokens, the text's, the embedding of the time."""
        c, patch = self.config, self.config.patch_size
        context, pooled = self._text(cond)
        x = x if cond.concat is None else torch.cat([x, cond.concat], dim=1)  # (B, C_in, H, W)
        if x.shape[1] != c.in_channels:
            raise ValueError(f"input of {x.shape[1]} channels; this transformer takes {c.in_channels}")
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        if (rows * patch, columns * patch) != x.shape[2:]:
            raise ValueError(
                f"a latent picture of {x.shape[2]}x{x.shape[3]} is not made of patches of {patch}x{patch}; "
                f"choose sides that {patch} divides"
            )
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(x.shape[0])  # (B,)
        temb = self.time_text_embed(t, pooled.to(x.dtype))  # (B, D)
        return self.pos_embed(x), self.context_embedder(context), temb  # (B, L, D), (B, K, D), (B, D)

    def left(self, h: Tensor, temb: Tensor, size: Sequence[int]) -> Tensor:
        """The prediction (B, C_out, H, W) that the picture's tokens (B, L, D) say after the blocks; size: (H, W)."""
        c, patch = self.config, self.config.patch_size
        rows, columns = size[0] // patch, size[1] // patch
        scale, shift = self.norm_out(temb)
        h = self.proj_out(modulated(h, shift, scale))  # (B, L, P * P * C_out)
        h = h.view(-1, rows, columns, patch, patch, c.out_channels)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(-1, c.out_channels, rows * patch, columns * patch)

    def _text(self, cond: Cond) -> tuple[Tensor, Tensor]:
        """The condition's two parts, seen to be as wide as the config says."""
        c = self.config
        wanted = (("context", cond.context, c.joint_attention_dim), ("pooled", cond.pooled, c.pooled_projection_dim))
        for name, part, width in wanted:
            if part is None or part.shape[-1] != width:
                found = "None" if part is None else f"{part.shape[-1]} wide"
                raise ValueError(
                    f"cond.{name} is {found}, this transformer reads {width}; use the text encoders of the same model"
                )
        assert cond.context is not None and cond.pooled is not None
        return cond.context, cond.pooled


def _init(module: nn.Module) -> None:
    """Initial numbers (Peebles & Xie 2023, section 3.2): each block begins as the identity."""
    if isinstance(module, Modulation):
        nn.init.zeros_(module.linear.weight)
    elif isinstance(module, TimeTextEmbedding):
        for layer in (module.timestep_embedder.linear_1, module.timestep_embedder.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        assert module.bias is not None
        nn.init.zeros_(module.bias)
