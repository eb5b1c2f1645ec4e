"""The vision transformer that DPT reads pictures with (Dosovitskiy et al. 2021).

Parameter names are those of transformers' DPTModel.

B batch, C channels, H W height and width of the picture, h w those of the grid of patches, L = 1 + h * w tokens,
D width, N attention heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.bit import BitBackbone, BitConfig


class SelfAttention(nn.Module):
    """Queries, keys and values of all tokens, and what they make of one another."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, L, D / N)
            for layer in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, L, D)


class Dense(nn.Module):
    """A linear layer by the name that the files give it."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class ViTAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads, bias)
        self.output = Dense(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.attention(x))


class ViTLayer(nn.Module):
    """Attention and two linear layers around GELU, each on the layer norm of x and added to it."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(width, eps=eps)
        self.attention = ViTAttention(width, heads, bias)
        self.layernorm_after = nn.LayerNorm(width, eps=eps)
        self.intermediate = Dense(width, hidden)
        self.output = Dense(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))  # (B, L, D)
        return x + self.output(F.gelu(self.intermediate(self.layernorm_after(x))))


class ViTEncoder(nn.Module):
    """The layers, whose outputs are all given back."""

    def __init__(self, layers: int, width: int, heads: int, hidden: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(ViTLayer(width, heads, hidden, eps, bias) for _ in range(layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        states = []
        for layer in self.layer:
            x = layer(x)
            states.append(x)
        return states


class Embeddings(nn.Module):
    """A readout token before the tokens of a picture, and learned positions, stretched to the picture's grid.

    patches: of the square picture that the positions were trained on.
    """

    def __init__(self, width: int, patches: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + patches, width))

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) of the features of patches (B, D, h, w)."""
        readout = self.cls_token.expand(len(x), -1, -1)
        tokens = torch.cat([readout, x.flatten(2).transpose(1, 2)], dim=1)  # (B, L, D)
        return tokens + self._positions(x.shape[2], x.shape[3])

    def _positions(self, h: int, w: int) -> Tensor:
        side = math.isqrt(self.position_embeddings.shape[1] - 1)
        if (h, w) == (side, side):
            return self.position_embeddings
        first, grid = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        grid = grid.transpose(1, 2).unflatten(2, (side, side))  # (1, D, side, side)
        grid = F.interpolate(grid, size=(h, w), mode="bilinear", align_corners=False)  # (1, D, h, w)
        return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)  # (1, L, D)


class PatchEmbeddings(nn.Module):
    """One convolution that makes a token of each patch."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x)  # (B, D, h, w)


class ViTEmbeddings(Embeddings):
    """Tokens straight from the pixels."""

    def __init__(self, channels: int, width: int, patch: int, patches: int) -> None:
        super().__init__(width, patches)
        self.patch_embeddings = PatchEmbeddings(channels, width, patch)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, L, D) of pictures (B, 3, H, W), and no pictures of features."""
        return self.tokens(self.patch_embeddings(x)), []


class HybridEmbeddings(Embeddings):
    """Tokens from the last of a ResNet's pictures of features."""

    def __init__(self, backbone: BitConfig, width: int, patches: int) -> None:
        super().__init__(width, patches)
        self.backbone = BitBackbone(backbone)
        self.projection = nn.Conv2d(backbone.channels[-1], width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, L, D) of pictures (B, 3, H, W), and the pictures of features before the last."""
        *pictures, last = self.backbone(x)  # (B, C, H / 4, W / 4), (B, C, H / 8, W / 8); (B, C, h, w)
        return self.tokens(self.projection(last)), pictures
