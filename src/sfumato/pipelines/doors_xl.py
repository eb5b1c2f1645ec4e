"""The front doors to Stable Diffusion XL: those of `doors.py`, told of two texts and of sizes, for two models in turn.

B pictures in a call, L tokens, D width, P width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from sfumato.diffusion.samplers import Sampler
from sfumato.models.clip import CLIPTextModel
from sfumato.models.unet import UNet
from sfumato.pipelines import sizes
from sfumato.pipelines.call import Call
from sfumato.pipelines.doors import (
    Maker,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from sfumato.pipelines.refine import before, until
from sfumato.pipelines.request import Request
from sfumato.pipelines.start import Start
from sfumato.pipelines.together import Together, Words
from sfumato.text.encode import encode_prompts
from sfumato.text.tokenizer import ClipTokenizer
from sfumato.weights.parts import VAE, Components

TOLD = (*sizes.SAID,)


@dataclass
class XLCall(Call):
    """What these doors take besides, with diffusers' meaning.

    prompt_2, negative_prompt_2: other texts for the second tower; else it reads the same.
    pooled_prompt_embeds, negative_pooled_prompt_embeds: (B, P), beside prompt_embeds.
    denoising_end:   share of the noise levels after which to stop, with the noise that is left.
    denoising_start: share that another model has been through; the image is what it left, latents.
    Sizes, crops and scores: see `Request`.
    """

    guidance_scale: float = 5.0
    prompt_2: str | Sequence[str] | None = None
    negative_prompt_2: str | Sequence[str] | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    original_size: Sequence[int] | None = None
    crops_coords_top_left: Sequence[int] | None = None
    target_size: Sequence[int] | None = None
    negative_original_size: Sequence[int] | None = None
    negative_crops_coords_top_left: Sequence[int] | None = None
    negative_target_size: Sequence[int] | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None

    def __post_init__(self) -> None:
        for name in ("denoising_start", "denoising_end"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise ValueError(f"{name} = {share!r}; give a share between 0 and 1, or leave it out")
        for states, pooled in (
            ("prompt_embeds", "pooled_prompt_embeds"),
            ("negative_prompt_embeds", "negative_pooled_prompt_embeds"),
        ):
            if (getattr(self, states) is None) != (getattr(self, pooled) is None):
                raise ValueError(f"{states} and {pooled} belong together; give both, or neither")


@dataclass
class XLInpaintCall(XLCall):
    """The same where guidance is stronger unless said otherwise."""

    guidance_scale: float = 7.5


class XL(Maker):
    """What the doors to Stable Diffusion XL share; the refiner has the second text tower alone."""

    calls: ClassVar[type[Call]] = XLCall
    families: ClassVar[Mapping[int, str]] = {0: "StableDiffusionXLPipeline"}
    mends: ClassVar[Mapping[str, object]] = {}

    def __init__(
        self,
        *,
        vae: VAE,
        text_encoder: CLIPTextModel | None,
        text_encoder_2: CLIPTextModel,
        tokenizer: ClipTokenizer | None,
        tokenizer_2: ClipTokenizer,
        unet: UNet,
        scheduler: Any,
        force_zeros_for_empty_prompt: bool = True,
        **others: Any,
    ) -> None:
        self._check_others(others)
        parts = Components(
            unet,
            vae,
            text_encoder,
            tokenizer,
            scheduler,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        )
        self._take(parts, None, "custom")

    def _tower(self, parts: Components) -> tuple[ClipTokenizer, CLIPTextModel]:
        if not parts.towers.paired or not parts.towers.clips:
            raise ValueError(f"{type(self).__name__} is for Stable Diffusion XL; open this model with sfumato.load")
        return parts.towers.clips[0]

    @property  # type: ignore[override]
    def text_encoder(self) -> CLIPTextModel | None:
        """The first text tower; None in the refiner."""
        return cast("CLIPTextModel | None", self._pipe.text_encoder)

    @text_encoder.setter
    def text_encoder(self, text_encoder: CLIPTextModel | None) -> None:
        self._pipe.text_encoder = text_encoder
        self._dress_anew()

    @property  # type: ignore[override]
    def tokenizer(self) -> ClipTokenizer | None:
        """Its tokenizer; None in the refiner."""
        return self._adapted.tokenizer()

    @tokenizer.setter
    def tokenizer(self, tokenizer: ClipTokenizer | None) -> None:
        self._pipe.tokenizer = tokenizer
        self._dress_anew()

    def upcast_vae(self) -> None:
        """Have the autoencoder compute in float32, which one with `force_upcast` does in half precision anyway."""
        if self._pipe.memory == "fast":
            self.vae.to(dtype=torch.float32)

    def _checked(self, call: Call, **numbers: Any) -> Request:
        said = {name: getattr(call, name) for name in TOLD}
        return super()._checked(call, **numbers, **{name: value for name, value in said.items() if value is not None})

    def encode_prompt(  # type: ignore[override]  # four tensors, as there
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Token states (B, L, D) of prompts and negative ones, then pooled texts (B, P) of both; None without guidance.

        Texts mean what they say, and are cut to one chunk. A negative prompt that is None is zeros, where the model
        wants it. clip_skip counts the layers left out, for `prompt` alone. ValueError when numbers of prompts differ.
        """
        with self._adapted.scaled(lora_scale):
            states, pooled = prompt_embeds, pooled_prompt_embeds
            if states is None or pooled is None:
                states, pooled = self._read(listed(prompt), listed(prompt_2 or prompt), clip_skip or 0)
            negative, negative_pooled = negative_prompt_embeds, negative_pooled_prompt_embeds
            if do_classifier_free_guidance and (negative is None or negative_pooled is None):
                if negative_prompt is None and self._pipe.force_zeros_for_empty_prompt:
                    negative, negative_pooled = torch.zeros_like(states), torch.zeros_like(pooled)
                else:
                    texts = repeated(negative_prompt or "", len(states))
                    negative, negative_pooled = self._read(
                        texts, repeated(negative_prompt_2 or negative_prompt or "", len(states)), 0
                    )

        def each(part: Tensor | None) -> Tensor | None:
            if part is None:
                return None
            return part.to(device or self.device, self.dtype).repeat_interleave(num_images_per_prompt, dim=0)

        if not do_classifier_free_guidance:
            negative = negative_pooled = None
        return cast(Tensor, each(states)), each(negative), cast(Tensor, each(pooled)), each(negative_pooled)

    def _read(self, texts: Sequence[str], texts_2: Sequence[str], clip_skip: int) -> tuple[Tensor, Tensor]:
        """States (B, L, D) side by side in width, and what the last tower projects (B, P)."""
        pairs = zip(self._adapted.clips, (texts, texts_2), strict=False)
        conds = [encode_prompts(*clip, some, clip_skip, bare=True) for clip, some in pairs]
        pooled = conds[-1].pooled
        assert pooled is not None
        return torch.cat([cast(Tensor, cond.context) for cond in conds], dim=-1), pooled

    def _words(self, call: Call, guides: bool, size: tuple[int, int], request: Request) -> Words:
        assert isinstance(call, XLCall)
        cond, uncond, pooled, uncond_pooled = self.encode_prompt(
            call.prompt,
            call.prompt_2,
            self.device,
            call.num_images_per_prompt or 1,
            guides,
            call.negative_prompt,
            call.negative_prompt_2,
            call.prompt_embeds,
            call.negative_prompt_embeds,
            call.pooled_prompt_embeds,
            call.negative_pooled_prompt_embeds,
            clip_skip=call.clip_skip,
        )
        preset = self._pipe.preset
        count = sizes.told(preset.denoiser, preset.texts)

        def told(pooled: Tensor | None, negative: bool) -> Tensor | None:
            if pooled is None:
                return None
            row = sizes.numbers(request, count, size, negative).to(pooled.device)
            return torch.cat([pooled.float(), row.expand(len(pooled), -1)], dim=1)

        return Words(cond, uncond, told(pooled, False), told(uncond_pooled, True))

    def _begun(self, call: Call, setting: Together) -> Start:
        """Where a call begins, and where it ends; what another model has begun goes on without new noise."""
        assert isinstance(call, XLCall)
        plan, scheduler = setting.plan, self.scheduler
        if call.denoising_start is None:
            start = super()._begun(call, setting)
        else:
            done = self._steps("denoising_start", call.denoising_start, plan.grid)
            grid, sampler = plan.grid[done:], plan.midway or plan.sampler
            z = setting.latents(cast(Tensor, setting.images["image"]))
            start = Start(z * scheduler.scale(grid[0]), grid, sampler)
        if call.denoising_end is None:
            return start
        steps = self._steps("denoising_end", call.denoising_end, start.grid)
        whole, part = start.grid, until(start.sampler, start.grid, steps)
        return replace(start, grid=whole[: steps + 1], sampler=along(part, whole))

    def _steps(self, name: str, share: float, grid: Sequence[Any]) -> int:
        steps = before(grid, share, self.scheduler)
        if not 0 < steps < len(grid) - 1:
            raise ValueError(f"{name} = {share:g} of {len(grid) - 1} steps leaves none; give another share")
        return steps


