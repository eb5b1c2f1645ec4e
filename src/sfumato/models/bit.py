"""The first stages of a BiT ResNet (Kolesnikov et al. 2020), which DPT-hybrid sees a picture with.

Convolutions whose weights are standardised (Qiao et al. 2019), group norms, and padding as TensorFlow's "SAME".
Parameter names are those of transformers' BitBackbone.

B batch, C channels, H W height and width of the picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.config import check_choice, frozen, thawed
from sfumato.models.layers import GroupNorm

# Options of transformers' BitConfig for which DPT-hybrid needs one value only.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("bit",),
    "layer_type": ("bottleneck",),
    "global_padding": ("SAME", "same"),
    "embedding_dynamic_padding": (True,),
    "hidden_act": ("relu",),
    "output_stride": (32,),
    "width_factor": (1,),
    "out_features": (("stage1", "stage2", "stage3"), None),
}
NARROWING = 4  # a block's 3x3 convolution has that much fewer channels than the block
EPS, WEIGHT_EPS = 1e-5, 1e-8


@dataclass(frozen=True)
class BitConfig:
    """The entries of `backbone_config` that shape the ResNet; defaults are those of DPT-hybrid.

    depths:       blocks in each of the three stages.
    hidden_sizes: channels that each stage puts out; entries beyond the three are not used.
    """

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 9)
    num_groups: int = 32

    def __post_init__(self) -> None:
        if len(self.depths) != 3 or len(self.hidden_sizes) < 3:
            raise ValueError(
                f"BitConfig: depths = {self.depths} and hidden_sizes = {self.hidden_sizes}; DPT-hybrid has three stages"
            )
        odd = [size for size in self.channels if size % (8 * NARROWING)]
        if odd:
            raise ValueError(f"BitConfig: hidden_sizes has {odd[0]}; use multiples of {8 * NARROWING}")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the three stages."""
        return self.hidden_sizes[: len(self.depths)]

    @property
    def stride(self) -> int:
        """Pixels of the picture along a side of one pixel of the last stage."""
        return 4 * 2 ** (len(self.depths) - 1)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> BitConfig:
        """Read a `backbone_config`; what it does not say is as in DPT-hybrid.

        Options of transformers that do not shape the network are passed over: each version writes others.
        Raises ValueError on a network of another kind.
        """
        for name, allowed in FIXED.items():
            check_choice(f"BitConfig: {name}", frozen(raw.get(name, allowed[0])), allowed)
        return cls(**{k: frozen(v) for k, v in raw.items() if k in cls.__dataclass_fields__ and v is not None})

    def to_dict(self) -> dict[str, Any]:
        """A `backbone_config` that transformers opens as well."""
        fields = {name: thawed(getattr(self, name)) for name in self.__dataclass_fields__}
        return {**{name: thawed(allowed[0]) for name, allowed in FIXED.items()}, **fields}


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around a picture, so that a kernel finds ceil(size / stride) places; odd ones below and to the right."""
    rows, columns = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[2:])
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


class StandardConv2d(nn.Conv2d):
    """A convolution whose filters have mean 0 and variance 1 each, (C_out, C, k, k), and no bias."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, kernel // 2 if stride == 1 else 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] > 1:
            x = pad_same(x, self.kernel_size[0], self.stride[0])
        filters = self.weight.float()  # the epsilon is nothing in half precision
        var, mean = torch.var_mean(filters, dim=(1, 2, 3), correction=0, keepdim=True)  # (C_out, 1, 1, 1) each
        filters = ((filters - mean) * (var + WEIGHT_EPS).rsqrt()).to(x.dtype)
        return F.conv2d(x, filters, None, self.stride, self.padding)


class BitNorm(GroupNorm):
    """Group normalisation, followed by ReLU when `relu` is set."""

    def __init__(self, c: BitConfig, channels: int, relu: bool = True) -> None:
        super().__init__(c.num_groups, channels, EPS)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return F.relu(h) if self.relu else h


class BitEmbeddings(nn.Module):
    """A 7x7 convolution and a pooling, each of stride 2."""

    def __init__(self, c: BitConfig) -> None:
        super().__init__()
        self.convolution = StandardConv2d(c.num_channels, c.embedding_size, 7, stride=2)
        self.norm = BitNorm(c, c.embedding_size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.convolution(x))  # (B, C, H / 2, W / 2)
        return F.max_pool2d(pad_same(h, 3, 2), 3, 2)  # (B, C, H / 4, W / 4)


class BitDownsampleConv(nn.Module):
    """The way around a stage's first block."""

    def __init__(self, c: BitConfig, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = StandardConv2d(in_channels, out_channels, 1, stride)
        self.norm = BitNorm(c, out_channels, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class BitBottleneckLayer(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each normalised, added to x; the first of a stage changes size and channels."""

    def __init__(self, c: BitConfig, in_channels: int, out_channels: int, stride: int, first: bool) -> None:
        super().__init__()
        narrow = out_channels // NARROWING
        self.downsample = BitDownsampleConv(c, in_channels, out_channels, stride) if first else None
        self.conv1 = StandardConv2d(in_channels, narrow, 1)
        self.norm1 = BitNorm(c, narrow)
        self.conv2 = StandardConv2d(narrow, narrow, 3, stride)
        self.norm2 = BitNorm(c, narrow)
        self.conv3 = StandardConv2d(narrow, out_channels, 1)
        self.norm3 = BitNorm(c, out_channels, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(self.conv1(x))  # (B, C / 4, H, W)
        h = self.norm2(self.conv2(h))
        h = self.norm3(self.conv3(h))  # (B, C, H, W)
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class BitStage(nn.Module):
    """Blocks of one size; the first may halve the picture."""

    def __init__(self, c: BitConfig, in_channels: int, out_channels: int, stride: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            BitBottleneckLayer(c, in_channels, out_channels, stride, first=True),
            *(BitBottleneckLayer(c, out_channels, out_channels, 1, first=False) for _ in range(depth - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class BitEncoder(nn.Module):
    """The stages, whose pictures are all given back."""

    def __init__(self, c: BitConfig) -> None:
        super().__init__()
        widths = (c.embedding_size, *c.channels)
        self.stages = nn.ModuleList(
            BitStage(c, widths[i], widths[i + 1], 1 if i == 0 else 2, depth) for i, depth in enumerate(c.depths)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        pictures = []
        for stage in self.stages:
            x = stage(x)
            pictures.append(x)
        return pictures


class BitModel(nn.Module):
    """Stem and stages."""

    def __init__(self, c: BitConfig) -> None:
        super().__init__()
        self.embedder = BitEmbeddings(c)
        self.encoder = BitEncoder(c)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.encoder(self.embedder(x))


class BitBackbone(nn.Module):
    """Pictures (B, 3, H, W) to three of features: (B, C, H / 4, W / 4), then half the size each."""

    def __init__(self, config: BitConfig) -> None:
        super().__init__()
        self.config = config
        self.bit = BitModel(config)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.bit(x)
