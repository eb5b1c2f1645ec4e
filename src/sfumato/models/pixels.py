"""Pixel models: a picture folded into more channels at fewer places stands where others have an autoencoder's latent.

B batch, H W height and width of the picture, f the factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.cond import Cond
from sfumato.models.unet import UNet

UNSEEN = 0.12  # deviation of what is guessed of pixels that were not seen
REACHES = 5, 15  # sides of the surroundings that a pixel is compared with
LEAST = 0.02  # the least deviation that a guess is taken to have


@dataclass(frozen=True)
class FoldConfig:
    """factor: pixels a side that become channels of one place."""

    factor: int = 2
    latent_channels: int = 12


class Fold(nn.Module):
    """Folds f x f pixels into channels and back, exactly; it has no parameters.

    A network behind it sees every pixel at 1 / f² of the places, and noise stays what it was: each number of the
    one is a number of the other.
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.config = FoldConfig(factor, 3 * factor * factor)

    def to_latents(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to (B, 3 f², H / f, W / f); nothing is drawn."""
        return F.pixel_unshuffle(x, self.config.factor)

    def to_pixels(self, z: Tensor) -> Tensor:
        """(B, 3 f², H / f, W / f) to pictures (B, 3, H, W)."""
        return F.pixel_shuffle(z, self.config.factor)

    def hint(self, guess: Tensor, shown: Tensor, sharpness: Tensor, noise: float | Tensor) -> Tensor:
        """What a network is told of a degraded picture: (B, 7 f² + 1, H / f, W / f).

        guess (B, 3, H, W): a first restoration. shown (B, 3, H, W): what was seen, at the picture's size.
        sharpness (B, 1, H, W): how well each pixel was seen, 0 to 1.
        noise: deviation of the noise that was in it, a number or (B, 1, 1, 1).
        """
        places = self.to_latents(guess)
        level = torch.as_tensor(noise, dtype=guess.dtype, device=guess.device).expand_as(places[:, :1])
        return torch.cat([places, self.to_latents(shown), self.to_latents(sharpness), level], dim=1)

    def doubt(self, hint: Tensor) -> Tensor:
        """The deviation that is expected of a hint's guess, for each of its numbers: (B, 3 f², H / f, W / f).

        The noise of what was seen, and UNSEEN for pixels that were not seen at all.
        """
        places = self.config.latent_channels
        sharpness, noise = hint[:, 2 * places : -1], hint[:, -1:]
        doubt = (noise.square() + (UNSEEN * (1 - sharpness)).square()).sqrt().clamp(min=LEAST)
        return doubt.repeat(1, 3, 1, 1)


class Hinted:
    """A U-Net whose task is only what a noisy picture and a guess together leave open.

    The best mean of the two, by their deviations, is the ground; the network is asked for the rest in units of what
    deviation remains (Karras et al. 2022, section 5, with the guess in the place of "all pictures"). So where it says
    nothing, the guess comes out.
    """

    def __init__(self, unet: UNet, fold: Fold) -> None:
        self.unet, self.fold = unet, fold

    def ground(self, x: Tensor, alpha: Tensor, sigma: Tensor, hint: Tensor) -> tuple[Tensor, Tensor]:
        """The mean, and the deviation that remains, both like x; alpha, sigma: (B, 1, 1, 1)."""
        guess = hint[:, : x.shape[1]]
        trust, light = self.fold.doubt(hint).square().reciprocal(), (alpha / sigma).square()
        left = (trust + light).reciprocal()
        return left * (trust * guess + light / alpha.clamp(min=1e-6) * x), left.sqrt()

    def rest(self, t: Tensor, mean: Tensor, left: Tensor, hint: Tensor) -> Tensor:
        """What the network says of (x0 - mean) / left, like them.

        The mean stands for x: it holds all that x adds to the guess, and at pure noise that is nothing, where x would
        be chaff. The network also sees how the mean differs from its surroundings, near and wide, in the same units:
        most of that is what remains, and no network would have to learn how strong it is.
        """
        pixels = self.fold.to_pixels(mean)
        near, wide = (F.avg_pool2d(pixels, n, 1, n // 2, count_include_pad=False) for n in REACHES)
        details = [(self.fold.to_latents(v) / left).clamp(-5, 5) for v in (pixels - near, near - wide)]
        seen = torch.cat([hint, *details], dim=1)
        mean, seen = (v.contiguous(memory_format=torch.channels_last) for v in (mean, seen))
        return self.unet(mean, t, Cond(concat=seen))

    def x0(self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, hint: Tensor) -> Tensor:
        """The clean picture, folded."""
        mean, left = self.ground(x, alpha, sigma, hint)
        return mean + left * self.rest(t, mean, left, hint)
