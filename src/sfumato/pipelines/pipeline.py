"""`Pipeline`: a model's parts, and requests turned into pictures.

B pictures in a network call, C channels, h w latent height and width, H W picture height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from sfumato.cond import Cond, Converted
from sfumato.diffusion.scheduler import Plan, Scheduler
from sfumato.images import to_pil
from sfumato.models.depth import DepthEstimator
from sfumato.models.mmdit import MMDiT
from sfumato.models.perturb import perturbed
from sfumato.models.unet import UNet
from sfumato.pipelines.check import check, settled
from sfumato.pipelines.conditions import Outfit, Wardrobe, outfit
from sfumato.pipelines.fit import opened, wider
from sfumato.pipelines.guided import check_guidance, scheduled
from sfumato.pipelines.keeping import Keeping
from sfumato.pipelines.making import Callback, Progress, frame_of, latents, picture
from sfumato.pipelines.memory import in_tiles_if_need_be
from sfumato.pipelines.output import OUTPUT_TYPES, OutputType, PipelineOutput, joined
from sfumato.pipelines.refine import check_pair, check_share
from sfumato.pipelines.request import Request, parse
from sfumato.pipelines.restore import Restoration, restore
from sfumato.pipelines.start import remaining
from sfumato.presets import Preset
from sfumato.runtime import Runtime, as_it_is, choose
from sfumato.text.towers import TextEncoder, Tokenizer, Towers
from sfumato.weights.folder import save_folder
from sfumato.weights.hub import find_file
from sfumato.weights.model import load_model
from sfumato.weights.parts import VAE, Components, Denoiser, as_transformer, as_unet, networks_of, preset_of, towers_of
from sfumato.weights.safe import blame, is_finite

__all__ = [
    "OUTPUT_TYPES",
    "Callback",
    "OutputType",
    "Pipeline",
    "PipelineOutput",
    "Progress",
    "load",
]
# What requests say of a model besides its name.
SOURCES = ("vae", "base", "prediction", "preset", "t5")

log = logging.getLogger(__name__)


class Pipeline(Keeping):
    """A diffusion model with its autoencoder and text encoder, and the task that it was made for.

    parts:   the components, e.g. from `load_model`.
    runtime: where they run, moved and converted in place; None leaves them where and as they are.
    model:   what requests call this model: a built-in name, a file, a folder or a hub id.
    batch:   most pictures advanced together in shared network calls. By default 8, and on a CPU as many
             as gain from it: those that differ in their seeds only, 8 of 128x128 pixels, one of 512x512. Rounding
             depends on the number: among others a picture is the same to 50 dB, alone to the last bit.

    The parts are attributes and may be replaced; a new `scheduler` brings its sampler and spacing along.
    """

    def __init__(
        self, parts: Components, runtime: Runtime | None = None, model: str = "mini", batch: int | None = None
    ) -> None:
        if batch is not None and batch < 1:
            raise ValueError(f"batch = {batch}; give 1 or more pictures")
        self.denoiser: Denoiser = parts.denoiser
        self.vae: VAE = parts.vae
        self.text_encoder: TextEncoder | None = parts.text_encoder
        self.tokenizer: Tokenizer | None = parts.tokenizer
        self.text_encoder_2: TextEncoder | None = parts.text_encoder_2
        self.tokenizer_2: Tokenizer | None = parts.tokenizer_2
        self.text_encoder_3: TextEncoder | None = parts.text_encoder_3
        self.tokenizer_3: Tokenizer | None = parts.tokenizer_3
        self.force_zeros_for_empty_prompt: bool = parts.force_zeros_for_empty_prompt
        self.kind = parts.kind
        self.low_res_scheduler: Scheduler | None = parts.low_res_scheduler
        self.depth_estimator: DepthEstimator | None = parts.depth_estimator
        self.pipeline: str = parts.pipeline
        self._scheduler = parts.scheduler
        self.runtime = runtime or as_it_is(torch.empty(0, device=self.denoiser.device, dtype=self.denoiser.dtype))
        # What requests say of the model, so that a recipe can open it again.
        self.source: dict[str, str | None] = {"model": model, **dict.fromkeys(SOURCES)}
        self.embeddings: tuple[str, ...] = ()
        self.batch = batch
        self.preset: Preset = preset_of(parts)
        self._second: Pipeline | None = None
        self._converted = Converted()
        self._wardrobe = Wardrobe(self.denoiser, self.towers)
        if runtime is not None:
            self.to()

    @classmethod
    def from_pretrained(
        cls,
        source: Path | str,
        precision: str | None = None,
        device: str | None = None,
        batch: int | None = None,
        vae: Path | str | None = None,
        base: Path | str | None = None,
        prediction: str | None = None,
        memory: str | None = None,
        request: Request | None = None,
        t5: str | None = None,
        preset: str | None = None,
        compile: str | None = None,
    ) -> Pipeline:
        """Open a model on the best device in the best precision: a built-in name, file, folder or hub id.

        vae, base, prediction: another autoencoder, a model that supplies missing parts, what the network predicts.
        memory:  how weights are kept, see `set_memory`; None takes the fastest way that fits.
        request: what it is opened for, which decides what fits; None: a picture of the model's own size.
        t5:      what becomes of T5, see `keep_t5`; None as the request says, or as the rest.
        preset:  which it is of the models that look alike, such as "sdxl-lightning"; None as the request says, or as
                 names and the scheduler do, which one line then says.
        compile: see `set_compile`.
        Raises FileNotFoundError or ValueError when there is no complete model, see `load_model`, and ValueError where
        memory does not suffice.
        """
        runtime = choose(device, precision, compile)
        if t5 is not None:
            request = (request or Request()).model_copy(update={"t5": parse(t5=t5).t5})
        preset = parse(preset=preset).preset or (None if request is None else request.preset)
        parts, kept = opened(
            source, runtime, memory, request, batch, vae=vae, base=base, prediction=prediction, preset=preset
        )
        pipe = cls(parts, None, str(source), batch)
        if parts.kind is not None and parts.kind.guessed:
            log.warning("%s", parts.kind.line(str(source), pipe.preset))
        pipe.runtime = runtime
        pipe.keep_t5(None if request is None else request.t5, kept)
        pipe.set_memory(kept)
        if kept == "fast":
            pipe.to()
        names = {"vae": vae, "base": base, "prediction": prediction, "preset": preset}
        pipe.source.update({name: str(value) for name, value in names.items() if value is not None})
        return pipe

    @classmethod
    def from_single_file(
        cls,
        path: Path | str,
        precision: str | None = None,
        device: str | None = None,
        batch: int | None = None,
        vae: Path | str | None = None,
        base: Path | str | None = None,
        prediction: str | None = None,
        memory: str | None = None,
        preset: str | None = None,
    ) -> Pipeline:
        """`from_pretrained` for a model in one file; FileNotFoundError where there is no such file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {path}")
        return cls.from_pretrained(path, precision, device, batch, vae, base, prediction, memory, preset=preset)

    def restore(
        self,
        picture: str | Path | Image.Image,
        degradation: str = "auto",
        *,
        noise: float | None = None,
        mask: str | Path | Image.Image | None = None,
        blur: float | None = None,
        scale: int | None = None,
        prompt: str = "",
        guidance_scale: float = 1.0,
        steps: int | None = None,
        seed: int = 0,
    ) -> Restoration:
        """A picture without its noise, missing pixels, blur or low resolution, by this model; see `restore.restore`.

        Raises ValueError for a model that needs more than a prompt, or a degradation of which too little is said.
        """
        return restore(
            picture,
            degradation,
            noise=noise,
            mask=mask,
            blur=blur,
            scale=scale,
            prompt=prompt,
            guidance_scale=guidance_scale,
            steps=steps,
            seed=seed,
            pipe=self,
        )

    def save_pretrained(self, folder: Path | str, precision: str | None = None) -> None:
        """Write a model folder, which diffusers opens as well; `precision` converts the weights."""
        with self._as_stored():
            save_folder(self, folder, None if precision is None else choose("cpu", precision).dtype)

    def load_textual_inversion(self, path: Path | str) -> None:
        """Let all pictures from now on know the learned word of an embedding: its file, or its name.

        Raises FileNotFoundError or ValueError when it cannot be used with this model.
        """
        embeddings = (*self.embeddings, str(find_file("embedding", str(path))))
        try:
            self.dressing().wear(Outfit(embeddings=embeddings))
        finally:
            self.dressing().undress()
        self.embeddings = embeddings

    @property
    def model(self) -> str:
        """What requests call this model."""
        return str(self.source["model"])

    @property
    def unet(self) -> UNet:
        """The denoiser where it is a U-Net; AttributeError where it is not."""
        return as_unet(self.denoiser)

    @unet.setter
    def unet(self, unet: UNet) -> None:
        self.denoiser = unet

    @property
    def transformer(self) -> MMDiT:
        """The denoiser where it is a transformer; AttributeError where it is not."""
        return as_transformer(self.denoiser)

    @transformer.setter
    def transformer(self, transformer: MMDiT) -> None:
        self.denoiser = transformer

    @property
    def towers(self) -> Towers:
        """The text encoders with their tokenizers."""
        return towers_of(self)

    @property
    def scheduler(self) -> Scheduler:
        """The model's scheduler: its path and prediction, and the sampler that requests fall back on."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.preset = replace(self.preset, sampler=scheduler.entry.name, spacing=scheduler.spacing)

    @property
    def factor(self) -> int:
        """Picture pixels a latent pixel, along one side."""
        return self.vae.config.factor

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Pipeline:
        """Move the networks to a device, a dtype, or both; returns the pipeline itself."""
        now = self.runtime
        self.runtime = replace(now, device=torch.device(device or now.device), dtype=dtype or now.dtype)
        device, dtype = self.runtime.device, self.runtime.dtype
        if self._t5 is not None and not self._t5.stream:
            self._t5.to(device, dtype)
        if self._residence is not None:
            self._residence.to(device, dtype, wider(self, dtype))
            return self
        self.vae.to(device=device, dtype=wider(self, dtype).get(self.vae, dtype))
        for part in (self.denoiser, *self.towers.present, self.depth_estimator):
            if part is not None and not (part is self.text_encoder_3 and self._t5 is not None):
                part.to(device=device, dtype=dtype)
        return self

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        negative_prompt: str = "",
        image: str | Path | Image.Image | None = None,
        mask: str | Path | Image.Image | None = None,
        depth: str | Path | Image.Image | None = None,
        strength: float | None = None,
        soft_mask: bool | None = None,
        mask_blur: float | None = None,
        masked_content: str | None = None,
        only_masked: bool | None = None,
        mask_padding: int | None = None,
        outpaint: int | Sequence[int] | None = None,
        paste: bool | None = None,
        image_guidance_scale: float | None = None,
        noise_level: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: Sequence[float] | None = None,
        cfg_pp: float | None = None,
        apg: float | Sequence[float] | None = None,
        pag_scale: float | None = None,
        pag_layers: Sequence[str] = ("mid",),
        slg_scale: float | None = None,
        slg_layers: Sequence[int] = (7, 8, 9),
        slg_interval: Sequence[float] = (0.01, 0.2),
        dynamic_threshold: float | Sequence[float] | None = None,
        deep_cache: int | None = None,
        block_cache: float | None = None,
        int8: bool = False,
        fast: bool = False,
        rescale_betas_zero_snr: bool | None = None,
        seed: int | None = None,
        variation_seed: int | None = None,
        variation_strength: float | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        eta: float | None = None,
        hires_scale: float | None = None,
        hires_strength: float | None = None,
        hires_upscaler: str | None = None,
        tile: int | None = None,
        original_size: Sequence[int] | None = None,
        crops_coords_top_left: Sequence[int] | None = None,
        target_size: Sequence[int] | None = None,
        negative_original_size: Sequence[int] | None = None,
        negative_crops_coords_top_left: Sequence[int] | None = None,
        negative_target_size: Sequence[int] | None = None,
        aesthetic_score: float | None = None,
        negative_aesthetic_score: float | None = None,
        refiner: str | None = None,
        refiner_start: float | None = None,
        prompt_matrix: bool = False,
        prompt_rule: str | None = None,
        clip_skip: int | None = None,
        embeddings: Sequence[str] = (),
        num_images_per_prompt: int = 1,
        output_type: OutputType = "pil",
        callback: Callback | None = None,
    ) -> PipelineOutput:
        """Pictures of a prompt, or of each prompt of a list; the arguments are `Request`'s fields.

        Picture i of a prompt has seed + i and does not depend on the others.
        Raises ValueError for a value that is not allowed, naming what is.
        """
        options: dict[str, Any] = dict(locals())  # the arguments, and nothing else yet
        options["num_images"] = options.pop("num_images_per_prompt")
        options = {name: value for name, value in options.items() if name in Request.model_fields}
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        requests = [parse(**{**options, "prompt": text}) for text in prompts]
        return self.generate(requests, output_type=output_type, callback=callback)

    def generate(
        self,
        requests: Request | Sequence[Request],
        *,
        noise: Tensor | None = None,
        output_type: OutputType = "pil",
        callback: Callback | None = None,
    ) -> PipelineOutput:
        """The pictures of some requests, in their order.

        noise:    standard noise (n, C, h, w) to start the n pictures from, instead of what their seeds give.
        callback: told of each evaluation of each picture; returning False drops that picture.
        Raises ValueError when no request is given or one does not fit the model.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {output_type!r}; known: {', '.join(OUTPUT_TYPES)}")
        singles = self.resolve(requests)
        with self.allocating():
            done = list(latents(self, singles, noise, callback))
            return self._given_out(done, output_type)

    def _given_out(self, done: Sequence[tuple[Request, Tensor]], output_type: OutputType) -> PipelineOutput:
        """Requests and final latents as what was asked for."""
        requests = [request for request, _ in done]
        if not done:
            return PipelineOutput([], requests)
        if output_type == "latent":
            return PipelineOutput(joined([z for _, z in done]), requests)
        pictures = [picture(self, request, z) for request, z in done]
        if output_type == "pt":
            return PipelineOutput(joined([(x / 2 + 0.5).clamp(0, 1) for x in pictures]), requests)
        return PipelineOutput([image for x in pictures for image in to_pil(x)], requests)

    def stream(
        self, requests: Request | Sequence[Request], callback: Callback | None = None
    ) -> Iterator[tuple[Request, Image.Image]]:
        """The pictures of some requests one by one, each given out as soon as its group is done."""
        singles = self.resolve(requests)
        with self.allocating():
            for request, z in latents(self, singles, None, callback):
                yield request, to_pil(picture(self, request, z))[0]

    def resolve(self, requests: Request | Sequence[Request]) -> list[Request]:
        """One complete request a picture: preferences filled in, this model named, checked against it.

        Raises ValueError when there is none, or one asks for what the model does not have.
        """
        asked = [requests] if isinstance(requests, Request) else list(requests)
        if not asked:
            raise ValueError("no prompt was given; give at least one")
        resolved = [self._resolved(request) for request in asked]
        return [single for request in resolved for single in request.singles()]

    @torch.inference_mode()
    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in about [-1, 1], float32, of latents (B, C, h, w), one at a time.

        Raises ValueError where numbers are not finite, naming the weights or the precision to blame.
        """
        self.lay_out()
        z = z.to(self.runtime.device, self.vae.dtype)
        rows = (in_tiles_if_need_be(self.vae, partial(self.vae.to_pixels, row[None])) for row in z)
        x = torch.cat([row.float() for row in rows])
        if not is_finite(x):
            raise blame("autoencoder", {"autoencoder": self.vae})
        return x

    def net(self, x: Tensor, t: Tensor, cond: Cond, perturb: str | None = None) -> Tensor:
        """The denoiser in the runtime's dtype: (B, C, h, w) to the same, float32; perturb: see `models/perturb.py`."""
        dtype = self.runtime.dtype
        with perturbed(self.denoiser, perturb):
            out = self.denoiser(x.to(dtype), t, self._converted(cond, dtype)).float()
        if not is_finite(out):
            named = networks_of(self)
            raise blame(next(iter(named)), named)
        return out

    def _resolved(self, request: Request) -> Request:
        known = (*self.embeddings, *(name for name in request.embeddings if name not in self.embeddings))
        named = request.model_copy(update={**self.source, "embeddings": known})
        request = settled(named, self.preset, self.depth_estimator is not None)
        check(request, self.preset)
        outfit(request).locate()
        plan = self.plan(request)
        grid = plan.grid if request.strength is None else remaining(plan, request.strength)[1]
        check_guidance(request, self.preset, self.denoiser, grid)
        if request.refiner is not None:
            self.refining(request.refiner)
            check_share(grid, cast(float, request.refiner_start), self.scheduler)
        if request.hires_strength is not None:
            check_guidance(request, self.preset, self.denoiser, remaining(plan, request.hires_strength)[1])
        frame_of(request, self.factor)
        return request

    def refining(self, source: str) -> Pipeline:
        """The model that makes the last steps, opened once; ValueError where it cannot go on with this one's latents.

        It is given this one's autoencoder, which is the one that decodes.
        """
        if self._second is None or self._second.model != source:
            fast = self._residence is None
            parts = load_model(source, *((self.runtime.dtype, self.runtime.device) if fast else (None, "cpu")))
            check_pair(self.preset, preset_of(parts), source)
            parts = replace(parts, vae=self.vae)
            self._second = Pipeline(parts, self.runtime if fast else None, source, self.batch)
            self.admit(self._second)
        return self._second

    def dressing(self) -> Wardrobe:
        """The networks as they are now, with what they wear."""
        towers = self.towers
        if self.denoiser is not self._wardrobe.denoiser or towers != self._wardrobe.towers:
            self._wardrobe.undress()
            self._wardrobe = Wardrobe(self.denoiser, towers)
        return self._wardrobe

    def plan(self, request: Request) -> Plan:
        """Sampler and points of a resolved request, from noise to data."""
        options = None if request.eta is None else {"eta": request.eta}
        steps = cast(int, request.num_inference_steps)
        return scheduled(request, self.scheduler, self.preset).plan(steps, request.sampler, request.spacing, options)


def load(
    model: str | Path = "mini",
    precision: str | None = None,
    device: str | None = None,
    batch: int | None = None,
    vae: str | Path | None = None,
    base: str | Path | None = None,
    prediction: str | None = None,
    memory: str | None = None,
    request: Request | None = None,
    t5: str | None = None,
    preset: str | None = None,
    compile: str | None = None,
) -> Pipeline:
    """Open a model: the built-in one, a file, a folder, or a hub id.

    precision: float32, bfloat16 or float16; device: cpu, cuda...; None chooses for this machine.
    batch:     most pictures advanced together, see `Pipeline`.
    vae, base, prediction, memory, request, t5, preset, compile: see `Pipeline.from_pretrained`.
    """
    return Pipeline.from_pretrained(
        model, precision, device, batch, vae, base, prediction, memory, request, t5, preset, compile
    )