def along(sampler: Sampler, whole: Sequence[Any]) -> Sampler:
    """A sampler that goes along a grid of which its caller knows the beginning."""
    return lambda x, grid, noise: sampler(x, whole, noise)


class StableDiffusionXLPipeline(XL, StableDiffusionPipeline):
    """Text to image; see `XLCall` for what is told besides."""


class StableDiffusionXLImg2ImgPipeline(XL, StableDiffusionImg2ImgPipeline):
    """Image to image, also with the refiner; see `XLCall` for what is told besides."""

    def _take(self, parts: Components, runtime: Any, name: str) -> None:
        super()._take(parts, runtime, name)
        if parts.text_encoder is None:
            self._pipe.pipeline = type(self).__name__

    def __call__(  # type: ignore[override]  # prompt_2 is the second, as there
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        image: Any = None,
        strength: float = 0.3,
        num_inference_steps: int = 50,
        **others: Any,
    ) -> Any:
        """Pictures that leave an image as far as strength says; image: see `ImageProcessor`, or latents."""
        return super().__call__(prompt, image, strength, num_inference_steps, prompt_2=prompt_2, **others)


class StableDiffusionXLInpaintPipeline(XL, StableDiffusionInpaintPipeline):
    """Repainting in a mask; see `XLCall` for what is told besides."""

    calls: ClassVar[type[Call]] = XLInpaintCall
    families: ClassVar[Mapping[int, str]] = {5: "StableDiffusionXLInpaintPipeline", 0: "StableDiffusionXLPipeline"}

    def __call__(  # type: ignore[override]
        self, prompt: str | Sequence[str] | None = None, image: Any = None, strength: float = 0.9999, **others: Any
    ) -> Any:
        """Pictures of an image with what is white in mask_image repainted."""
        return super().__call__(prompt, image, strength=strength, **others)


DOORS: Mapping[str, type[XL]] = {
    door.__name__: door
    for door in (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline)
}
"""By the class that a model folder names."""


def listed(texts: str | Sequence[str] | None) -> list[str]:
    """Some texts as a list."""
    return [texts] if isinstance(texts, str) else list(texts or ())


def repeated(texts: str | Sequence[str], many: int) -> list[str]:
    """One text for each of many prompts; ValueError for another number of them."""
    found = [texts] * many if isinstance(texts, str) else list(texts)
    if len(found) != many:
        raise ValueError(f"{len(found)} negative prompts for {many} prompts; give one, or as many")
    return found
