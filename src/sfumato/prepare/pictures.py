"""Faster ways for what works on pictures: convolutions, residual blocks, norms, doubling, the time.

B batch, C channels, H W height and width, E width of the time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.allocator import trim
from sfumato.kernels import available, group_norm
from sfumato.kernels.product import PACKED_UP_TO
from sfumato.models.layers import GroupNorm, ResnetBlock2D, Upsample2D
from sfumato.models.unet import UNet
from sfumato.prepare.way import Stamp, Way, has_onednn, multiplies, onednn_takes, quick, stamp, unwatched
from sfumato.runtime import cpu_has_tiles

ROOMY = 2**26  # bytes of a picture beside which the free memory between buffers is too much to keep
# Pixels of all pictures up to which the layout of a convolution's weights costs more than a copy of them is worth.
FEW_PIXELS, FEW_PIXELS_WITH_TILES = 512, 16384


class Convolution(Way[nn.Conv2d]):
    """A convolution by our product where pixels are few, or by oneDNN with weights that stay in its own layout.

    Of large weights no such copy is kept but where AMX tiles make it worth its memory.
    """

    def __init__(self, module: nn.Conv2d) -> None:
        super().__init__(module)
        self.made: tuple[Stamp, Tensor, Tensor] | None = None
        self.tiles = cpu_has_tiles()
        self.few = FEW_PIXELS_WITH_TILES if self.tiles else FEW_PIXELS

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        assert isinstance(module, nn.Conv2d)
        regular = module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
        square = len({*module.kernel_size}) == len({*module.stride}) == 1 and isinstance(module.padding, tuple)
        return regular and square and len({*module.padding}) == 1

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C_out, H', W')."""
        return self.biased(x, self.module.bias)

    def biased(self, x: Tensor, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
        """The convolution with a bias of its own, and with what is added to its answer."""
        conv = self.module
        weight = conv.weight
        if x.ndim == 4 and unwatched(conv) and quick(x, weight) and x.is_contiguous(memory_format=torch.channels_last):
            stride, numbers = conv.stride[0], weight.numel()
            pixels = x.shape[0] * x.shape[2] * x.shape[3] // (stride * stride)
            if multiplies(pixels, numbers, x) and lies_last(add):
                padding = int(conv.padding[0])
                return self.product("", weight, stride=stride, padding=padding).convolution(x, bias, add)
            kept = self.tiles or numbers <= PACKED_UP_TO
            if pixels <= self.few and kept and conv.kernel_size == (3, 3) and has_onednn() and onednn_takes(x.dtype):
                return added(self._packed(x, bias), add)
        return added(conv._conv_forward(x, weight, bias), add)

    def doubled(self, x: Tensor) -> Tensor | None:
        """The convolution of a picture whose rows and columns are repeated, (B, C, H, W) -> (B, C_out, 2 H, 2 W).

        None where that is not for our product.
        """
        conv = self.module
        small = conv.weight.numel() <= PACKED_UP_TO
        rows = 0 if small else 4 * x.shape[0] * x.shape[2] * x.shape[3]
        if (conv.kernel_size, conv.stride, conv.padding) != ((3, 3), (1, 1), (1, 1)) or not unwatched(conv):
            return None
        if not quick(x, conv.weight) or not multiplies(rows, conv.weight.numel(), x) or not lies_last(x):
            return None
        return self.product("doubled", conv.weight, padding=1, doubled=True).convolution(x, conv.bias)

    def _packed(self, x: Tensor, bias: Tensor | None) -> Tensor:
        conv = self.module
        assert isinstance(conv.padding, tuple)
        form = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
        now = stamp(conv.weight)
        if self.made is None or self.made[0] != now:
            packed = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *form, list(x.shape))
            self.made = now, packed, conv.weight
        return torch.ops.mkldnn._convolution_pointwise(x, self.made[1], bias, *form, "none", [], "")


class Residual(Way[ResnetBlock2D]):
    """A residual block that adds the time to the bias of its first convolution instead of to a picture.

    For one time for all pictures, (1, E); the sum with x is made with the second convolution's answer.
    """

    def __call__(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (1 or B, E) -> (B, C_out, H, W)."""
        block = self.module
        first, second, time = block.conv1, block.conv2, block.time_emb_proj
        if not quick(x, first.weight) or not unwatched(first, second):
            return self.plain(x, temb)
        if x.nbytes >= ROOMY:
            trim()
        h = block.norm1(x)
        if time is None or temb is None:
            h = first(h)  # (B, C_out, H, W)
        elif temb.shape[0] == 1 and first.bias is not None:
            h = convolved(first, h, time(F.silu(temb))[0] + first.bias)
        else:
            h = first(h).add_(time(F.silu(temb))[:, :, None, None])
        h = block.norm2(h)
        h = convolved(second, h, second.bias, x if block.conv_shortcut is None else block.conv_shortcut(x))
        return h if block.out_scale == 1.0 else h.div_(block.out_scale)


class Doubled(Way[Upsample2D]):
    """Repeated rows and columns that are only read: the convolution after them looks at each pixel where it lies."""

    def __call__(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        way = self.module.conv.__dict__.get("forward")
        fits = size is None or tuple(size) == (2 * x.shape[2], 2 * x.shape[3])
        if 4 * x.nbytes >= ROOMY and quick(x, self.module.conv.weight):
            trim()
        done = way.doubled(x) if fits and isinstance(way, Convolution) else None
        return self.plain(x, size) if done is None else done


class Time(Way[UNet]):
    """The time embedding of one row, (1, E), where all pictures are at the same time."""

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The U-Net's own, of fewer rows."""
        if quick(x, self.module.conv_in.weight) and isinstance(t, Tensor) and t.ndim == 1 and bool((t == t[0]).all()):
            return UNet._time(self.module, x[:1], t[:1])
        return UNet._time(self.module, x, t)


class Normed(Way[GroupNorm]):
    """Group norm and SiLU in one pass of the compiled kernel."""

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        own = self.module
        taken = x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous(memory_format=torch.channels_last)
        if not taken or not quick(x, own.weight) or available() is None:
            return self.plain(x)
        return group_norm(x, own.num_groups, own.weight, own.bias, own.eps, own.silu)


def convolved(conv: nn.Conv2d, x: Tensor, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
    """A convolution with another bias, and with what is added to its answer, in its faster way where it has one."""
    way = conv.__dict__.get("forward")
    if isinstance(way, Convolution):
        return way.biased(x, bias, add)
    return added(conv._conv_forward(x, conv.weight, bias), add)


def added(h: Tensor, add: Tensor | None) -> Tensor:
    """h with something written over it."""
    return h if add is None else h.add_(add)


def lies_last(x: Tensor | None) -> bool:
    """Whether a picture, if there is one, is channels-last."""
    return x is None or x.is_contiguous(memory_format=torch.channels_last)
