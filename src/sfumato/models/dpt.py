"""DPT, the dense prediction transformer (Ranftl et al. 2021), which estimates depth.

DPT-large reads the picture with a vision transformer, DPT-hybrid with a ResNet and a transformer on its features.
Four of their states become pictures of falling size again (reassembling), which are joined from the smallest to the
largest (fusion). Parameter names are those of transformers' DPTForDepthEstimation, hence of `depth_estimator/`.

B batch, C channels, H W height and width of the picture, h w those of the grid of patches, L = 1 + h * w tokens,
D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.bit import BitConfig
from sfumato.models.config import check_choice, frozen, thawed
from sfumato.models.vit import HybridEmbeddings, ViTEmbeddings, ViTEncoder

# Options of transformers' DPTConfig for which the depth estimators need one value only.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("dpt",),
    "hidden_act": ("gelu",),
    "readout_type": ("project",),
    "head_in_index": (-1,),
    "use_batch_norm_in_fusion_residual": (False, None),
    "use_bias_in_fusion_residual": (None, True),
    "add_projection": (False, None),
}
STATES = 4  # which are reassembled; in DPT-hybrid the first two are the ResNet's
RESNETS = 2


@dataclass(frozen=True)
class DPTConfig:
    """The entries of `depth_estimator/config.json` that shape the network; defaults are those of transformers.

    backbone_out_indices: the layers whose states are reassembled; the first two mean nothing in DPT-hybrid.
    reassemble_factors:   size of each reassembled state by that of the grid of patches; likewise.
    neck_hidden_sizes:    channels of the four.
    backbone_config:      the ResNet of DPT-hybrid, None in DPT-large.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-12
    image_size: int = 384
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    backbone_out_indices: tuple[int, ...] = (2, 5, 8, 11)
    reassemble_factors: tuple[float, ...] = (4, 2, 1, 0.5)
    neck_hidden_sizes: tuple[int, ...] = (96, 192, 384, 768)
    fusion_hidden_size: int = 256
    backbone_config: BitConfig | None = None

    def __post_init__(self) -> None:
        for name in ("backbone_out_indices", "reassemble_factors", "neck_hidden_sizes"):
            if len(getattr(self, name)) != STATES:
                raise ValueError(f"DPTConfig: {name} = {getattr(self, name)!r}; give {STATES} values")
        wanted, last = self.backbone_out_indices, self.num_hidden_layers - 1
        if sorted(set(wanted)) != list(wanted) or wanted[0] < 0 or wanted[-1] > last:
            raise ValueError(f"DPTConfig: backbone_out_indices = {wanted}; give rising numbers from 0 to {last}")
        for name, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
            whole, divisor = getattr(self, name), getattr(self, part)
            if whole % divisor:
                raise ValueError(f"DPTConfig: {part} = {divisor} does not divide {name} = {whole}; choose a divisor")
        if self.backbone_config is not None:
            check_choice("DPTConfig: patch_size of a hybrid", self.patch_size, (self.backbone_config.stride,))
            first = self.backbone_config.channels[:RESNETS]
            check_choice("DPTConfig: neck_hidden_sizes begin with", self.neck_hidden_sizes[:RESNETS], (first,))

    @property
    def is_hybrid(self) -> bool:
        """Whether a ResNet sees the picture first."""
        return self.backbone_config is not None

    @property
    def grid(self) -> int:
        """Patches along a side of the pictures it was trained on."""
        return self.image_size // self.patch_size

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DPTConfig:
        """Read the entries of a `config.json`; ValueError on a network of another kind.

        Options of transformers that do not shape the network are passed over: each version writes others.
        """
        for name, allowed in FIXED.items():
            check_choice(f"DPTConfig: {name}", raw.get(name, allowed[0]), allowed)
        nested, hybrid = raw.get("backbone_config"), bool(raw.get("is_hybrid", False))
        if nested is not None and not hybrid:
            kind = nested.get("model_type")
            raise ValueError(f"DPTConfig: a backbone of kind {kind!r} is not supported; use DPT-large or DPT-hybrid")
        known = cls.__dataclass_fields__.keys() - {"backbone_config"}
        fields = {k: frozen(v) for k, v in raw.items() if k in known and v is not None}
        fields |= {k: _side(k, fields[k]) for k in ("image_size", "patch_size") if k in fields}
        bit = BitConfig.from_dict(nested or {}) if hybrid else None
        if bit is not None:
            shape = frozen(raw.get("backbone_featmap_shape")) or (1, bit.channels[-1])
            check_choice("DPTConfig: channels of backbone_featmap_shape", shape[1], bit.channels[-1:])
            check_choice("DPTConfig: neck_ignore_stages", frozen(raw.get("neck_ignore_stages", (0, 1))), ((0, 1),))
        return cls(**fields, backbone_config=bit)

    def to_dict(self) -> dict[str, Any]:
        """The entries of a `config.json` that transformers and diffusers open as well."""
        fields = {k: thawed(getattr(self, k)) for k in self.__dataclass_fields__ if k != "backbone_config"}
        bit = self.backbone_config
        return {
            "_class_name": "DPTForDepthEstimation",
            "architectures": ["DPTForDepthEstimation"],
            **{name: allowed[0] for name, allowed in FIXED.items()},
            **fields,
            "is_hybrid": self.is_hybrid,
            "backbone_config": None if bit is None else bit.to_dict(),
            "backbone_featmap_shape": None if bit is None else [1, bit.channels[-1], self.grid, self.grid],
            "neck_ignore_stages": [] if bit is None else list(range(RESNETS)),
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }


