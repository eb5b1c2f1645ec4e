"""From resolved requests to latents, and from latents to pictures, with the parts of a pipeline.

C latent channels, h w latent height and width, H W picture height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from PIL import Image
from torch import Tensor, nn

from sfumato.approximate import reuse, rounded
from sfumato.diffusion.brownian import PictureNoise
from sfumato.diffusion.drive import Run, drive
from sfumato.diffusion.keep import Keep
from sfumato.diffusion.recall import Recalling
from sfumato.diffusion.samplers import evaluations
from sfumato.diffusion.samplers.base import Noise
from sfumato.pipelines.check import PICTURES
from sfumato.pipelines.conditions import batches, siblings
from sfumato.pipelines.enlarge import Windows, enlarged
from sfumato.pipelines.guided import surrounded
from sfumato.pipelines.inputs import open_picture
from sfumato.pipelines.masks import Frame, framed
from sfumato.pipelines.memory import RowByRow, idle, tiles
from sfumato.pipelines.refine import check_share, rest, until
from sfumato.pipelines.request import Request
from sfumato.pipelines.start import STARTS, Setting, Start, remaining

if TYPE_CHECKING:
    from sfumato.pipelines.pipeline import Pipeline


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


@dataclass(frozen=True, eq=False)
class Job:
    """One picture on its way. done: evaluations before this run; more: those that will follow it."""

    image: int
    request: Request
    setting: Setting
    run: Run
    done: int = 0
    more: int = 0


def latents(
    pipe: Pipeline, singles: Sequence[Request], noise: Tensor | None, callback: Callback | None
) -> Iterator[tuple[Request, Tensor]]:
    """Each picture's request and final latent (1, C, h, w), group by group."""
    pipe.lay_out()
    try:
        for first, wanted, some in batches(singles, most_together(pipe)):
            pipe.dressing().wear(wanted)
            net: Callable[..., Tensor] = rounded(pipe.denoiser)(pipe.net) if some[0].int8 else pipe.net
            net = RowByRow(net)
            tile = some[0].tile
            net = net if tile is None else Windows(net, tile // pipe.factor)
            with tiles(pipe.vae, tile is not None):
                rows = None if noise is None else noise[first : first + len(some)].split(1)
                jobs = [begun(pipe, first + i, r, None if rows is None else rows[i]) for i, r in enumerate(some)]
                pipe.texts_are_read()
                spare(pipe, pipe.towers.present)
                advance(jobs, net, callback)
                follow = enlarged_job if some[0].refiner is None else refined_job
                again = {job.image: follow(pipe, job) for job in jobs if job.more and job.run.result is not None}
                if some[0].refiner is not None:
                    net = RowByRow(pipe.refining(some[0].refiner).net)
                advance(list(again.values()), net, callback)
            for job in (again.get(job.image, job) for job in jobs):
                z, guidance = job.run.result, job.run.guidance
                if z is not None:
                    yield job.request, guidance.ended(z) if isinstance(guidance, Keep) else z
    finally:
        pipe.dressing().undress()


def most_together(pipe: Pipeline) -> int | Callable[[Request], int]:
    """How many pictures share network calls: as the pipeline says, else by their size on this device."""
    if pipe.batch is not None:
        return pipe.batch

    def by_size(request: Request) -> int:
        return pipe.runtime.together(*(cast(int, side) // pipe.factor for side in (request.height, request.width)))

    return by_size if pipe.runtime.device.type == "cpu" else pipe.runtime.together(1, 1)


def companies(pipe: Pipeline, singles: Sequence[Request]) -> list[tuple[int, int] | None]:
    """For each picture its place among how many in its network calls; None where they differ in more than seeds.

    The rounding of products depends on the number of rows, so this belongs to what makes the exact pixels.
    """
    found: list[tuple[int, int] | None] = []
    for _, _, some in batches(singles, most_together(pipe)):
        alike = all(siblings(some[0], other) for other in some)
        found += [(i, len(some)) if alike else None for i in range(len(some))]
    return found


def advance(jobs: Sequence[Job], net: Callable[..., Tensor], callback: Callback | None) -> None:
    """Drive the runs of some jobs to their ends, and tell the callback which picture each evaluation is about."""
    owners = {id(job.run): job for job in jobs}

    def report(run: Run) -> bool | None:
        assert run.x0 is not None and callback is not None
        job = owners[id(run)]
        total = job.done + run.total + job.more if run.total else 0
        return callback(Progress(job.image, job.done + run.done, total, run.x0))

    drive([job.run for job in jobs], net, None if callback is None else report)


def begun(pipe: Pipeline, image: int, request: Request, eps: Tensor | None) -> Job:
    """A picture before its first step."""
    # Seeded noise is drawn on the CPU in float32, so that it is the same on every device.
    generator = torch.Generator().manual_seed(cast(int, request.seed))
    setting = setting_of(pipe, request, generator, eps)
    with torch.no_grad():
        start = STARTS[pipe.preset.task](setting)
    more = 0
    if request.hires_scale is not None:
        more = len(evaluations(*remaining(setting.plan, cast(float, request.hires_strength))))
    if request.refiner is not None:
        share, other = cast(float, request.refiner_start), pipe.refining(request.refiner)
        steps = check_share(start.grid, share, pipe.scheduler)
        start = replace(start, sampler=until(start.sampler, start.grid, steps))
        more = len(evaluations(*rest(other.plan(request), share, other.scheduler)))
    return Job(image, request, setting, run_of(pipe, request, start, generator), more=more)


def refined_job(pipe: Pipeline, job: Job) -> Job:
    """A picture that another model takes over at the noise level where the first one stopped."""
    request, z = job.request, job.run.result
    other = pipe.refining(cast(str, request.refiner))
    sampler, grid = rest(other.plan(request), cast(float, request.refiner_start), other.scheduler)
    assert z is not None
    run = run_of(other, request, Start(z, grid, sampler), job.setting.generator)
    return Job(job.image, request, job.setting, run, done=job.run.done)


def enlarged_job(pipe: Pipeline, job: Job) -> Job:
    """A picture enlarged, before the model goes over it once more; its noise goes on where it stopped."""
    request, before = job.request, job.setting
    strength, scale = cast(float, request.hires_strength), cast(float, request.hires_scale)
    h, w = (round(side * scale) for side in before.shape[2:])
    setting = replace(before, shape=(1, before.shape[1], h, w), strength=strength, images={}, eps=None, variation=None)
    assert job.run.result is not None
    with torch.no_grad():
        z = enlarged(job.run.result, (h, w), request.hires_upscaler or "lanczos", pipe.decode, setting.latents)
        start = setting.from_image(z, setting.noise())
    run = run_of(pipe, request, start, setting.generator)
    return Job(job.image, request, setting, run, done=job.run.done)


def run_of(pipe: Pipeline, request: Request, start: Start, generator: torch.Generator | None) -> Run:
    """The coroutine of a start with its guidance, ready to be driven."""
    noise: Noise = _fresh if generator is None else PictureNoise(generator)
    inner = pipe.dressing().guidance(request, pipe.preset, start)
    guidance = surrounded(inner, request, pipe.scheduler, pipe.preset, start.grid)
    if isinstance(guidance, Recalling):
        reuse(pipe.denoiser)  # which stays, as it computes what it always did where nothing is to be kept
    return Run(
        start.sampler(start.x, start.grid, noise),
        guidance if start.wrap is None else start.wrap(guidance),
        pipe.scheduler.prediction,
        len(evaluations(start.sampler, start.grid)),
    )


def setting_of(pipe: Pipeline, request: Request, generator: torch.Generator, eps: Tensor | None) -> Setting:
    """What the start of a resolved request has to work with."""
    height, width = (cast(int, side) // pipe.factor for side in (request.height, request.width))
    shape = (1, pipe.denoiser.config.out_channels, height, width)
    if eps is not None and eps.shape != shape:
        raise ValueError(f"noise of shape {tuple(eps.shape)} for one picture; this request needs {shape}")
    images, frame = pictures_of(request), frame_of(request, pipe.factor)
    varied = request.variation_strength
    return Setting(
        plan=pipe.plan(request),
        shape=shape,
        generator=generator,
        vae=pipe.vae,
        device=pipe.runtime.device,
        dtype=pipe.runtime.dtype,
        eps=None if eps is None else eps.float(),
        images=images if frame is None else {**images, **frame.pictures},
        strength=1.0 if request.strength is None else request.strength,
        noise_level=request.noise_level or 0,
        low_res_scheduler=pipe.low_res_scheduler,
        depth_estimator=pipe.depth_estimator,
        content=request.masked_content or "original",
        soft=bool(request.soft_mask),
        variation=(cast(int, request.variation_seed), varied) if varied else None,
    )


def pictures_of(request: Request) -> dict[str, Image.Image]:
    """The pictures that came with a request, opened."""
    pictures = {name: getattr(request, name) for name in PICTURES}
    return {name: open_picture(given, name) for name, given in pictures.items() if given is not None}


def frame_of(request: Request, factor: int) -> Frame | None:
    """What a settled request repaints a part of; None where it does not. ValueError where nothing is masked."""
    if request.mask is None and request.outpaint is None:
        return None
    pictures = pictures_of(request)
    return framed(request, pictures["image"], pictures.get("mask"), factor)


def picture(pipe: Pipeline, request: Request, z: Tensor) -> Tensor:
    """The picture (1, 3, H, W) of a resolved request's final latent (1, C, h, w), with what was not masked put back."""
    spare(pipe, [pipe.denoiser])
    with tiles(pipe.vae, request.tile is not None):
        x = pipe.decode(z)
    frame = frame_of(request, pipe.factor) if request.paste else None
    return x if frame is None else frame.put_back(x)


def spare(pipe: Pipeline, networks: Iterable[nn.Module]) -> None:
    """Networks rest now, where their weights stay on a CPU."""
    if pipe.memory == "fast" and pipe.runtime.device.type == "cpu":
        idle(networks)


def _fresh(x: Tensor, /) -> Tensor:
    """Noise of PyTorch's own generator."""
    return torch.randn(x.shape).to(x.device)
