"""Depth from a picture: how near each of its pixels is, as Stable Diffusion 2 depth is told.

B batch, H W height and width of the picture, H' W' as the network sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sfumato.models.config import check_choice, frozen, thawed
from sfumato.models.dpt import DPTConfig, DPTModel, Head, Neck


@dataclass(frozen=True)
class DPTProcessorConfig:
    """The entries of `feature_extractor/preprocessor_config.json`: how a picture is brought to the network's size.

    Defaults are those of the published estimators.

    size:               height and width.
    keep_aspect_ratio:  scale both sides alike, as little as one of the two asks for.
    ensure_multiple_of: each side is rounded to a multiple of it.
    resample:           PIL's number of the filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic.
    image_mean, image_std: of pictures in [0, 1], by channel.
    """

    size: tuple[int, int] = (384, 384)
    keep_aspect_ratio: bool = False
    ensure_multiple_of: int = 1
    resample: int = 2
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        check_choice("DPTProcessorConfig: resample", self.resample, (0, 1, 2, 3, 4, 5))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DPTProcessorConfig:
        """Read the entries of a `preprocessor_config.json`, new or old; ValueError on steps that are not supported."""
        for name in ("do_resize", "do_rescale", "do_normalize"):
            check_choice(f"DPTProcessorConfig: {name}", raw.get(name, True), (True, None))
        for name in ("do_pad", "do_center_crop"):
            check_choice(f"DPTProcessorConfig: {name}", raw.get(name, False), (False, None))
        if abs(raw.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise ValueError(
                f"DPTProcessorConfig: rescale_factor = {raw['rescale_factor']} is not supported; use 1 / 255"
            )
        fields = {k: frozen(v) for k, v in raw.items() if k in cls.__dataclass_fields__ and v is not None}
        size = fields.get("size", cls.size)
        if isinstance(size, Mapping):
            if not size.keys() >= {"height", "width"}:
                raise ValueError(f"DPTProcessorConfig: size = {dict(size)}; give height and width")
            size = size["height"], size["width"]
        return cls(**fields | {"size": size if isinstance(size, tuple) else (size, size)})

    def to_dict(self) -> dict[str, Any]:
        """The entries of a `preprocessor_config.json` that transformers and diffusers open as well."""
        fields = {k: thawed(getattr(self, k)) for k in self.__dataclass_fields__}
        return {
            "image_processor_type": "DPTImageProcessor",
            "do_resize": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "do_pad": False,
            **fields,
            "size": {"height": self.size[0], "width": self.size[1]},
        }

    def pixel_values(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] as the network takes them: (B, 3, H', W'), float32, on the CPU.

        They are resized in 8 bits, as pictures of files are, so that estimates are those of other programs.
        """
        height, width = self.target(pictures.shape[2], pictures.shape[3])
        levels = ((pictures.float() / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
        rows = levels.permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
        filter_ = Image.Resampling(self.resample)
        resized = np.stack([np.asarray(Image.fromarray(row).resize((width, height), filter_)) for row in rows])
        x = torch.from_numpy(resized).permute(0, 3, 1, 2) / 255  # (B, 3, H', W')
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.image_mean, self.image_std))
        return (x - mean) / std

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that a picture of the given ones is resized to."""
        scales = [self.size[0] / height, self.size[1] / width]
        if self.keep_aspect_ratio:
            scales = [min(reversed(scales), key=lambda scale: abs(1 - scale))] * 2
        step = self.ensure_multiple_of
        rows, columns = (max(round(n * scale / step), 1) for n, scale in zip((height, width), scales, strict=True))
        return rows * step, columns * step


@dataclass(frozen=True)
class DepthOutput:
    """What the network says of B pictures: predicted_depth (B, H, W), larger where it is nearer."""

    predicted_depth: Tensor


class DepthEstimator(nn.Module):
    """Pictures to how near each of their pixels is; parameters named as in `depth_estimator/`.

    processor: how `estimate` brings pictures to the network's size, from `feature_extractor/`.
    """

    def __init__(self, config: DPTConfig, processor: DPTProcessorConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.processor = DPTProcessorConfig() if processor is None else processor
        self.dpt = DPTModel(config)
        self.neck = Neck(config)
        self.head = Head(config.fusion_hidden_size)

    def forward(self, pixel_values: Tensor) -> DepthOutput:
        """Pictures as the processor makes them, (B, 3, H, W), of any height and width that the patch divides.

        Raises ValueError for others.
        """
        patch = self.config.patch_size
        h, w = (size // patch for size in pixel_values.shape[2:])
        if pixel_values.shape[2:] != (h * patch, w * patch) or not h * w:
            raise ValueError(
                f"a picture of {pixel_values.shape[3]} x {pixel_values.shape[2]} pixels for the depth estimator; "
                f"use multiples of {patch}"
            )
        x = self.neck(self.dpt(pixel_values), h, w)  # (B, C, 8 h, 8 w)
        return DepthOutput(self.head(x).squeeze(1))  # (B, H, W)

    @torch.no_grad()
    def predict(self, pictures: Tensor) -> Tensor:
        """How near the pixels of pictures (B, 3, H, W) in [-1, 1] are, at the network's own size.

        (B, 1, H', W'), float32, from 0 for the far end, in no unit. Whatever the pictures' device and dtype, the
        network's are used.
        """
        weight = next(self.parameters())
        pixels = self.processor.pixel_values(pictures).to(weight.device, weight.dtype)
        return self(pixels).predicted_depth[:, None].float()

    def estimate(self, pictures: Tensor) -> Tensor:
        """The same at the pictures' size: (B, 3, H, W) -> (B, 1, H, W)."""
        return F.interpolate(self.predict(pictures), size=pictures.shape[2:], mode="bicubic", align_corners=False)


def depth_channel(depth: Tensor, height: int, width: int) -> Tensor:
    """Depth as the U-Net of a depth model takes it: any (B, 1, H, W) to (B, 1, height, width) in [-1, 1].

    height, width: of the latent. Each picture's own range is stretched to [-1, 1].
    Raises ValueError for a map that is the same everywhere.
    """
    depth = F.interpolate(depth.float(), size=(height, width), mode="bicubic", align_corners=False)
    low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    if not bool((high > low).all()):
        flat = low[~(high > low)][0].item()
        raise ValueError(f"depth is {flat:g} everywhere; give a map that tells near from far")
    return 2 * (depth - low) / (high - low) - 1
