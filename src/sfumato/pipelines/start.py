"""Starts: where a task's denoising begins. A task is its start; none has a loop of its own.

A start draws its noise from the picture's own generator in the order in which diffusers' pipeline for the task
draws from its one, so that equal seeds give equal pictures.

C latent channels, h w latent height and width, H W picture height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sfumato.diffusion.guidance import Guidance
from sfumato.diffusion.keep import Keep
from sfumato.diffusion.path import Point, add_noise
from sfumato.diffusion.samplers import Sampler
from sfumato.diffusion.scheduler import Plan, Scheduler
from sfumato.models.autoencoder import AutoencoderKL
from sfumato.models.depth import DepthEstimator, depth_channel
from sfumato.pipelines import inputs
from sfumato.pipelines.enlarge import slerp
from sfumato.pipelines.memory import in_tiles_if_need_be
from sfumato.presets import Task
from sfumato.weights.parts import VAE


@dataclass(frozen=True)
class Start:
    """One picture before its first step.

    x:       the noisy latent (1, C, h, w), float32, at grid[0].
    grid:    the points to visit, from noise to data.
    sampler: the coroutine that goes along them.
    concat:  further input channels for the network (1, C', h, w); None where the task has none.
    label:   an integer for the network, (1, 1); None where the task has none.
    wrap:    what goes around the guidance; None where nothing does.
    """

    x: Tensor
    grid: Sequence[Point]
    sampler: Sampler
    concat: Tensor | None = None
    label: Tensor | None = None
    wrap: Callable[[Guidance], Guidance] | None = None


@dataclass(frozen=True)
class Setting:
    """What a start has to work with.

    plan:    the whole way from noise to data.
    shape:   of the latent, (1, C, h, w).
    generator: None is torch's own.
    eps:     standard noise to begin with; None draws it from the generator, where the task needs it.
    images:  the request's pictures by the name of their field; tensors are ready as they are, see `inputs`. `kept`
             are latents of what is not masked, where somebody has encoded that.
    strength, noise_level: the request's, 1 and 0 where they mean nothing.
    content: what stands in the masked part at first; see the request; `fill` was done before.
    soft:    the levels of the mask say how far each pixel is repainted.
    variation: (seed, share) of other noise that is mixed into the noise to begin with; None mixes none.
    device, dtype: of the networks.
    """

    plan: Plan
    shape: tuple[int, int, int, int]
    generator: torch.Generator | None
    vae: VAE
    device: torch.device
    dtype: torch.dtype
    eps: Tensor | None = None
    images: Mapping[str, Image.Image | Tensor] = field(default_factory=dict)
    strength: float = 1.0
    noise_level: int = 0
    low_res_scheduler: Scheduler | None = None
    depth_estimator: DepthEstimator | None = None
    content: str = "original"
    soft: bool = False
    variation: tuple[int, float] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture."""
        factor = self.vae.config.factor
        return self.shape[3] * factor, self.shape[2] * factor

    def noise(self) -> Tensor:
        """The noise to begin with, (1, C, h, w) float32."""
        eps = self.drawn(self.shape) if self.eps is None else self.eps
        if self.variation is not None:
            seed, share = self.variation
            other = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))
            eps = slerp(share, eps[0], other[0].to(eps))[None]
        return eps.to(self.device)

    def drawn(self, shape: Sequence[int]) -> Tensor:
        """Standard noise, the generator's next."""
        return torch.randn(tuple(shape), generator=self.generator)

    def latents(self, x: Tensor) -> Tensor:
        """The latent (1, C, h, w), float32, of a picture (1, 3, H, W), drawn from its distribution."""
        x = x.to(self.device, self.vae.dtype)
        return in_tiles_if_need_be(self.vae, lambda: self.vae.to_latents(x, self.generator)).float()

    def mask(self, h: int, w: int) -> Tensor:
        """How far each latent pixel is repainted, (1, 1, h, w): as far as the picture's pixel that asks for most."""
        mask = self.images["mask"]
        if isinstance(mask, Tensor):  # somebody's own, read as diffusers reads it
            return F.interpolate(mask, size=(h, w)).to(self.device)
        read = inputs.soft_mask if self.soft else inputs.repaint_mask
        return F.adaptive_max_pool2d(read(mask, *self.size), (h, w)).to(self.device)

    def from_noise(self, eps: Tensor, concat: Tensor | None = None, label: Tensor | None = None) -> Start:
        """Begin with nothing but noise, at the first point of the plan."""
        plan = self.plan
        return Start(eps * plan.init_scale, plan.grid, plan.sampler, concat, label)

    def from_image(self, z: Tensor, eps: Tensor, concat: Tensor | None = None) -> Start:
        """Begin with a latent z under noise, so far along the grid that `strength` of the steps remain."""
        sampler, grid = remaining(self.plan, self.strength)
        return Start(add_noise(z, eps, grid[0]), grid, sampler, concat)


