"""Pictures as notebooks hand them over and take them: PIL, arrays and tensors, one or several.

B pictures, H W height and width, C channels. Sizes, filters and ranges are those of diffusers' VaeImageProcessor.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sfumato.images import to_pil
from sfumato.pipelines.inputs import check_extent

FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}
FORMS = ("pil", "np", "pt", "latent")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageProcessor:
    """Pictures to tensors and back.

    factor:    sides are cut to multiples of it.
    resample:  the filter for PIL pictures; arrays and tensors are resized to the nearest pixel.
    mask:      one channel, 0 and 1, instead of colours in [-1, 1].
    channels:  of latents; a tensor with as many is one and stays as it is.
    """

    factor: int = 8
    resample: str = "lanczos"
    mask: bool = False
    channels: int = 4

    def preprocess(self, image: Any, height: int | None = None, width: int | None = None) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], or masks (B, 1, H, W); sizes default to the first picture's.

        image: PIL, an array (H, W, C) or (B, H, W, C) in [0, 1], a tensor (C, H, W) or (B, C, H, W) in [0, 1], or a
               list of one kind. A range that goes below 0 is taken for [-1, 1].
        Raises ValueError for anything else.
        """
        given = list(image) if isinstance(image, list | tuple) else [image]
        if not given:
            raise ValueError("image is an empty list; give one picture or more")
        if all(isinstance(one, Image.Image) for one in given):
            for one in given:
                check_whole(one, "mask_image" if self.mask else "image")
            x = self._from_pil(given, height, width)
        elif all(isinstance(one, np.ndarray) for one in given):
            x = self._resized(torch.cat([self._from_array(one) for one in given]), height, width)
        elif all(isinstance(one, Tensor) for one in given):
            x = torch.cat([self._from_tensor(one) for one in given])  # (B, C, H, W)
            if x.shape[1] == self.channels:
                return x
            x = self._resized(x, height, width)
        else:
            kinds = ", ".join(sorted({type(one).__name__ for one in given}))
            raise ValueError(f"image is {kinds}; give PIL pictures, arrays or tensors, all of one kind")
        if x.shape[1] != (1 if self.mask else 3):
            what = "a mask has 1" if self.mask else "a picture has 3"
            raise ValueError(f"image has {x.shape[1]} channels; {what}")
        if self.mask:
            return (x >= 0.5).float()
        if x.min() < 0:
            log.info("the picture's numbers go below 0, so they are taken to lie in [-1, 1]")
            return x
        return 2 * x - 1

    def postprocess(self, image: Tensor, output_type: str = "pil", do_denormalize: Sequence[bool] | None = None) -> Any:
        """Pictures (B, 3, H, W) in [-1, 1] as PIL pictures, an array (B, H, W, 3) or a tensor in [0, 1].

        "latent" gives back what it is given. do_denormalize: False for a picture that is in [0, 1] already.
        """
        check_form(output_type)
        if output_type == "latent":
            return image
        todo = [True] * len(image) if do_denormalize is None else do_denormalize
        x = torch.stack([self.denormalize(row) if do else row for row, do in zip(image, todo, strict=True)])
        if output_type == "pt":
            return x
        return self.pt_to_numpy(x) if output_type == "np" else to_pil(2 * x - 1)

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """Arrays (H, W, C) or (B, H, W, C) in [0, 1] as PIL pictures, grey where there is one channel."""
        rows = (images[None] if images.ndim == 3 else images) * 255
        levels = rows.round().astype(np.uint8)
        return [Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row) for row in levels]

    @staticmethod
    def pil_to_numpy(images: Image.Image | Sequence[Image.Image]) -> np.ndarray:
        """PIL pictures of one size as an array (B, H, W, C) in [0, 1]."""
        rows = [images] if isinstance(images, Image.Image) else images
        return np.stack([np.asarray(row).astype(np.float32) / 255 for row in rows])

    @staticmethod
    def numpy_to_pt(images: np.ndarray) -> Tensor:
        """(B, H, W, C) or (B, H, W) to (B, C, H, W)."""
        rows = images[..., None] if images.ndim == 3 else images
        return torch.from_numpy(rows.transpose(0, 3, 1, 2))

    @staticmethod
    def pt_to_numpy(images: Tensor) -> np.ndarray:
        """(B, C, H, W) to (B, H, W, C), float32."""
        return np.asarray(images.detach().cpu().permute(0, 2, 3, 1).float().numpy())

    @staticmethod
    def normalize(images: Any) -> Any:
        """[0, 1] to [-1, 1]."""
        return 2 * images - 1

    @staticmethod
    def denormalize(images: Tensor) -> Tensor:
        """[-1, 1] to [0, 1]; what lies outside is clipped."""
        return (images * 0.5 + 0.5).clamp(0, 1)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        cut = height - height % self.factor, width - width % self.factor
        if 0 in cut:
            raise ValueError(f"a picture of {width}x{height} pixels; each side needs {self.factor} or more")
        return cut

    def _from_pil(self, images: Sequence[Image.Image], height: int | None, width: int | None) -> Tensor:
        high, wide = self._size(height or images[0].height, width or images[0].width)
        if not self.mask:
            images = [one.convert("RGB") for one in images]
        images = [one.resize((wide, high), FILTERS[self.resample]) for one in images]
        if self.mask:
            images = [one.convert("L") for one in images]
        return self.numpy_to_pt(self.pil_to_numpy(images))

    def _from_array(self, image: np.ndarray) -> Tensor:
        if image.dtype == np.uint8:
            image = image.astype(np.float32) / 255
        if image.ndim == 3 and not (self.mask and image.shape[-1] != 1):
            image = image[None]  # (1, H, W, C); a mask without channels is (B, H, W)
        if image.ndim not in (2, 3, 4):
            raise ValueError(f"an array of shape {image.shape} is no picture; give (H, W, 3) or (B, H, W, 3)")
        return self.numpy_to_pt(image[None] if image.ndim == 2 else image).float()

    def _from_tensor(self, image: Tensor) -> Tensor:
        if image.ndim == 2:
            image = image[None]
        if image.ndim == 3:
            image = image[:, None] if self.mask else image[None]
        if image.ndim != 4:
            raise ValueError(f"a tensor of shape {tuple(image.shape)} is no picture; give (3, H, W) or (B, 3, H, W)")
        return image.float()

    def _resized(self, x: Tensor, height: int | None, width: int | None) -> Tensor:
        return F.interpolate(x, size=self._size(height or x.shape[2], width or x.shape[3]))


def check_whole(image: Image.Image, name: str) -> None:
    """ValueError for a picture that is damaged, empty, or too large."""
    check_extent(image, name)
    try:
        image.load()
    except (OSError, SyntaxError) as error:  # the latter is PIL's word for a broken PNG
        raise ValueError(f"{name}: {getattr(image, 'filename', '') or 'the picture'} cannot be read: {error}") from None


def check_form(output_type: str) -> None:
    """ValueError unless an output_type is known."""
    if output_type not in FORMS:
        raise ValueError(f"unknown output_type {output_type!r}; known: {', '.join(FORMS)}")