DPT_LARGE = DPTConfig(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    backbone_out_indices=(5, 11, 17, 23),
    neck_hidden_sizes=(256, 512, 1024, 1024),
)
"""The network of the paper's section 3, published as Intel/dpt-large."""

DPT_HYBRID = DPTConfig(
    reassemble_factors=(1, 1, 1, 0.5), neck_hidden_sizes=(256, 512, 768, 768), backbone_config=BitConfig()
)
"""Published as Intel/dpt-hybrid-midas, and the estimator of Stable Diffusion 2 depth."""


class DPTModel(nn.Module):
    """Pictures (B, 3, H, W) to the states that are reassembled.

    `layernorm` stands in the files and takes no part: states are read before it.
    """

    def __init__(self, c: DPTConfig) -> None:
        super().__init__()
        self.wanted = c.backbone_out_indices[RESNETS if c.is_hybrid else 0 :]
        self.embeddings = (
            ViTEmbeddings(c.num_channels, c.hidden_size, c.patch_size, c.grid**2)
            if c.backbone_config is None
            else HybridEmbeddings(c.backbone_config, c.hidden_size, c.grid**2)
        )
        self.encoder = ViTEncoder(
            c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.intermediate_size, c.layer_norm_eps, c.qkv_bias
        )
        self.layernorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Pictures of features (B, C, ., .), two in DPT-hybrid and none in DPT-large, then tokens (B, L, D)."""
        tokens, pictures = self.embeddings(x)
        states = self.encoder(tokens)
        return [*pictures, *(states[i] for i in self.wanted)]


class ReassembleLayer(nn.Module):
    """A grid of tokens to C channels and to `factor` times its size."""

    def __init__(self, width: int, channels: int, factor: float) -> None:
        super().__init__()
        self.projection = nn.Conv2d(width, channels, 1)
        self.resize: nn.Module = nn.Identity()
        if factor > 1:
            self.resize = nn.ConvTranspose2d(channels, channels, int(factor), int(factor))
        elif factor < 1:
            self.resize = nn.Conv2d(channels, channels, 3, int(1 / factor), padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.resize(self.projection(x))  # (B, C, factor h, factor w)


class ReassembleStage(nn.Module):
    """Tokens (B, L, D) to pictures of features: each token is told the readout token, then laid in its place.

    What is a picture already, in DPT-hybrid, passes unchanged.
    """

    def __init__(self, c: DPTConfig) -> None:
        super().__init__()
        kept = RESNETS if c.is_hybrid else 0
        rows = list(zip(c.neck_hidden_sizes, c.reassemble_factors, strict=True))[kept:]
        readout = (nn.Sequential(nn.Linear(2 * c.hidden_size, c.hidden_size), nn.GELU()) for _ in rows)
        layers = (ReassembleLayer(c.hidden_size, channels, factor) for channels, factor in rows)
        self.readout_projects = nn.ModuleList([*(nn.Identity() for _ in range(kept)), *readout])
        self.layers = nn.ModuleList([*(nn.Identity() for _ in range(kept)), *layers])

    def forward(self, states: Sequence[Tensor], h: int, w: int) -> list[Tensor]:
        pictures = []
        for x, project, layer in zip(states, self.readout_projects, self.layers, strict=True):
            if x.ndim == 3:
                tokens, readout = x[:, 1:], x[:, :1]  # (B, h w, D), (B, 1, D)
                x = project(torch.cat([tokens, readout.expand_as(tokens)], dim=2))  # (B, h w, D)
                x = layer(x.transpose(1, 2).unflatten(2, (h, w)))  # (B, C, ., .)
            pictures.append(x)
        return pictures


class PreActResidualLayer(nn.Module):
    """Two 3x3 convolutions, each after a ReLU, added to x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.convolution2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolution2(F.relu(self.convolution1(F.relu(x))))


