"""Repainting a part of a picture: the canvas, its mask, the part that is worked at, and putting it back.

H W height and width of the canvas. Masks are 1 (white) where the picture is repainted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from sfumato.images import to_pil, to_tensor
from sfumato.pipelines.inputs import check_same_size, resized
from sfumato.pipelines.request import Request

FADE = 0.2  # strength of a soft mask from which on the new picture stands alone
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Frame:
    """A picture of which a part is repainted.

    canvas: the whole picture as it comes back where it is not repainted, RGB.
    mask:   where it is repainted, mode L, of the canvas' size.
    box:    left, top, right and bottom of the part that is worked at.
    size:   width and height at which that part is worked at.
    weight: how much of the new picture comes back, (H, W) in [0, 1].
    filled: whether what is masked is filled from what is around it, for the network's eyes.
    """

    canvas: Image.Image
    mask: Image.Image
    box: Box
    size: tuple[int, int]
    weight: Tensor
    filled: bool = False

    @property
    def pictures(self) -> dict[str, Image.Image]:
        """The image and the mask to work at."""
        image = from_around(self.canvas, self.mask) if self.filled else self.canvas
        return {
            "image": letterbox(image.crop(self.box), self.size),
            "mask": letterbox(self.mask.crop(self.box), self.size),
        }

    def put_back(self, x: Tensor) -> Tensor:
        """The canvas (1, 3, H, W) in [-1, 1] with the new part (1, 3, h, w) in it; exactly the canvas at weight 0."""
        left, top, right, bottom = self.box
        part, inside = (right - left, bottom - top), placed((right - left, bottom - top), self.size)
        if part != self.size:
            x = to_tensor([to_pil(x)[0].crop(inside).resize(part, Image.Resampling.LANCZOS)])
        canvas = to_tensor([self.canvas]).to(x.device)
        area = (..., slice(top, bottom), slice(left, right))
        weight = self.weight[area].to(x.device)
        mixed = weight * x.clamp(-1, 1) + (1 - weight) * canvas[area]
        canvas[area] = torch.where(weight > 0, mixed, canvas[area])
        return canvas


def framed(request: Request, image: Image.Image, mask: Image.Image | None, factor: int) -> Frame:
    """The frame of a settled request. factor: picture pixels a latent pixel.

    Raises ValueError where nothing is masked.
    """
    canvas, black = image.convert("RGB"), Image.new("L", image.size)
    canvas, where = grown(canvas, black if mask is None else mask.convert("L"), request.outpaint or (0, 0, 0, 0))
    size = (request.width or canvas.width, request.height or canvas.height)
    if not request.only_masked and size != tuple(side // factor * factor for side in canvas.size):
        canvas, where = resized(canvas, *size), resized(where, *size)
    if not request.soft_mask:
        where = where.point([0] * 128 + [255] * 128)
    lit = where.getbbox()
    if lit is None:
        bright = "; what is darker than half counts as black" if not request.soft_mask and mask is not None else ""
        raise ValueError(f"the mask is black everywhere{bright}; paint white what is to be repainted")
    box = (0, 0, *canvas.size)
    if request.only_masked:
        box = around(lit, canvas.size, size, request.mask_padding or 0)
    return Frame(canvas, where, box, size, weights(where, request), request.masked_content == "fill")


def cut_out(image: Image.Image, mask: Image.Image, size: tuple[int, int], padding: int) -> Frame:
    """The frame of the part around all that is not black, put back by the mask's levels as they are.

    This is what diffusers' `padding_mask_crop` does. Raises ValueError for a mask of another size, or all black.
    """
    check_same_size(mask, image)
    where = mask.convert("L")
    lit = where.getbbox()
    if lit is None:
        raise ValueError("the mask is black everywhere; paint white what is to be repainted")
    weight = torch.from_numpy(np.asarray(where, dtype=np.float32) / 255)
    return Frame(image.convert("RGB"), where, around(lit, image.size, size, padding), size, weight)


def weights(mask: Image.Image, request: Request) -> Tensor:
    """How much of the new picture comes back, (H, W): all of it where it was repainted, fading out around.

    Soft masks fade inside as well, where they are almost black.
    """
    levels = torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255)
    weight = (levels / FADE).clamp(max=1) if request.soft_mask else levels
    if request.mask_blur:
        blurred = np.asarray(mask.filter(ImageFilter.GaussianBlur(request.mask_blur)), dtype=np.float32) / 255
        weight = torch.maximum(weight, (2 * torch.from_numpy(blurred)).clamp(max=1))
    return weight


def grown(image: Image.Image, mask: Image.Image, sides: Sequence[int]) -> tuple[Image.Image, Image.Image]:
    """Picture and mask with room at the left, right, top and bottom: masked, and in the colours of the edges."""
    if not any(sides):
        return image, mask
    left, right, top, bottom = sides
    room = np.pad(np.asarray(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
    free = np.pad(np.asarray(mask), ((top, bottom), (left, right)), constant_values=255)
    return Image.fromarray(room), Image.fromarray(free)


def around(lit: Box, whole: tuple[int, int], size: tuple[int, int], padding: int) -> Box:
    """A box around another, padded, then widened to the proportions of a size as far as the whole picture allows."""
    spans = [(lit[axis] - padding, lit[axis + 2] + padding) for axis in (0, 1)]
    spans = [(max(low, 0), min(high, limit)) for (low, high), limit in zip(spans, whole, strict=True)]
    (width, height), ratio = (high - low for low, high in spans), size[0] / size[1]
    wanted = [width, int(width / ratio)] if width / height > ratio else [int(height * ratio), height]
    (left, right), (top, bottom) = (
        widened(span, side, limit) for span, side, limit in zip(spans, wanted, whole, strict=True)
    )
    return left, top, right, bottom


def widened(span: tuple[int, int], wanted: int, limit: int) -> tuple[int, int]:
    """A span of at least the wanted length where the limit allows, about the same middle."""
    low, high = span
    more = max(wanted - (high - low), 0)
    low = max(min(low - more // 2, limit - wanted), 0) if more else low
    return low, min(low + max(wanted, high - span[0]), limit)


def placed(part: tuple[int, int], size: tuple[int, int]) -> Box:
    """Where a part lies that is fitted into a size, keeping its proportions: left, top, right, bottom."""
    (width, height), (w, h) = part, size
    wide = width * h > w * height
    inner = (w, max(height * w // width, 1)) if wide else (max(width * h // height, 1), h)
    left, top = w // 2 - inner[0] // 2, h // 2 - inner[1] // 2
    return left, top, left + inner[0], top + inner[1]


def letterbox(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture fitted into a size, keeping its proportions; its edges go on to the borders."""
    left, top, right, bottom = placed(image.size, size)
    fitted = resized(image, right - left, bottom - top)
    if fitted.size == size:
        return fitted
    pad = [(top, size[1] - bottom), (left, size[0] - right), (0, 0)]
    rows = np.asarray(fitted)
    return Image.fromarray(np.pad(rows, pad[: rows.ndim], mode="edge"))


def from_around(image: Image.Image, mask: Image.Image) -> Image.Image:
    """A picture with what is masked replaced by the colours around it (Gortler et al. 1996, pull and push).

    Means of what is known are taken on coarser and coarser grids, and fill the gaps of the finer ones.
    """
    known = 1 - torch.from_numpy(np.array(mask, dtype=np.float32))[None, None] / 255  # (1, 1, H, W)
    colours = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None]  # (1, 3, H, W)
    grids = [torch.cat([colours * known, known], 1)]
    while max(grids[-1].shape[2:]) > 1:
        grids.append(F.avg_pool2d(grids[-1], 2, ceil_mode=True, count_include_pad=False))
    *finer, last = grids
    x = last[:, :3] / last[:, 3:].clamp(min=1e-9)  # (1, 3, 1, 1)
    for grid in reversed(finer):
        x = grid[:, :3] + (1 - grid[:, 3:]) * F.interpolate(x, size=grid.shape[2:], mode="bilinear")
    return Image.fromarray(x[0].permute(1, 2, 0).round().clamp(0, 255).numpy().astype(np.uint8))
