"""What front doors are asked and what they answer, with the names and the meaning that diffusers gives them.

B pictures in a call, C latent channels, h w latent height and width, H W picture height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.pipelines.processor import check_form
from sfumato.pipelines.together import STEP_TENSORS

REFUSED = ("ip_adapter_image", "ip_adapter_image_embeds", "added_cond_kwargs", "timestep_cond")


@dataclass(frozen=True)
class StableDiffusionPipelineOutput:
    """What a door answers.

    images: PIL pictures, an array (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1], or latents (B, C, h, w).
    nsfw_content_detected: None, as pictures are not checked.
    """

    images: Any
    nsfw_content_detected: None = None

    def to_tuple(self) -> tuple[Any, None]:
        """Both as a tuple."""
        return self.images, self.nsfw_content_detected

    def __getitem__(self, key: int | str) -> Any:
        """The pictures for 0 and "images"."""
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@dataclass
class Call:
    """The arguments that all doors take, with diffusers' meaning.

    prompt, negative_prompt:  a text or a list; or prompt_embeds, negative_prompt_embeds, token states (B, L, D).
    timesteps, sigmas:        to go through, instead of a number of steps.
    guidance_scale:           weight of the prompt; up to 1 there is no guidance.
    num_images_per_prompt:    pictures of each prompt, one after the other.
    eta:                      share of fresh noise, for schedulers that take it; others do not look at it.
    generator:                one for all pictures, or a list of as many; torch's own where None.
    latents:                  standard noise (B, C, h, w) to begin with.
    output_type:              "pil", "np", "pt", "latent".
    cross_attention_kwargs:   {"scale": strength of the adapters}.
    guidance_rescale:         how far guided predictions get back the prompt's own deviation (Lin et al. 2023).
    clip_skip:                layers of the text tower left out at the end.
    callback_on_step_end:     called (door, i, t, tensors) after each step; what it returns replaces tensors.
    callback, callback_steps: the older kind, called (i, t, latents).
    """

    step_tensors: ClassVar[Sequence[str]] = STEP_TENSORS
    prompt: str | Sequence[str] | None = None
    num_inference_steps: int = 50
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    guidance_scale: float = 7.5
    negative_prompt: str | Sequence[str] | None = None
    num_images_per_prompt: int | None = 1
    eta: float = 0.0
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    output_type: str | None = "pil"
    return_dict: bool = True
    cross_attention_kwargs: Mapping[str, Any] | None = None
    guidance_rescale: float = 0.0
    clip_skip: int | None = None
    callback_on_step_end: Callable[..., Mapping[str, Any] | None] | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    callback: Callable[..., Any] | None = None
    callback_steps: int | None = None

    @classmethod
    def read(cls, door: str, arguments: Mapping[str, Any]) -> Call:
        """From a door's arguments; ValueError for what cannot be honoured, TypeError for what is not known."""
        known = {field.name for field in fields(cls)}
        for name, value in arguments.items():
            if name not in known and name not in REFUSED:
                raise TypeError(f"{door} has no argument {name!r}; it has {', '.join(sorted(known))}")
            if name in REFUSED and value is not None:
                raise ValueError(f"{door}: {name} is not supported; leave it out")
        call = cls(**{name: value for name, value in arguments.items() if name in known})
        call._check_kinds()
        call.callback_on_step_end_tensor_inputs = getattr(
            call.callback_on_step_end, "tensor_inputs", call.callback_on_step_end_tensor_inputs
        )
        known_tensors = cls.step_tensors
        strange = [name for name in call.callback_on_step_end_tensor_inputs if name not in known_tensors]
        if strange:
            raise ValueError(f"callback_on_step_end_tensor_inputs: {strange[0]!r}; known: {', '.join(known_tensors)}")
        other = set(call.cross_attention_kwargs or ()) - {"scale"}
        if other:
            raise ValueError(f"cross_attention_kwargs: {sorted(other)[0]!r} is not supported; known: 'scale'")
        for text, states in (("prompt", "prompt_embeds"), ("negative_prompt", "negative_prompt_embeds")):
            if getattr(call, text) is not None and getattr(call, states) is not None:
                raise ValueError(f"both {text} and {states} are given; give one of the two")
        if call.prompt is None and call.prompt_embeds is None:
            raise ValueError("neither prompt nor prompt_embeds is given; say what the picture shows")
        if not call.many:
            raise ValueError(f"prompt = {call.prompt!r} with {call.num_images_per_prompt} pictures each makes none")
        check_form(call.output_type or "pil")
        return call

    def _check_kinds(self) -> None:
        """ValueError for arguments of another kind or range than they have anywhere."""
        for name in ("prompt", "negative_prompt"):
            texts = getattr(self, name)
            if texts is not None and not all_are([texts] if isinstance(texts, str) else texts, str):
                raise ValueError(f"{name} = {texts!r}; give a text, or a list of texts")
        each = self.num_images_per_prompt
        if each is not None and (not isinstance(each, Integral) or each < 1):
            raise ValueError(f"num_images_per_prompt = {each!r}; give 1 or more")
        for name, least, most in (("guidance_scale", -math.inf, 1000), ("guidance_rescale", 0, 1), ("eta", 0, 1)):
            number = getattr(self, name)
            if not isinstance(number, Real) or not least <= float(number) <= most:
                numbers = f"a number up to {most}" if least < 0 else f"{least} to {most}"
                raise ValueError(f"{name} = {number!r}; give {numbers}")
        for name in ("callback_on_step_end", "callback"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ValueError(f"{name} = {getattr(self, name)!r}; give a function")
        if not isinstance(self.generator, torch.Generator | None):
            if not all_are(self.generator, torch.Generator):
                raise ValueError(f"generator = {self.generator!r}; give a torch.Generator, or a list of them")
            if not self.generator:
                raise ValueError("generator is an empty list; give one generator, or as many as pictures")

    @property
    def many(self) -> int:
        """B."""
        if self.prompt_embeds is not None:
            prompts = len(self.prompt_embeds)
        else:
            prompts = 1 if isinstance(self.prompt, str) else len(self.prompt or ())
        return prompts * (1 if self.num_images_per_prompt is None else self.num_images_per_prompt)

    @property
    def each(self) -> Sequence[torch.Generator]:
        """The pictures' own generators, none where there is one for all; ValueError for another number than B."""
        if isinstance(self.generator, torch.Generator | None):
            return ()
        if len(self.generator) != self.many:
            raise ValueError(f"{len(self.generator)} generators for {self.many} pictures; give one, or as many")
        return self.generator


def all_are(given: Any, kind: type) -> bool:
    """Whether something is a list of this kind."""
    return isinstance(given, Sequence) and not isinstance(given, str) and all(isinstance(one, kind) for one in given)
