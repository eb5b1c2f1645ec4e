"""Large pictures: networks that see them in windows, and small pictures enlarged half way.

B batch, C latent channels, h w latent height and width, H W picture height and width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sfumato.cond import Cond
from sfumato.images import to_pil, to_tensor
from sfumato.models.autoencoder import feather, starts

OVERLAP = 0.5  # of a window, over which its answer fades into the next one's


class Windows:
    """A network asked in overlapping windows, whose answers are averaged (Bar-Tal et al. 2023, MultiDiffusion).

    At one point the clean picture is linear in the network's answer, so this averages clean pictures. One window is
    evaluated at a time: memory follows the window. A picture no larger than a window is unaffected.

    side: of a window, in latent pixels.
    """

    def __init__(self, net: Callable[..., Tensor], side: int) -> None:
        self.net = net
        self.side = side

    def __call__(self, x: Tensor, t: Tensor, cond: Cond, /, *perturb: str) -> Tensor:
        """Evaluate x (B, C, h, w); further input channels are cut alike."""
        height, width = x.shape[2:]
        if max(height, width) <= self.side:
            return self.net(x, t, cond, *perturb)
        rows, columns = min(self.side, height), min(self.side, width)
        total, weight = torch.zeros_like(x), x.new_zeros(height, width)
        for top in starts(height, rows, OVERLAP):
            for left in starts(width, columns, OVERLAP):
                area = (..., slice(top, top + rows), slice(left, left + columns))
                concat = None if cond.concat is None else cond.concat[area]
                out = self.net(x[area], t, cond.part((top, left), concat), *perturb)
                down = feather(rows, round(rows * OVERLAP), top, height)
                w = (down[:, None] * feather(columns, round(columns * OVERLAP), left, width)).to(x)
                total[area] += w * out
                weight[area] += w
        return total / weight


def enlarged(
    z: Tensor,
    shape: tuple[int, int],
    upscaler: str,
    decode: Callable[[Tensor], Tensor],
    encode: Callable[[Tensor], Tensor],
) -> Tensor:
    """A latent (1, C, h, w) at another (height, width), by a name of `hires_upscaler`.

    latent:  its numbers are stretched, which is soft and asks for much strength afterwards.
    lanczos: the picture is decoded, enlarged and encoded again.
    """
    if upscaler == "latent":
        return F.interpolate(z, size=shape, mode="bilinear", align_corners=False)
    picture = decode(z)  # (1, 3, H, W)
    factor = picture.shape[2] // z.shape[2]
    (image,) = to_pil(picture)
    size = shape[1] * factor, shape[0] * factor
    return encode(to_tensor([image.resize(size, Image.Resampling.LANCZOS)]))


def slerp(share: float, low: Tensor, high: Tensor) -> Tensor:
    """Noise between two noises (C, h, w) along the arc between them: 0 is `low`, 1 is `high`.

    A1111's formula for variation seeds: an arc for each column of each channel, a straight line where the two point
    the same way.
    """
    units = (noise / noise.norm(dim=1, keepdim=True) for noise in (low, high))
    cosine = torch.stack(list(units)).prod(0).sum(1)  # (C, w)
    if float(cosine.mean()) > 0.9995:
        return low * (1 - share) + high * share
    angle = cosine.clamp(-1, 1).acos()[:, None]  # (C, 1, w)
    return ((1 - share) * angle).sin() / angle.sin() * low + (share * angle).sin() / angle.sin() * high