class FusionLayer(nn.Module):
    """Adds the next larger picture to what is fused so far, and doubles the size.

    first: nothing is fused yet. Some files hold a `residual_layer1` for this layer as well, which no one reads.
    """

    def __init__(self, channels: int, first: bool) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, channels, 1)
        self.residual_layer1 = None if first else PreActResidualLayer(channels)
        self.residual_layer2 = PreActResidualLayer(channels)

    def forward(self, x: Tensor, larger: Tensor | None = None) -> Tensor:
        if self.residual_layer1 is not None and larger is not None:
            if larger.shape != x.shape:
                larger = F.interpolate(larger, size=x.shape[2:], mode="bilinear", align_corners=False)
            x = x + self.residual_layer1(larger)
        x = F.interpolate(self.residual_layer2(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.projection(x)  # (B, C, 2 H, 2 W)


class FusionStage(nn.Module):
    """From the smallest picture to the largest."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(channels, first=i == 0) for i in range(STATES))

    def forward(self, pictures: Sequence[Tensor]) -> Tensor:
        *larger, smallest = pictures
        x = self.layers[0](smallest)
        for layer, picture in zip(list(self.layers)[1:], reversed(larger), strict=True):
            x = layer(x, picture)
        return x


class Neck(nn.Module):
    """Reassembles the states, brings them to one number of channels and fuses them."""

    def __init__(self, c: DPTConfig) -> None:
        super().__init__()
        self.reassemble_stage = ReassembleStage(c)
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, c.fusion_hidden_size, 3, padding=1, bias=False) for channels in c.neck_hidden_sizes
        )
        self.fusion_stage = FusionStage(c.fusion_hidden_size)

    def forward(self, states: Sequence[Tensor], h: int, w: int) -> Tensor:
        pictures = self.reassemble_stage(states, h, w)
        return self.fusion_stage([conv(x) for conv, x in zip(self.convs, pictures, strict=True)])


class Upsample(nn.Module):
    """Doubles the picture, corner to corner."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)  # (B, C, 2 H, 2 W)


class Head(nn.Module):
    """Features to one number a pixel, which is not negative."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 3, padding=1),
            Upsample(),
            nn.Conv2d(channels // 2, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, 1),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)  # (B, 1, H, W)


def _side(name: str, size: Any) -> int:
    """The side of a square that may be given as height and width."""
    height, width = size if isinstance(size, tuple) else (size, size)
    if height != width:
        raise ValueError(f"DPTConfig: {name} = {size}; only squares are supported")
    return int(height)
