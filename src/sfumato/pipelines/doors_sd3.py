"""The front doors to Stable Diffusion 3: those of `doors.py`, told of three texts, for a transformer on a flow.

B pictures in a call, K tokens, D width of the context, P width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from sfumato.diffusion.named_flow import FlowMatchEulerDiscreteScheduler
from sfumato.models.clip import CLIPTextModel
from sfumato.models.mmdit import MMDiT
from sfumato.models.perturb import blocks
from sfumato.models.t5 import T5EncoderModel
from sfumato.pipelines.call import Call
from sfumato.pipelines.doors import (
    Maker,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from sfumato.pipelines.doors_xl import listed, repeated
from sfumato.pipelines.request import Request
from sfumato.pipelines.start import Start, remaining
from sfumato.pipelines.together import STEP_TENSORS, Skipped, Together, Weights, Words
from sfumato.text.encode import encode_prompts
from sfumato.text.t5 import T5_LENGTH, T5Tokenizer
from sfumato.text.tokenizer import ClipTokenizer
from sfumato.weights.parts import VAE, Components

MOST_TOKENS = 512


@dataclass
class SD3Call(Call):
    """What these doors take besides, with diffusers' meaning.

    prompt_2, prompt_3, negative_prompt_2, negative_prompt_3: other texts for the second tower and for T5; else they
                            read the same as the first.
    pooled_prompt_embeds, negative_pooled_prompt_embeds: (B, P), beside prompt_embeds (B, K, D).
    max_sequence_length:    tokens of T5.
    joint_attention_kwargs: {"scale": strength of the adapters}.
    skip_guidance_layers:   numbers of blocks to skip in guidance, from 0; skip_layer_guidance_scale its weight,
                            skip_layer_guidance_start and _stop the shares of the steps between which it acts.
    mu:                     shift of the noise levels, for schedulers with use_dynamic_shifting; else by the size.
    """

    step_tensors: ClassVar[Sequence[str]] = (*STEP_TENSORS, "pooled_prompt_embeds")
    guidance_scale: float = 7.0
    prompt_2: str | Sequence[str] | None = None
    prompt_3: str | Sequence[str] | None = None
    negative_prompt_2: str | Sequence[str] | None = None
    negative_prompt_3: str | Sequence[str] | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    max_sequence_length: int = T5_LENGTH
    joint_attention_kwargs: Mapping[str, Any] | None = None
    skip_guidance_layers: Sequence[int] | None = None
    skip_layer_guidance_scale: float = 2.8
    skip_layer_guidance_stop: float = 0.2
    skip_layer_guidance_start: float = 0.01
    mu: float | None = None

    def __post_init__(self) -> None:
        for states, pooled in (
            ("prompt_embeds", "pooled_prompt_embeds"),
            ("negative_prompt_embeds", "negative_pooled_prompt_embeds"),
        ):
            if (getattr(self, states) is None) != (getattr(self, pooled) is None):
                raise ValueError(f"{states} and {pooled} belong together; give both, or neither")
        if not 2 <= self.max_sequence_length <= MOST_TOKENS:
            raise ValueError(f"max_sequence_length = {self.max_sequence_length}; give 2 to {MOST_TOKENS} tokens")
        other = set(self.joint_attention_kwargs or ()) - {"scale"}
        if other:
            raise ValueError(f"joint_attention_kwargs: {sorted(other)[0]!r} is not supported; known: 'scale'")
        self.cross_attention_kwargs = self.joint_attention_kwargs or self.cross_attention_kwargs


class SD3(Maker):
    """What the doors to Stable Diffusion 3 share; T5 may be missing."""

    calls: ClassVar[type[Call]] = SD3Call
    families: ClassVar[Mapping[int, str]] = {0: "StableDiffusion3Pipeline"}
    mends: ClassVar[Mapping[str, object]] = {}
    denoiser_name: ClassVar[str] = "transformer"

    def __init__(
        self,
        *,
        transformer: MMDiT,
        scheduler: Any,
        vae: VAE,
        text_encoder: CLIPTextModel,
        tokenizer: ClipTokenizer,
        text_encoder_2: CLIPTextModel | None = None,
        tokenizer_2: ClipTokenizer | None = None,
        text_encoder_3: T5EncoderModel | None = None,
        tokenizer_3: T5Tokenizer | None = None,
        **others: Any,
    ) -> None:
        self._check_others(others)
        parts = Components(
            transformer,
            vae,
            text_encoder,
            tokenizer,
            scheduler,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        )
        self._take(parts, None, "custom")

    def _tower(self, parts: Components) -> tuple[ClipTokenizer, CLIPTextModel]:
        if not isinstance(parts.denoiser, MMDiT) or not parts.towers.clips:
            raise ValueError(f"{type(self).__name__} is for Stable Diffusion 3; open this model with sfumato.load")
        return parts.towers.clips[0]

    @property
    def transformer(self) -> MMDiT:
        """The denoising network."""
        return self._pipe.transformer

    @transformer.setter
    def transformer(self, transformer: MMDiT) -> None:
        self._pipe.transformer = transformer
        self._dress_anew()

    @property
    def text_encoder_3(self) -> T5EncoderModel | None:
        """T5, where it is not left out."""
        return cast("T5EncoderModel | None", self._pipe.text_encoder_3)

    @property
    def tokenizer_3(self) -> T5Tokenizer | None:
        """T5's tokenizer."""
        return cast("T5Tokenizer | None", self._pipe.tokenizer_3)

    def encode_prompt(  # type: ignore[override]  # three texts and four tensors, as there
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        negative_prompt_3: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        max_sequence_length: int = T5_LENGTH,
        lora_scale: float | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Contexts (B, K, D) of prompts and negative ones, then pooled texts (B, P) of both; None without guidance.

        Texts mean what they say, and are cut to one chunk for CLIP and to max_sequence_length for T5. clip_skip counts
        the layers left out, for `prompt` alone. ValueError when numbers of prompts differ.
        """
        with self._adapted.scaled(lora_scale):
            states, pooled = prompt_embeds, pooled_prompt_embeds
            if states is None or pooled is None:
                texts = [listed(some or prompt) for some in (prompt, prompt_2, prompt_3)]
                states, pooled = self._read(texts, clip_skip or 0, max_sequence_length)
            negative, negative_pooled = negative_prompt_embeds, negative_pooled_prompt_embeds
            if do_classifier_free_guidance and (negative is None or negative_pooled is None):
                given = negative_prompt, negative_prompt_2, negative_prompt_3
                texts = [repeated(some or negative_prompt or "", len(states)) for some in given]
                negative, negative_pooled = self._read(texts, 0, max_sequence_length)

        def each(part: Tensor | None) -> Tensor | None:
            if part is None:
                return None
            return part.to(device or self.device, self.dtype).repeat_interleave(num_images_per_prompt, dim=0)

        if not do_classifier_free_guidance:
            negative = negative_pooled = None
        return cast(Tensor, each(states)), each(negative), cast(Tensor, each(pooled)), each(negative_pooled)

    def _read(self, texts: Sequence[Sequence[str]], clip_skip: int, length: int) -> tuple[Tensor, Tensor]:
        """The context (B, K, D) of texts for the towers, T5's last, and what the CLIP towers project (B, P)."""
        many = {len(some) for some in texts}
        if len(many) > 1:
            raise ValueError(f"{' and '.join(map(str, sorted(many)))} prompts for the text encoders; give as many each")
        towers = self._pipe.towers
        pairs = zip(self._adapted.clips, texts, strict=False)
        conds = [encode_prompts(*clip, some, clip_skip, bare=True) for clip, some in pairs]
        context = torch.cat([cast(Tensor, cond.context) for cond in conds], dim=-1)
        pooled = torch.cat([cast(Tensor, cond.pooled) for cond in conds], dim=-1)
        return towers.joined(context, texts[-1], length), pooled

    def _words(self, call: Call, guides: bool, size: tuple[int, int], request: Request) -> Words:
        assert isinstance(call, SD3Call)
        return Words(*self.encode_prompt(
            call.prompt, call.prompt_2, call.prompt_3, self.device, call.num_images_per_prompt or 1, guides,
            call.negative_prompt, call.negative_prompt_2, call.negative_prompt_3, call.prompt_embeds,
            call.negative_prompt_embeds, call.pooled_prompt_embeds, call.negative_pooled_prompt_embeds,
            call.clip_skip, call.max_sequence_length,
        ))  # fmt: skip

    def _weights(self, call: Call, request: Request) -> Weights:
        assert isinstance(call, SD3Call)
        weights = super()._weights(call, request)
        if call.skip_guidance_layers is not None:
            numbers = ",".join(map(str, call.skip_guidance_layers))
            try:
                blocks(self.transformer, numbers)
            except ValueError as error:
                raise ValueError(f"skip_guidance_layers = {list(call.skip_guidance_layers)}: {error}") from None
            shares = call.skip_layer_guidance_start, call.skip_layer_guidance_stop
            weights.skipped = Skipped(numbers, call.skip_layer_guidance_scale, shares)
        return weights

    def _setting(self, call: Call, size: tuple[int, int], request: Request, images: Mapping[str, Tensor]) -> Together:
        """The scheduler's shift goes by the picture's size first."""
        assert isinstance(call, SD3Call)
        scheduler, mu = self.scheduler, call.mu
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            columns, rows = (side // self._pipe.preset.grain for side in size)
            mu = scheduler.shift_of(columns * rows) if mu is None else mu
            if mu is not None:
                scheduler.shifting(mu)
        elif mu is not None:
            raise ValueError(f"mu = {mu:g} is for FlowMatchEulerDiscreteScheduler, not {type(scheduler).__name__}")
        return super()._setting(call, size, request, images)


class StableDiffusion3Pipeline(SD3, StableDiffusionPipeline):
    """Text to image; see `SD3Call` for what is told besides."""

    def __call__(  # type: ignore[override]  # prompt_2 is the second, as there
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        **others: Any,
    ) -> Any:
        """Pictures of a prompt, or of each prompt of a list; others: see `Call` and `SD3Call`."""
        texts = {"prompt_2": prompt_2, "prompt_3": prompt_3}
        return super().__call__(prompt, height, width, num_inference_steps, **texts, **others)


class StableDiffusion3Img2ImgPipeline(SD3, StableDiffusionImg2ImgPipeline):
    """Image to image; see `SD3Call` for what is told besides."""

    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        image: Any = None,
        strength: float = 0.6,
        num_inference_steps: int = 50,
        **others: Any,
    ) -> Any:
        """Pictures that leave an image as far as strength says.

        image:   see `ImageProcessor`, or latents; brought to height and width, which are the model's own where None.
        latents: (B, C, h, w), what to go on with where the steps begin, in the place of the image under noise.
        """
        texts = {"prompt": prompt, "prompt_2": prompt_2, "prompt_3": prompt_3}
        call = self.calls.read(type(self).__name__, {**texts, "num_inference_steps": num_inference_steps, **others})
        preset = self._pipe.preset
        x, height, width = self._given(image, height or preset.height, width or preset.width)
        return self._made(
            call, height, width, self._checked(call, height=height, width=width, strength=strength), image=x
        )

    def _begun(self, call: Call, setting: Together) -> Start:
        if call.latents is None:
            return super()._begun(call, setting)
        sampler, grid = remaining(setting.plan, setting.strength)
        return Start(call.latents.float().to(self.device) * self.scheduler.scale(grid[0]), grid, sampler)


class StableDiffusion3InpaintPipeline(SD3, StableDiffusionInpaintPipeline):
    """Repainting in a mask; see `SD3Call` for what is told besides."""

    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float = 0.6,
        **others: Any,
    ) -> Any:
        """Pictures of an image with what is white in mask_image repainted."""
        texts: dict[str, Any] = {"prompt_2": prompt_2, "prompt_3": prompt_3}
        return super().__call__(prompt, image, mask_image, strength=strength, **texts, **others)


DOORS: Mapping[str, type[SD3]] = {
    door.__name__: door
    for door in (StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline)
}
"""By the class that a model folder names."""