def remaining(plan: Plan, strength: float) -> tuple[Sampler, Sequence[Point]]:
    """The sampler and the points of a way that is entered where a share `strength` of the steps is left."""
    first = skipped(len(plan.grid) - 1, strength)
    return plan.sampler if first == 0 else plan.midway or plan.sampler, plan.grid[first:]


def skipped(steps: int, strength: float) -> int:
    """How many of the steps are left out at the beginning; ValueError where none would remain."""
    left = min(int(steps * strength), steps)
    if left < 1:
        raise ValueError(f"strength = {strength:g} of {steps} steps leaves none; give at least {1 / steps:.4g}")
    return steps - left


def plain(s: Setting) -> Start:
    """From noise; from an image where there is one (Meng et al. 2022, SDEdit), and within its mask."""
    if "image" not in s.images:
        return s.from_noise(s.noise())
    z = s.latents(inputs.picture(s.images["image"], *s.size))
    eps = s.noise()
    return s.from_image(z, eps) if "mask" not in s.images else keeping(s, z, eps)


def keeping(s: Setting, z: Tensor, eps: Tensor, concat: Tensor | None = None) -> Start:
    """From a latent z under noise, whose part outside of the mask is put back at each step."""
    strength = s.mask(*s.shape[2:])  # (1, 1, h, w)
    bare = {"noise": eps, "nothing": torch.zeros_like(z)}.get(s.content)
    begin = z if bare is None else torch.lerp(z, bare, strength)
    bare_start = s.strength == 1
    start = s.from_noise(eps, concat) if bare_start else s.from_image(begin, eps, concat)
    keep = partial(Keep, z=z, eps=eps, strength=strength, grid=start.grid, from_noise=bare_start)
    return replace(start, wrap=keep)


def inpaint(s: Setting) -> Start:
    """Five channels more: the mask at latent size, and the latent of the picture with grey for what is masked."""
    image = inputs.picture(s.images["image"], *s.size)  # (1, 3, H, W)
    mask = inputs.repaint_mask(s.images["mask"], *s.size)  # (1, 1, H, W)
    z = s.latents(image) if s.strength < 1 or s.soft else None
    eps = s.noise()
    given = s.images.get("kept")
    kept = given.to(s.device).float() if isinstance(given, Tensor) else s.latents(image * (1 - mask))
    small = F.interpolate(mask, size=s.shape[2:]).to(s.device)  # (1, 1, h, w)
    concat = torch.cat([small, kept], dim=1)  # (1, 1 + C, h, w)
    if z is not None and (s.soft or s.content in ("noise", "nothing")):
        return keeping(s, z, eps, concat)
    return s.from_noise(eps, concat) if z is None else s.from_image(z, eps, concat)


def depth(s: Setting) -> Start:
    """One channel more, the depth, given or estimated; the image is under it also at strength 1."""
    z = s.latents(inputs.picture(s.images["image"], *s.size))
    if "depth" in s.images:
        concat = inputs.depth_map(s.images["depth"], s.shape[3], s.shape[2])
    elif s.depth_estimator is not None:
        image = s.images["image"]
        whole = image if isinstance(image, Tensor) else inputs.picture(image, *image.size)
        concat = depth_channel(s.depth_estimator.predict(whole), s.shape[2], s.shape[3])
    else:
        raise ValueError("this model has no depth_estimator, which makes depth of an image; give depth as a picture")
    return s.from_image(z, s.noise(), concat.to(s.device))


def instruct(s: Setting) -> Start:
    """As many channels again: the most likely latent of the image, not scaled (Brooks et al. 2023)."""
    if not isinstance(s.vae, AutoencoderKL):
        raise ValueError(
            f"a model that follows instructions needs an AutoencoderKL; this one has {type(s.vae).__name__}"
        )
    image = inputs.picture(s.images["image"], *s.size).to(s.device, s.vae.dtype)
    return s.from_noise(s.noise(), s.vae.encode(image).latent_dist.mode().float())


def upscale(s: Setting) -> Start:
    """Three channels more, the small picture under some noise, and how much of it as the label."""
    if s.low_res_scheduler is None:
        raise ValueError("this upscaler has no low_res_scheduler, which says how its small picture is noised")
    small = inputs.picture(s.images["image"], s.shape[3], s.shape[2])  # (1, 3, h, w)
    eps = s.drawn(small.shape)
    noised = add_noise(small, eps, s.low_res_scheduler.path.point(s.noise_level)).to(s.device)
    label = torch.tensor([[s.noise_level]], device=s.device)  # (1, 1)
    return s.from_noise(s.noise(), noised, label)


STARTS: Mapping[Task, Callable[[Setting], Start]] = MappingProxyType(
    {
        "text": plain,
        "class": plain,
        "unconditional": plain,
        "inpaint": inpaint,
        "depth": depth,
        "instruct": instruct,
        "upscale": upscale,
    }
)
