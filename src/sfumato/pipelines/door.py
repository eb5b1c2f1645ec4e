"""What all front doors share: a model's parts under the names that notebooks use, opened, saved, moved and adapted.

`doors.py` has the doors themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from sfumato.diffusion.scheduler import Generators, Scheduler, draw
from sfumato.models.clip import CLIPTextModel
from sfumato.models.depth import DepthEstimator
from sfumato.models.unet import UNet
from sfumato.pipelines.adapted import Adapted
from sfumato.pipelines.opening import (
    MAIN,
    MORE,
    PARTS,
    absent_t5,
    opened,
    passed_over,
    scheduler_of,
    single,
    with_parts,
    without_t5,
)
from sfumato.pipelines.pipeline import Pipeline
from sfumato.pipelines.processor import ImageProcessor
from sfumato.pipelines.switches import Switches
from sfumato.pipelines.together import Bar
from sfumato.runtime import Runtime, choose, dtype_name
from sfumato.text.encode import encode_prompts
from sfumato.text.tokenizer import ClipTokenizer
from sfumato.text.towers import TextEncoder, Tokenizer
from sfumato.weights.folder import save_folder
from sfumato.weights.parts import VAE, Components, collected, towers_of

D = TypeVar("D", bound="Door")
ABSENT = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")

log = logging.getLogger(__name__)


class Door(Switches):
    """A model's parts, to be opened with `from_pretrained` or put together by keyword.

    safety_checker and the other parts that diffusers has beside these are None: pictures are not checked.
    Raises ValueError for a model that is made for another door.
    """

    # The class of model folder by how many channels the U-Net takes besides the noisy latent.
    families: ClassVar[Mapping[int, str]] = {0: "StableDiffusionPipeline"}
    # Options of schedulers that diffusers sets right when it puts such a pipeline together.
    mends: ClassVar[Mapping[str, object]] = {"steps_offset": 1, "clip_sample": False}
    resample: ClassVar[str] = "lanczos"
    denoiser_name: ClassVar[str] = "unet"

    def __init__(
        self,
        *,
        vae: VAE,
        text_encoder: CLIPTextModel,
        tokenizer: ClipTokenizer,
        unet: UNet,
        scheduler: Scheduler,
        low_res_scheduler: Scheduler | None = None,
        depth_estimator: DepthEstimator | None = None,
        **others: Any,
    ) -> None:
        self._check_others(others)
        parts = Components(unet, vae, text_encoder, tokenizer, scheduler, low_res_scheduler, "", depth_estimator)
        self._take(parts, None, "custom")

    def _take(self, parts: Components, runtime: Runtime | None, name: str) -> None:
        """Take the parts of a model, which is moved and converted to the runtime."""
        door = type(self).__name__
        self._tower(parts)
        extra = parts.denoiser.config.in_channels - parts.vae.config.latent_channels
        family = self.families.get(extra)
        if family is None or (family == "StableDiffusionUpscalePipeline") != (parts.low_res_scheduler is not None):
            raise ValueError(
                f"{door} is for another kind of model: this one's U-Net takes {extra} channels besides the latent; "
                "sfumato.load opens any"
            )
        scheduler = self._mended(scheduler_of(parts.scheduler))
        parts = replace(parts, scheduler=scheduler, pipeline=family)
        self._pipe = Pipeline(parts, runtime, name)
        self._adapted = Adapted(parts.denoiser, towers_of(parts))
        self.image_processor = ImageProcessor(self.vae_scale_factor, self.resample, channels=self.latent_channels)
        self._progress: dict[str, Any] = {}
        self.safety_checker: Any = None
        self.feature_extractor: Any = None
        self.image_encoder: Any = None
        self.watermarker: Any = None
        self.name_or_path = name
        self._guidance_scale = 7.5
        self._interrupt = False
        self._num_timesteps = 0

    def _tower(self, parts: Components) -> tuple[ClipTokenizer, CLIPTextModel]:
        """The text tower that adapters are put on; ValueError for a model of another kind."""
        text, tokenizer = parts.text_encoder, parts.tokenizer
        if not isinstance(text, CLIPTextModel) or not isinstance(tokenizer, ClipTokenizer) or parts.towers.paired:
            door = type(self).__name__
            raise ValueError(
                f"{door} is for models with a CLIP text encoder, and only one; open this one with sfumato.load"
            )
        return tokenizer, text

    @classmethod
    def _of(cls: type[D], parts: Components, runtime: Runtime | None, name: str) -> D:
        door = cls.__new__(cls)
        door._take(parts, runtime, name)
        return door

    @classmethod
    def _check_others(cls, others: Mapping[str, Any]) -> None:
        if others.get("safety_checker") is not None:
            raise ValueError(f"{cls.__name__}: pictures are not checked here; give safety_checker=None")
        passed_over(others, cls.__name__)

    def _mended(self, scheduler: Scheduler) -> Scheduler:
        options = {k: v for k, v in self.mends.items() if scheduler.config.get(k, v) != v}
        options = {k: v for k, v in options.items() if k in scheduler.option_names()}
        if not options:
            return scheduler
        log.warning("the scheduler's %s is set right for such models: %s", type(scheduler).__name__, options)
        return type(scheduler).from_config(scheduler.config, **options)

    # Opening and saving ---------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls: type[D],
        source: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
        **others: Any,
    ) -> D:
        """Open a model folder, a built-in model or a hub id, on the CPU and in float32 unless said otherwise.

        others: parts to take instead (vae=, scheduler=...), and arguments of diffusers that change nothing here;
                text_encoder_3=None leaves T5 out.
        Raises FileNotFoundError or ValueError in one line.
        """
        runtime = choose("cpu", dtype_name(torch_dtype or dtype or torch.float32))
        given = {name: others.pop(name) for name in PARTS if others.get(name) is not None}
        cls._check_others({name: value for name, value in others.items() if name not in PARTS})
        if "safety_checker" not in others:
            log.info("%s: pictures are not checked; a model's safety_checker is passed over", cls.__name__)
        without = absent_t5(others)
        parts = opened(source, runtime.dtype, variant, revision, cache_dir, local_files_only, without)
        return cls._of(with_parts(parts, given), runtime, str(source))

    @classmethod
    def from_single_file(
        cls: type[D],
        path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        prediction_type: str | None = None,
        **others: Any,
    ) -> D:
        """Open a model in one file, a path or the address of a file on the hub; else as `from_pretrained`.

        What the file is, is read off its content, so `config` and its like are not needed.
        """
        runtime = choose("cpu", dtype_name(torch_dtype or torch.float32))
        given = {name: others.pop(name) for name in PARTS if others.get(name) is not None}
        cls._check_others({k: v for k, v in others.items() if k not in (*PARTS, "local_files_only", "revision")})
        parts = single(path, runtime.dtype, prediction_type)
        parts = without_t5(parts) if absent_t5(others) else parts
        return cls._of(with_parts(parts, given), runtime, str(path))

    @classmethod
    def from_pipe(cls: type[D], pipeline: Door | Pipeline, **given: Any) -> D:
        """A door to the same parts as another door's or pipeline's; given: parts to take instead."""
        pipe = pipeline._pipe if isinstance(pipeline, Door) else pipeline
        parts = replace(collected(pipe), pipeline="")
        cls._check_others({name: value for name, value in given.items() if name not in PARTS})
        door = cls._of(with_parts(parts, {k: v for k, v in given.items() if k in PARTS}), None, pipe.model)
        door._pipe.runtime = pipe.runtime
        door._pipe.share_memory(pipe)
        if isinstance(pipeline, Door) and door._adapted.parts == pipeline._adapted.parts:
            door._adapted = pipeline._adapted
        return door

    def save_pretrained(self, folder: str | Path, **others: Any) -> None:
        """Write a model folder, which diffusers opens as well; adapters that are not fused are left out."""
        passed_over(others, "save_pretrained")
        with self._adapted.bare():
            save_folder(self._pipe, folder)

    def to(
        self: D,
        *places: str | torch.device | torch.dtype | None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> D:
        """Move the networks to a device, a dtype, or both; ValueError for a device that this PyTorch cannot use."""
        passed_over(others, "to", ("silence_dtype_warnings",))
        for place in places:
            if isinstance(place, torch.dtype):
                dtype = place
            elif place is not None:
                device = place
        self._pipe.to(None if device is None else choose(str(device), "float32").device, dtype)
        return self

    # The parts ------------------------------------------------------------------------------------

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name, as another door's constructor takes them."""
        named = {name: getattr(self, name) for name in (*MAIN, self.denoiser_name)} | dict.fromkeys(ABSENT[:3])
        extra = {name: getattr(self._pipe, name) for name in MORE}
        return named | {name: part for name, part in extra.items() if part is not None}

    @property
    def unet(self) -> UNet:
        """The denoising network."""
        return self._pipe.unet

    @unet.setter
    def unet(self, unet: UNet) -> None:
        self._pipe.unet = unet
        self._dress_anew()

    @property
    def vae(self) -> VAE:
        """The autoencoder."""
        return self._pipe.vae

    @vae.setter
    def vae(self, vae: VAE) -> None:
        self._pipe.vae = vae

    @property
    def text_encoder(self) -> CLIPTextModel:
        """The text tower."""
        text = self._pipe.text_encoder
        assert isinstance(text, CLIPTextModel)
        return text

    @text_encoder.setter
    def text_encoder(self, text_encoder: CLIPTextModel) -> None:
        self._pipe.text_encoder = text_encoder
        self._dress_anew()

    @property
    def tokenizer(self) -> ClipTokenizer:
        """The tokenizer, with the learned words."""
        tokenizer = self._adapted.tokenizer()
        assert tokenizer is not None
        return tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: ClipTokenizer) -> None:
        self._pipe.tokenizer = tokenizer
        self._dress_anew()

    @property
    def scheduler(self) -> Scheduler:
        """What samples."""
        return self._pipe.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self._pipe.scheduler = scheduler_of(scheduler)

    @property
    def text_encoder_2(self) -> TextEncoder | None:
        """The second text tower, where there is one."""
        return self._pipe.text_encoder_2

    @property
    def tokenizer_2(self) -> Tokenizer | None:
        """The tokenizer of the second text tower, with the learned words."""
        return self._adapted.tokenizer(1) or self._pipe.tokenizer_2

    @property
    def low_res_scheduler(self) -> Scheduler | None:
        """The noise on an upscaler's small picture."""
        return self._pipe.low_res_scheduler

    @property
    def depth_estimator(self) -> DepthEstimator | None:
        """What makes depth of a picture."""
        return self._pipe.depth_estimator

    def _dress_anew(self) -> None:
        """Adapters belong to networks: with others in their place, none is on."""
        self._tower(collected(self._pipe))
        self._adapted = Adapted(self._pipe.denoiser, towers_of(self._pipe))

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self._pipe.runtime.device

    _execution_device = device

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in."""
        return self._pipe.runtime.dtype

    @property
    def vae_scale_factor(self) -> int:
        """Picture pixels a latent pixel, along one side."""
        return self._pipe.factor

    @property
    def latent_channels(self) -> int:
        """Of a latent."""
        return self.vae.config.latent_channels

    @property
    def guidance_scale(self) -> float:
        """Of the call in progress, or of the last one; callbacks may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether that guides at all."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Evaluations of the call in progress, or of the last one."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked to stop, by setting `_interrupt`."""
        return self._interrupt

    # Prompts and pictures, one step at a time -----------------------------------------------------

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Token states (B, L, D) of prompts, cut to one chunk, and of negative ones; None for these without guidance.

        Texts mean what they say: brackets are brackets. clip_skip counts the layers left out, for `prompt` alone.
        Raises ValueError when the numbers of prompts differ.
        """
        with self._adapted.scaled(lora_scale):
            if prompt_embeds is None:
                texts = [prompt] if isinstance(prompt, str) else list(prompt or ())
                prompt_embeds = self._states(texts, clip_skip or 0)
            many = len(prompt_embeds)
            if do_classifier_free_guidance and negative_prompt_embeds is None:
                plain = negative_prompt is None or isinstance(negative_prompt, str)
                texts = [str(negative_prompt or "")] * many if plain else list(negative_prompt or ())
                if len(texts) != many:
                    raise ValueError(f"{len(texts)} negative prompts for {many} prompts; give one, or as many")
                negative_prompt_embeds = self._states(texts, 0)

        def each(states: Tensor) -> Tensor:
            states = states.to(device=device or self.device, dtype=self.text_encoder.dtype)
            return states.repeat_interleave(num_images_per_prompt, dim=0)

        assert prompt_embeds is not None
        negative = negative_prompt_embeds if do_classifier_free_guidance else None
        return each(prompt_embeds), None if negative is None else each(negative)

    def _states(self, texts: Sequence[str], clip_skip: int) -> Tensor:
        context = encode_prompts(self.tokenizer, self.text_encoder, texts, clip_skip).context
        assert context is not None
        return context

    def _encode_prompt(self, *prompt: Any, **options: Any) -> Tensor:
        """`encode_prompt` as one tensor, the negative prompts' states first."""
        states, negative = self.encode_prompt(*prompt, **options)
        return states if negative is None else torch.cat([negative, states])

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        generator: Generators | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise (B, C, h, w) as the scheduler's loop begins with it; latents: standard noise to take instead."""
        shape = batch_size, num_channels_latents, height // self.vae_scale_factor, width // self.vae_scale_factor
        if latents is None:
            like = torch.empty(0, dtype=dtype, device=device)
            some = [generator] if generator is None or isinstance(generator, torch.Generator) else generator
            each = shape if len(some) == 1 else (1, *shape[1:])
            latents = torch.cat([draw(each, one, like) for one in some])
        return latents.to(device) * self.scheduler.init_noise_sigma

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Any:
        """Latents (B, C, h, w) as an array of pictures (B, H, W, 3) in [0, 1]."""
        return self.image_processor.postprocess(self._pixels(latents), "np")

    def _pixels(self, latents: Tensor) -> Tensor:
        return self.vae.to_pixels(latents.to(self.device, self.vae.dtype)).float()

    @staticmethod
    def numpy_to_pil(images: Any) -> list[Any]:
        """Arrays (B, H, W, 3) in [0, 1] as PIL pictures."""
        return ImageProcessor.numpy_to_pil(images)

    def run_safety_checker(self, image: Any, *about: Any) -> tuple[Any, None]:
        """The picture itself: it is not checked."""
        return image, None

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Bar:
        """A progress bar around something, or for a number of steps."""
        return Bar(iterable, total, self._progress)

    def set_progress_bar_config(self, **config: Any) -> None:
        """disable, leave and desc of progress bars."""
        self._progress = config
