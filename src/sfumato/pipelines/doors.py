"""The front doors that notebooks written for diffusers know: thin classes over the parts of a model.

A door translates: arguments to a start, a guidance and a run of the one denoising loop, callbacks to the loop's own,
the result to what notebooks read. It samples with its `scheduler`, has diffusers' defaults, and draws from one
generator for all pictures of a call; so an unchanged notebook gives the picture that it gives there. The package's own
`Pipeline` has a seed for each picture, prompt syntax and recipes instead.

B pictures in a call, n given pictures, C latent channels, h w latent height and width, H W picture height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from sfumato.diffusion.drive import Run, drive
from sfumato.diffusion.samplers import Steps, ddim, evaluations
from sfumato.diffusion.scheduler import Plan
from sfumato.models.depth import depth_channel
from sfumato.pipelines.call import Call, StableDiffusionPipelineOutput
from sfumato.pipelines.check import check
from sfumato.pipelines.door import Door
from sfumato.pipelines.masks import Frame, cut_out
from sfumato.pipelines.processor import ImageProcessor, check_whole
from sfumato.pipelines.request import Request, parse
from sfumato.pipelines.start import STARTS, Start
from sfumato.pipelines.together import CastNoise, Together, Watcher, Weights, Words, guided
from sfumato.presets import Task

log = logging.getLogger(__name__)


class Maker(Door):
    """A door that makes pictures: what the calls of all of them come to."""

    task: ClassVar[Task]
    calls: ClassVar[type[Call]] = Call
    spread: ClassVar[bool] = True

    @torch.no_grad()
    def _made(
        self, call: Call, height: int, width: int, request: Request, frame: Frame | None = None, **images: Tensor
    ) -> Any:
        """The pictures of a call; request: its numbers, checked; frame: what they are put back into."""
        task = self._task
        weights = self._weights(call, request)
        self._guidance_scale, self._interrupt = call.guidance_scale, False
        pipe, scheduler = self._pipe, self.scheduler
        pipe.lay_out()
        with pipe.allocating(), self._adapted.scaled((call.cross_attention_kwargs or {}).get("scale")):
            words = self._words(call, weights.guides, (height, width), request)
            setting = self._setting(call, (height, width), request, images)
            start = self._begun(call, setting)
            setting.pass_over(task)
            scheduler.noise_source = call.each or setting.generator, None
            guidance = guided(words, weights, start, scheduler)
            points = evaluations(start.sampler, start.grid)
            steps = start.sampler(start.x, start.grid, CastNoise(scheduler.noise(), self.dtype))
            run = Run(steps, guidance, scheduler.prediction, len(points))
            self._num_timesteps = len(points)
            with self.progress_bar(total=len(start.grid) - 1) as bar:
                watcher = Watcher(
                    self, task, start, scheduler, words, weights, call.callback_on_step_end,
                    call.callback_on_step_end_tensor_inputs, call.callback, call.callback_steps or 1, bar.update,
                )  # fmt: skip
                drive([run], pipe.net, watcher)
            return self._answer(call, watcher.latents(run), frame)

    def _weights(self, call: Call, request: Request) -> Weights:
        """What guides a call."""
        return Weights(call.guidance_scale, request.image_guidance_scale, call.guidance_rescale)

    def _words(self, call: Call, guides: bool, size: tuple[int, int], request: Request) -> Words:
        """What the network is told of the prompts of a call."""
        return Words(*self.encode_prompt(
            call.prompt, self.device, call.num_images_per_prompt or 1, guides, call.negative_prompt,
            call.prompt_embeds, call.negative_prompt_embeds, clip_skip=call.clip_skip,
        ))  # fmt: skip

    def _begun(self, call: Call, setting: Together) -> Start:
        """Where a call begins."""
        return STARTS[self._task](setting)

    def _answer(self, call: Call, latents: Tensor, frame: Frame | None) -> Any:
        form, images = call.output_type or "pil", latents
        if form != "latent":
            x = self._pixels(latents)
            x = x if frame is None else torch.cat([frame.put_back(row[None]) for row in x])
            images = self.image_processor.postprocess(x, form)
        return StableDiffusionPipelineOutput(images) if call.return_dict else (images, None)

    @property
    def _task(self) -> Task:
        """What the model is made for, which may be less than the door's."""
        return self._pipe.preset.task

    def _setting(self, call: Call, size: tuple[int, int], request: Request, images: Mapping[str, Tensor]) -> Together:
        h, w = (side // self.vae_scale_factor for side in size)
        shape = call.many, self.latent_channels, h, w
        if call.latents is not None and tuple(call.latents.shape) != shape:
            raise ValueError(f"latents of shape {tuple(call.latents.shape)}; this call needs {shape}")
        for image in images.values():
            if call.many % len(image):
                raise ValueError(f"{len(image)} pictures were given for {call.many} to be made; give one, or as many")
        return Together(
            plan=self._plan(call),
            shape=shape,
            generator=call.generator if isinstance(call.generator, torch.Generator) else None,
            scheduler=self.scheduler,
            each=call.each,
            spread=self.spread,
            apart=self._task == "inpaint",
            vae=self.vae,
            device=self.device,
            dtype=self.dtype,
            eps=None if call.latents is None else call.latents.float(),
            images=images,
            strength=1.0 if request.strength is None else request.strength,
            noise_level=request.noise_level or 0,
            low_res_scheduler=self.low_res_scheduler,
        )

    def _plan(self, call: Call) -> Plan:
        """How the scheduler goes, as it says itself."""
        scheduler = self.scheduler
        own = None if call.timesteps is not None or call.sigmas is not None else call.num_inference_steps
        scheduler.set_timesteps(own, self.device, call.timesteps, call.sigmas)
        plan = scheduler.laid
        if not call.eta:
            return plan
        if scheduler.entry.run is not ddim and not scheduler.takes_eta:
            log.info("eta = %g is passed over: %s takes none", call.eta, type(scheduler).__name__)
            return plan
        sampler: Callable[..., Steps] = plan.sampler
        return replace(plan, sampler=partial(sampler, eta=call.eta))

    def _checked(self, call: Call, **numbers: Any) -> Request:
        """The numbers of a call as a request; ValueError for one that is out of range or does not fit the model."""
        request = parse(num_inference_steps=call.num_inference_steps, **numbers)
        check(request, self._pipe.preset)
        return request

    def _given(self, image: Any, height: int | None = None, width: int | None = None) -> tuple[Tensor, int, int]:
        """Pictures (n, 3, H, W) in [-1, 1], or latents, with H and W."""
        if image is None:
            raise ValueError(f"{type(self).__name__} needs an image; give a picture")
        x = self.image_processor.preprocess(image, height, width)
        factor = self.vae_scale_factor if x.shape[1] == self.latent_channels else 1
        return x, x.shape[2] * factor, x.shape[3] * factor


class StableDiffusionPipeline(Maker):
    """Text to image."""

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        **others: Any,
    ) -> Any:
        """Pictures of a prompt, or of each prompt of a list; others: see `Call`."""
        name = type(self).__name__
        call = self.calls.read(name, {"prompt": prompt, "num_inference_steps": num_inference_steps, **others})
        preset = self._pipe.preset
        height, width = height or preset.height, width or preset.width
        return self._made(call, height, width, self._checked(call, height=height, width=width))


