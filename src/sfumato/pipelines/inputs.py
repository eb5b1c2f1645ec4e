"""Pictures that come with a request: opened, brought to size, and turned into tensors.

H W picture height and width, h w latent height and width. Pictures are resized by Lanczos' filter, as diffusers does.
A tensor is taken for a picture that somebody has prepared already, and returned as it is.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sfumato.images import to_tensor
from sfumato.pipelines.fields import MEMORY

MAX_GIVEN_SIDE = 8192


def open_picture(given: str | Image.Image, name: str) -> Image.Image:
    """A picture upright, from a path or from memory; name: the request's field, for errors.

    Raises FileNotFoundError, or ValueError for what is no picture, is empty, damaged, or too large to be unpacked, or
    is a recipe's stand-in.
    """
    if isinstance(given, Image.Image):
        check_extent(given, name)
        return ImageOps.exif_transpose(given)
    if given.startswith(MEMORY):
        raise ValueError(f"{name} was {given} when the recipe was made; give that picture again as {name}")
    if not Path(given).is_file():
        raise FileNotFoundError(f"{name}: no picture {given}")
    if not Path(given).stat().st_size:
        raise ValueError(f"{name}: {given} is empty, 0 bytes long; give a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # said below, and in pixels
            with Image.open(given) as image:
                check_extent(image, f"{name}: {given}")
                image.load()
                return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError(f"{name}: {given} is not a picture") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: PIL's word for a broken PNG
        raise ValueError(f"{name}: {given} cannot be read: {error}") from None


def check_extent(image: Image.Image, name: str) -> None:
    """ValueError for a picture without pixels, or with more than anybody wants unpacked; before it is."""
    if min(image.size) < 1:
        raise ValueError(f"{name} has {image.width}x{image.height} pixels, which is nothing; give a picture")
    if max(image.size) > MAX_GIVEN_SIDE:
        raise ValueError(
            f"{name} has {image.width}x{image.height} pixels; at most {MAX_GIVEN_SIDE} a side are taken, "
            "so make it smaller first"
        )


def check_same_size(mask: Image.Image, image: Image.Image) -> None:
    """ValueError for a mask of another size than its image."""
    if mask.size != image.size:
        raise ValueError(
            f"the mask has {mask.width}x{mask.height} pixels and the image {image.width}x{image.height}; "
            "give a mask of the image's size"
        )


def picture(image: Image.Image | Tensor, width: int, height: int) -> Tensor:
    """An RGB picture at a size, (1, 3, H, W) in [-1, 1]."""
    if isinstance(image, Tensor):
        return image
    return to_tensor([resized(image.convert("RGB"), width, height)])


def repaint_mask(image: Image.Image | Tensor, width: int, height: int) -> Tensor:
    """1 where a mask is bright and the picture is to be repainted, 0 where it is kept: (1, 1, H, W)."""
    return image if isinstance(image, Tensor) else (soft_mask(image, width, height) > 0.5).float()


def soft_mask(image: Image.Image | Tensor, width: int, height: int) -> Tensor:
    """How far each pixel of a picture is to be repainted, from 0 to 1: (1, 1, H, W)."""
    if isinstance(image, Tensor):
        return image
    levels = np.array(resized(image.convert("L"), width, height), dtype=np.float32)  # (H, W)
    return torch.from_numpy(levels / 255)[None, None]


def depth_map(image: Image.Image | Tensor, width: int, height: int) -> Tensor:
    """A depth map brought to latent size and to [-1, 1]: (1, 1, h, w). width, height: of the latent.

    Numbers of any range and precision (modes L, I and F); a coloured map is read as grey.
    Raises ValueError for a map that is the same everywhere.
    """
    if isinstance(image, Tensor):
        return image
    grey = image if image.mode in ("I", "F", "I;16", "I;16B", "L") else image.convert("L")
    depth = torch.from_numpy(np.array(grey, dtype=np.float32))[None, None]  # (1, 1, H, W)
    depth = F.interpolate(depth, size=(height, width), mode="bicubic", align_corners=False)  # (1, 1, h, w)
    low, high = depth.min(), depth.max()
    if not high > low:
        raise ValueError(f"depth is {low.item():g} everywhere; give a map that tells near from far")
    return 2 * (depth - low) / (high - low) - 1


def resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture itself where it has the size already."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS)
