"""`Pipeline`: a model folder's parts, and requests turned into pictures.

B pictures in a network call, C channels, h w latent height and width, H W picture height and width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from PIL import Image
from torch import Tensor

from sfumato import __version__
from sfumato.cond import Cond
from sfumato.diffusion.drive import Run, drive
from sfumato.diffusion.guidance import CFG
from sfumato.diffusion.samplers import SAMPLERS, evaluations
from sfumato.diffusion.scheduler import Plan, Scheduler
from sfumato.images import to_pil
from sfumato.models.autoencoder import AutoencoderKL
from sfumato.models.clip import CLIPTextModel
from sfumato.models.unet import UNet
from sfumato.pipelines.request import Request, parse
from sfumato.pipelines.start import text_to_image
from sfumato.presets import Preset, detect, model_folder
from sfumato.runtime import Runtime, as_it_is, choose
from sfumato.text.encode import encode_prompts
from sfumato.text.tokenizer import ClipTokenizer
from sfumato.weights.folder import Components, load_folder, save_folder

OutputType = Literal["pil", "pt", "latent"]
OUTPUT_TYPES = ("pil", "pt", "latent")


@dataclass(frozen=True)
class Progress:
    """Told to a callback after each evaluation of each picture.

    image: number of the picture in this call; done, total: its evaluations.
    x0:    the clean latent (1, C, h, w) foreseen.
    """

    image: int
    done: int
    total: int
    x0: Tensor


Callback = Callable[[Progress], bool | None]


@dataclass(frozen=True)
class PipelineOutput:
    """Pictures and what each was made from.

    images:   PIL pictures ("pil"), a tensor (n, 3, H, W) in [0, 1] ("pt") or latents (n, C, h, w) ("latent").
    requests: one resolved request a picture, which makes the same picture again.
    """

    images: list[Image.Image] | Tensor
    requests: list[Request]


class Pipeline:
    """Text to image with a U-Net, a KL autoencoder and a CLIP text tower.

    parts:   the components, e.g. from `load_folder`.
    runtime: where they run, moved and converted in place; None leaves them where and as they are.
    model:   what requests call this model: a built-in name or the folder.
    batch:   most pictures advanced together in shared network calls. By default one on a CPU, where a picture is
             then the same to the last bit alone and among others (rounding in PyTorch's matrix products depends on
             the number of rows), and 8 elsewhere.

    The five parts are attributes and may be replaced; a new `scheduler` brings its sampler and spacing along.
    """

    def __init__(
        self, parts: Components, runtime: Runtime | None = None, model: str = "mini", batch: int | None = None
    ) -> None:
        if batch is not None and batch < 1:
            raise ValueError(f"batch = {batch}; give 1 or more pictures")
        self.unet: UNet = parts.unet
        self.vae: AutoencoderKL = parts.vae
        self.text_encoder: CLIPTextModel = parts.text_encoder
        self.tokenizer: ClipTokenizer = parts.tokenizer
        self._scheduler = parts.scheduler
        self.runtime = runtime or as_it_is(next(self.unet.parameters()))
        self.model = model
        self.batch = batch
        config = self.unet.config
        side = config.sample_size if isinstance(config.sample_size, int) else (config.sample_size or (64,))[0]
        self.preset: Preset = detect(config.cross_attention_dim, side * self.factor, self._scheduler.spacing)
        if runtime is not None:
            self.to()

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        precision: str | None = None,
        device: str | None = None,
        batch: int | None = None,
    ) -> Pipeline:
        """Open a model folder, or a built-in model by name, on the best device in the best precision.

        Raises FileNotFoundError or ValueError when the folder is not a complete model, see `load_folder`.
        """
        runtime = choose(device, precision)
        parts = load_folder(model_folder(folder), runtime.dtype, runtime.device)
        return cls(parts, runtime, model=str(folder), batch=batch)

    def save_pretrained(self, folder: Path | str, precision: str | None = None) -> None:
        """Write a model folder, which diffusers opens as well; `precision` converts the weights."""
        save_folder(self, folder, None if precision is None else choose("cpu", precision).dtype)

    def made_with(self) -> dict[str, str]:
        """What besides the request decides the exact pixels: versions, device, precision."""
        versions = {"sfumato": __version__, "torch": torch.__version__}
        return {**versions, "device": str(self.runtime.device), "precision": self.runtime.precision}

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
        layout = torch.channels_last if self.runtime.channels_last else torch.contiguous_format
        for module in (self.unet, self.vae):
            module.to(memory_format=layout)  # type: ignore[call-overload]
        for part in (self.unet, self.vae, self.text_encoder):
            part.to(device=self.runtime.device, dtype=self.runtime.dtype)
        return self

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        eta: float | None = None,
        num_images_per_prompt: int = 1,
        output_type: OutputType = "pil",
        callback: Callback | None = None,
    ) -> PipelineOutput:
        """Pictures of a prompt, or of each prompt of a list; the arguments are `Request`'s fields.

        Picture i of a prompt has seed + i and does not depend on the others.
        Raises ValueError for a value that is not allowed, naming what is.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        requests = [
            parse(
                prompt=text,
                negative_prompt=negative_prompt,
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                seed=seed,
                sampler=sampler,
                spacing=spacing,
                eta=eta,
                num_images=num_images_per_prompt,
                model=self.model,
            )
            for text in prompts
        ]
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
        done = list(self._latents(singles, noise, callback))
        kept = [request for request, _ in done]
        if not done:
            return PipelineOutput([], kept)
        if output_type == "latent":
            return PipelineOutput(torch.cat([z for _, z in done]), kept)
        pictures = [self.decode(z) for _, z in done]
        if output_type == "pt":
            return PipelineOutput(torch.cat([(x / 2 + 0.5).clamp(0, 1) for x in pictures]), kept)
        return PipelineOutput([image for x in pictures for image in to_pil(x)], kept)

    def stream(
        self, requests: Request | Sequence[Request], callback: Callback | None = None
    ) -> Iterator[tuple[Request, Image.Image]]:
        """The pictures of some requests one by one, each given out as soon as its group is done."""
        for request, z in self._latents(self.resolve(requests), None, callback):
            yield request, to_pil(self.decode(z))[0]

    def resolve(self, requests: Request | Sequence[Request]) -> list[Request]:
        """One complete request a picture: the model's preferences filled in, checked against the model.

        Raises ValueError when there is none, or one asks for what the model does not have.
        """
        asked = [requests] if isinstance(requests, Request) else list(requests)
        if not asked:
            raise ValueError("no prompt was given; give at least one")
        resolved = [request.resolved(self.preset) for request in asked]
        for request in resolved:
            self._check(request)
        return [single for request in resolved for single in request.singles()]

    @torch.inference_mode()
    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in about [-1, 1], float32, of latents (B, C, h, w), one at a time."""
        z = z.to(self.runtime.device, self.runtime.dtype)
        return torch.cat([self.vae.to_pixels(row[None]).float() for row in z])

    def net(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The U-Net in the runtime's dtype: (B, C, h, w) to the same, float32."""
        return self.unet(x.to(self.runtime.dtype), t, cond).float()

    def _latents(
        self, singles: Sequence[Request], noise: Tensor | None, callback: Callback | None
    ) -> Iterator[tuple[Request, Tensor]]:
        """Each picture's request and final latent (1, C, h, w), group by group."""
        states = self._text_states(singles)
        group = self.batch or (1 if self.runtime.device.type == "cpu" else 8)
        for first in range(0, len(singles), group):
            some = singles[first : first + group]
            runs = [
                self._run(request, states, None if noise is None else noise[first + i : first + i + 1])
                for i, request in enumerate(some)
            ]
            drive(runs, self.net, None if callback is None else _reporter(runs, first, callback))
            for request, run in zip(some, runs, strict=True):
                if run.result is not None:
                    yield request, run.result

    def _run(self, request: Request, states: dict[str, Cond], eps: Tensor | None) -> Run:
        """One picture's coroutine with its guidance, ready to be driven."""
        plan = self._plan(request)
        # Seeded noise is drawn on the CPU in float32, so that it is the same on every device.
        generator = torch.Generator().manual_seed(cast(int, request.seed))
        shape = self._shape(request)
        if eps is None:
            eps = torch.randn(shape, generator=generator)
        if eps.shape != shape:
            raise ValueError(f"noise of shape {tuple(eps.shape)} for one picture; this request needs {shape}")
        device = self.runtime.device
        start = text_to_image(eps.to(device, torch.float32), plan)

        def fresh(x: Tensor) -> Tensor:
            return torch.randn(x.shape, generator=generator).to(device)

        cond, uncond = (
            replace(states[text], concat=start.concat) for text in (request.prompt, request.negative_prompt)
        )
        guidance = CFG(cond, uncond, cast(float, request.guidance_scale))
        return Run(
            plan.sampler(start.x, start.grid, fresh),
            guidance,
            self.scheduler.prediction,
            len(evaluations(plan.sampler, plan.grid)),
        )

    def _plan(self, request: Request) -> Plan:
        options = None if request.eta is None else {"eta": request.eta}
        steps = cast(int, request.num_inference_steps)
        return self.scheduler.plan(steps, request.sampler, request.spacing, options)

    def _shape(self, request: Request) -> tuple[int, int, int, int]:
        height, width = (cast(int, side) // self.factor for side in (request.height, request.width))
        return 1, self.vae.config.latent_channels, height, width

    def _text_states(self, singles: Sequence[Request]) -> dict[str, Cond]:
        """The condition (1, L, D) of each distinct text, each read alone so that it depends on no other."""
        texts = dict.fromkeys(text for r in singles for text in (r.prompt, r.negative_prompt))
        return {text: encode_prompts(self.tokenizer, self.text_encoder, [text]) for text in texts}

    def _check(self, request: Request) -> None:
        for option in ("clip_sample", "thresholding"):
            if self.scheduler.config.get(option):
                raise ValueError(
                    f"the scheduler's {option} = true is for pixel models and is not applied to latents here; "
                    f"set it to false in scheduler_config.json, or use the scheduler's own step()"
                )
        for name in ("width", "height"):
            side, f = getattr(request, name), self.factor
            if side % f:
                nearest = max(f, round(side / f) * f)
                raise ValueError(f"{name} = {side} is not a multiple of {f}; the nearest that is: {nearest}")
        if request.eta is not None:
            # The coroutine's own keywords are the one list of a sampler's options.
            able = [name for name, e in SAMPLERS.items() if "eta" in inspect.signature(e.run).parameters]
            if request.sampler not in able:
                raise ValueError(f"sampler {request.sampler!r} takes no eta; these do: {', '.join(able)}")
        self._plan(request)


StableDiffusionPipeline = Pipeline


def load(
    model: str | Path = "mini",
    precision: str | None = None,
    device: str | None = None,
    batch: int | None = None,
) -> Pipeline:
    """Open a model: the built-in one, or a folder.

    precision: float32, bfloat16 or float16; device: cpu, cuda...; None chooses for this machine.
    batch:     most pictures advanced together, see `Pipeline`.
    """
    return Pipeline.from_pretrained(model, precision, device, batch)


def _reporter(runs: Sequence[Run], first: int, callback: Callback) -> Callable[[Run], bool | None]:
    """A driver's callback that tells the caller's which picture it is about."""
    numbers = {id(run): first + i for i, run in enumerate(runs)}

    def report(run: Run) -> bool | None:
        assert run.x0 is not None
        return callback(Progress(numbers[id(run)], run.done, run.total, run.x0))

    return report