class StableDiffusionImg2ImgPipeline(Maker):
    """Image to image."""

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        **others: Any,
    ) -> Any:
        """Pictures that leave an image as far as strength says; image: see `ImageProcessor`, or latents."""
        name = type(self).__name__
        call = self.calls.read(name, {"prompt": prompt, "num_inference_steps": num_inference_steps, **others})
        x, height, width = self._given(image)
        request = self._checked(call, height=height, width=width, strength=strength)
        return self._made(call, height, width, request, image=x)


class StableDiffusionInpaintPipeline(Maker):
    """Repainting in a mask: with a model made for it, or with any by putting back the rest at each step."""

    families: ClassVar[Mapping[int, str]] = {5: "StableDiffusionInpaintPipeline", 0: "StableDiffusionPipeline"}
    mends: ClassVar[Mapping[str, object]] = {"steps_offset": 1, "skip_prk_steps": True}
    spread = False

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        **others: Any,
    ) -> Any:
        """Pictures of an image with what is white in the mask repainted.

        masked_image_latents: (n, C, h, w), what a model made for it sees of the image, where that is encoded already.
        padding_mask_crop: only the masked part and so many pixels around it are worked at, at height and width.
        """
        name = type(self).__name__
        call = self.calls.read(name, {"prompt": prompt, "num_inference_steps": num_inference_steps, **others})
        preset = self._pipe.preset
        height, width = height or preset.height, width or preset.width
        request = self._checked(call, height=height, width=width, strength=strength)
        if mask_image is None:
            raise ValueError(f"{name} needs a mask_image; give a picture that is white where to repaint")
        frame = None
        if padding_mask_crop is not None and image is not None:
            frame = self._frame(call, image, mask_image, (width, height), padding_mask_crop)
            image, mask_image = frame.pictures["image"], frame.pictures["mask"]
        x, *_ = self._given(image, height, width)
        if x.shape[1] == self.latent_channels:
            raise ValueError(f"{name} needs a picture, and got latents; decode them first")
        mask = ImageProcessor(self.vae_scale_factor, mask=True).preprocess(mask_image, height, width)
        kept = {} if masked_image_latents is None else {"kept": self._kept(masked_image_latents, height, width)}
        many = max(len(mask), len(x), *(len(latents) for latents in kept.values()))
        images = {"mask": mask, **kept}
        images = {what: each.expand(many, -1, -1, -1) if len(each) < many else each for what, each in images.items()}
        return self._made(call, height, width, request, frame, image=x, **images)

    def _frame(self, call: Call, image: Any, mask: Any, size: tuple[int, int], padding: int) -> Frame:
        """The part of a picture that is worked at; ValueError where there is none."""
        if not isinstance(padding, Integral) or padding < 0:
            raise ValueError(f"padding_mask_crop = {padding}; give 0 or more pixels")
        if not isinstance(image, Image.Image) or not isinstance(mask, Image.Image):
            kinds = f"{type(image).__name__} and {type(mask).__name__}"
            raise ValueError(f"padding_mask_crop with image and mask_image of {kinds}; give one PIL picture each")
        if call.output_type == "latent":
            raise ValueError("padding_mask_crop with output_type = 'latent'; give 'pil', 'np' or 'pt'")
        check_whole(image, "image")
        check_whole(mask, "mask_image")
        return cut_out(image, mask, size, padding)

    def _kept(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Latents of a masked picture; ValueError for another size."""
        wanted = self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor
        if not isinstance(latents, Tensor):
            raise ValueError(f"masked_image_latents are {type(latents).__name__}; give a tensor")
        if tuple(latents.shape[1:]) != wanted:
            needs = ", ".join(map(str, wanted))
            raise ValueError(f"masked_image_latents of shape {tuple(latents.shape)}; this call needs (n, {needs})")
        return latents


class StableDiffusionDepth2ImgPipeline(Maker):
    """Image to image that keeps the depth of the image."""

    families: ClassVar[Mapping[int, str]] = {1: "StableDiffusionDepth2ImgPipeline"}
    mends: ClassVar[Mapping[str, object]] = {}

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        depth_map: Any = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        **others: Any,
    ) -> Any:
        """Pictures with the depth of an image; depth_map: (n, H, W), larger where it is nearer, else estimated."""
        name = type(self).__name__
        call = self.calls.read(name, {"prompt": prompt, "num_inference_steps": num_inference_steps, **others})
        x, height, width = self._given(image)
        request = self._checked(call, height=height, width=width, strength=strength)
        if depth_map is not None:
            depth = torch.as_tensor(depth_map)
            depth = depth[:, None] if depth.ndim == 3 else depth
        elif self.depth_estimator is not None:
            whole = ImageProcessor(1, channels=self.latent_channels).preprocess(image)
            depth = self.depth_estimator.predict(whole)
        else:
            raise ValueError("this model has no depth_estimator; give a depth_map")
        factor = self.vae_scale_factor
        channel = depth_channel(depth.to(self.device), height // factor, width // factor)
        return self._made(call, height, width, request, image=x, depth=channel)


class StableDiffusionInstructPix2PixPipeline(Maker):
    """Changing an image by an instruction."""

    families: ClassVar[Mapping[int, str]] = {4: "StableDiffusionInstructPix2PixPipeline"}
    mends: ClassVar[Mapping[str, object]] = {}

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 1.5,
        **others: Any,
    ) -> Any:
        """Pictures of an image changed as the prompt says."""
        texts = {"prompt": prompt, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        call = Call.read(type(self).__name__, {**texts, **others})
        x, height, width = self._given(image)
        request = self._checked(call, height=height, width=width, image_guidance_scale=image_guidance_scale)
        return self._made(call, height, width, request, image=x)

    def _encode_prompt(self, *prompt: Any, **options: Any) -> Tensor:
        """`encode_prompt` as one tensor, the negative prompts' states behind, twice."""
        return Words(*self.encode_prompt(*prompt, **options)).joined("instruct")


class StableDiffusionUpscalePipeline(Maker):
    """Enlarging a picture four times."""

    families: ClassVar[Mapping[int, str]] = {3: "StableDiffusionUpscalePipeline"}
    mends: ClassVar[Mapping[str, object]] = {}
    resample = "bicubic"

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        num_inference_steps: int = 75,
        guidance_scale: float = 9.0,
        noise_level: int = 20,
        **others: Any,
    ) -> Any:
        """Large pictures of a small one; noise_level: how much noise it is given first."""
        texts = {"prompt": prompt, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        call = Call.read(type(self).__name__, {**texts, **others})
        small, *_ = self._given(image)
        height, width = (side * self.vae_scale_factor for side in small.shape[2:])
        request = self._checked(call, height=height, width=width, noise_level=noise_level)
        return self._made(call, height, width, request, image=small)
