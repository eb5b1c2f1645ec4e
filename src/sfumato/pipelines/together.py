"""Pictures made together from one generator, as diffusers makes them: how they start, and who watches each step.

The package's own pipeline gives each picture a generator of its own. Notebooks hand over one for all pictures of a
call, or a list, and expect the numbers to be drawn for all at once.

B pictures, C latent channels, h w latent height and width, n given pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sfumato.cond import Cond
from sfumato.diffusion.around import Limited, Rescale, skipping
from sfumato.diffusion.drive import Run
from sfumato.diffusion.guidance import CFG, Guidance, InstructCFG, Plain
from sfumato.diffusion.keep import Keep
from sfumato.diffusion.path import Point, add_noise
from sfumato.diffusion.prediction import get_prediction
from sfumato.diffusion.samplers import evaluations
from sfumato.diffusion.scheduler import Scheduler, StepNoise
from sfumato.pipelines.start import Setting, Start, skipped

STEP_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


@dataclass(frozen=True)
class Together(Setting):
    """A setting for B pictures at once; `generator` draws for all of them, None is torch's own.

    scheduler: laid for the plan; it says where among its evaluations a run begins midway.
    each:      a generator for each picture, instead of one for all.
    spread:    with these, a single picture is encoded once for each of them.
    apart:     latents of n pictures stay n, to go beside other inputs; else there are B.
    """

    scheduler: Scheduler = field(kw_only=True)
    each: Sequence[torch.Generator] = ()
    spread: bool = True
    apart: bool = False

    def drawn(self, shape: Sequence[int]) -> Tensor:
        """Standard noise of all pictures, in the networks' dtype as diffusers draws it, then float32."""
        if not self.each:
            return self._normal(shape, self.generator)
        rows = [self._normal((1, *shape[1:]), generator) for generator in self.each[: shape[0]]]
        return torch.cat(rows)

    def _normal(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        device = self.device if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=device, dtype=self.dtype).to(self.device).float()

    def latents(self, x: Tensor) -> Tensor:
        """Latents of n pictures, drawn; what has as many channels as a latent is one already."""
        if x.shape[1] == self.shape[1]:
            return self.rows(x.to(self.device).float())
        if self.each:
            rows = self.rows(x) if self.spread else x
            pairs = zip(rows.to(self.device, self.vae.dtype).split(1), self.each, strict=self.spread)
            z = torch.cat([self.vae.to_latents(row, generator).float() for row, generator in pairs])
        else:
            z = self.vae.to_latents(x.to(self.device, self.vae.dtype), self.generator).float()
        return z if self.apart else self.rows(z)

    def mask(self, h: int, w: int) -> Tensor:
        """The same for all pictures."""
        return self.rows(super().mask(h, w))

    def pass_over(self, task: str) -> None:
        """Draw what diffusers draws for latents of a masked picture, though this model is not shown them."""
        mask = self.images.get("mask")
        if task != "inpaint" and isinstance(mask, Tensor) and "kept" not in self.images:
            self.drawn((len(mask), *self.shape[1:]))

    def rows(self, x: Tensor) -> Tensor:
        """Something of n pictures for B; ValueError unless B is a multiple of n."""
        many = self.shape[0]
        if many % len(x):
            raise ValueError(f"{len(x)} pictures were given for {many} to be made; give one, or as many as prompts")
        return x.repeat(many // len(x), *[1] * (x.ndim - 1))

    def from_noise(self, eps: Tensor, concat: Tensor | None = None, label: Tensor | None = None) -> Start:
        """The same with inputs for all pictures."""
        return super().from_noise(eps, *(None if x is None else self.rows(x) for x in (concat, label)))

    def from_image(self, z: Tensor, eps: Tensor, concat: Tensor | None = None) -> Start:
        """The same with latents and inputs for all pictures, from the evaluation that the scheduler has there."""
        plan, scheduler = self.plan, self.scheduler
        index = skipped(len(plan.grid) - 1, self.strength)
        place, points = index * scheduler.order, evaluations(plan.sampler, plan.grid)
        sampler = plan.sampler if index == 0 else plan.midway or plan.sampler
        # Else it lies inside a step, or is asked about once more right after.
        if points[place] in plan.grid and points[place] not in points[place + 1 : place + 2]:
            index = scheduler.asked_from(plan, place)
            sampler = scheduler.entered(plan, index)
        x = add_noise(self.rows(z), eps, plan.grid[index])
        return Start(x, plan.grid[index:], sampler, None if concat is None else self.rows(concat))


class CastNoise:
    """A scheduler's noise, drawn in the networks' dtype as diffusers draws it."""

    def __init__(self, source: StepNoise, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype

    def __call__(self, x: Tensor, /) -> Tensor:
        """Fresh standard noise like x."""
        return self.source(x.to(self.dtype)).to(x)

    def between(self, x: Tensor, a: Point, b: Point, /) -> Tensor:
        """The increment of the scheduler's Brownian path."""
        return self.source.between(x, a, b)


@dataclass(frozen=True)
class Words:
    """Token states (B, K, D) of the prompts, and of what guidance leads away from; None without guidance.

    pooled, uncond_pooled: what else is told of each (B, P), where a model wants it.
    """

    cond: Tensor
    uncond: Tensor | None
    pooled: Tensor | None = None
    uncond_pooled: Tensor | None = None

    def joined(self, task: str) -> Tensor:
        """As diffusers' loops hold them: (2 B, K, D), unconditional first; for instructions (3 B, K, D), last."""
        if self.uncond is None:
            return self.cond
        return torch.cat([self.cond, self.uncond, self.uncond] if task == "instruct" else [self.uncond, self.cond])

    @property
    def joined_pooled(self) -> Tensor | None:
        """What else is told, likewise: (2 B, P), unconditional first."""
        sides = [side for side in (self.uncond_pooled, self.pooled) if side is not None]
        return torch.cat(sides) if sides else None


@dataclass(frozen=True)
class Skipped:
    """Skip-layer guidance: numbers of blocks such as "7,8,9", its weight, and the shares of the steps for it."""

    layers: str
    scale: float
    shares: tuple[float, float]


@dataclass
class Weights:
    """What guides: the prompt's weight, the image's for instructions, how far deviations are restored, what to skip."""

    scale: float
    image_scale: float | None = None
    rescale: float = 0.0
    skipped: Skipped | None = None

    @property
    def guides(self) -> bool:
        """Whether there is an unconditional side: diffusers' rule, by which weights below 1 count as none."""
        return self.scale > 1 and (self.image_scale is None or self.image_scale >= 1)


def guided(words: Words, weights: Weights, start: Start, scheduler: Scheduler) -> Guidance:
    """What to ask for the pictures of a start."""

    def told(context: Tensor, concat: Tensor | None) -> Cond:
        pooled = words.pooled if context is words.cond else words.uncond_pooled
        return Cond(context, start.label if pooled is None else pooled, concat)

    guidance: Guidance = Plain(told(words.cond, start.concat))
    if words.uncond is not None and weights.image_scale is not None:
        assert start.concat is not None
        image = told(words.uncond, start.concat)
        nothing = told(words.uncond, torch.zeros_like(start.concat))
        guidance = InstructCFG(told(words.cond, start.concat), image, nothing, weights.scale, weights.image_scale)
    elif words.uncond is not None:
        guidance = sides = CFG(told(words.cond, start.concat), told(words.uncond, start.concat), weights.scale)
        if weights.skipped is not None:
            some = weights.skipped
            guidance = skipping(sides, sides.cond, some.scale, some.layers, some.shares, start.grid)
    if weights.rescale > 0:
        guidance = Rescale(guidance, weights.rescale, get_prediction(scheduler.prediction))
    if scheduler.config.get("clip_sample") or scheduler.config.get("thresholding"):
        guidance = Limited(guidance, scheduler.limit, scheduler.keeps_eps)
    return guidance if start.wrap is None else start.wrap(guidance)


class Watched(Protocol):
    """What the watcher of a call needs of the front door."""

    _interrupt: bool
    _guidance_scale: float


@dataclass
class Watcher:
    """Tells callbacks of each step of a run, in the scheduler's own coordinates, and takes their changes over.

    on_end: called (door, i, t, tensors) after each step; what it returns replaces latents, prompt_embeds and
            pooled_prompt_embeds.
    names:  of the tensors that it is shown.
    on_step, every: the older kind, called (i, t, latents).
    """

    door: Watched
    task: str
    start: Start
    scheduler: Scheduler
    words: Words
    weights: Weights
    on_end: Callable[..., Mapping[str, Any] | None] | None = None
    names: Sequence[str] = ("latents",)
    on_step: Callable[..., Any] | None = None
    every: int = 1
    tick: Callable[[], None] = lambda: None
    done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        points = evaluations(self.start.sampler, self.start.grid)
        like = self.scheduler.timesteps if points else torch.zeros(0)
        self.times = torch.tensor([p.t for p in points], dtype=like.dtype, device=like.device)
        self.warm = len(points) - (len(self.start.grid) - 1) * self.scheduler.order

    def __call__(self, run: Run) -> bool | None:
        """After a step; False once the door was told to stop."""
        i, last = self.done, self.done == len(self.times) - 1
        self.done += 1
        if run.result is not None and isinstance(run.guidance, Keep):
            run.x = run.result = run.guidance.ended(run.result)
        t: Any = self.times[i] if i < len(self.times) else math.nan
        if self.on_end is not None:
            tensors: dict[str, Tensor | None] = {
                "latents": self.latents(run),
                "prompt_embeds": self.words.joined(self.task),
            }
            tensors["negative_prompt_embeds"] = self.words.uncond
            tensors["pooled_prompt_embeds"] = self.words.joined_pooled
            self.take(run, self.on_end(self.door, i, t, {name: tensors[name] for name in self.names}) or {})
        if last or (i + 1 > self.warm and (i + 1) % self.scheduler.order == 0):
            self.tick()
            if self.on_step is not None and i % self.every == 0:
                self.on_step(i // self.scheduler.order, t, self.latents(run))
        return False if self.door._interrupt else None

    def latents(self, run: Run) -> Tensor:
        """The run's x as diffusers' loops hold it."""
        return run.x / self.scheduler.scale(self.start.grid[-1] if run.result is not None else run.point)

    def take(self, run: Run, changes: Mapping[str, Any]) -> None:
        """Go on with what a callback returned."""
        if "latents" in self.names and "latents" in changes:
            point = self.start.grid[-1] if run.result is not None else run.point
            run.x = changes["latents"].to(run.x) * self.scheduler.scale(point)
            run.result = run.x if run.result is not None else None
        scale = self.door._guidance_scale
        if "pooled_prompt_embeds" in changes:
            *uncond_pooled, pooled = changes["pooled_prompt_embeds"].split(len(run.x))
            self.words = replace(self.words, pooled=pooled, uncond_pooled=next(iter(uncond_pooled), None))
        if "prompt_embeds" in changes or "pooled_prompt_embeds" in changes or scale != self.weights.scale:
            self.weights.scale = scale
            joined = changes.get("prompt_embeds", self.words.joined(self.task))
            parts = joined.chunk(max(1, len(joined) // len(run.x)))
            cond = parts[0] if self.task == "instruct" else parts[-1]
            uncond = parts[-1] if self.task == "instruct" else parts[0]
            self.words = replace(
                self.words, cond=cond, uncond=uncond if self.weights.guides and len(parts) > 1 else None
            )
            run.guidance = guided(self.words, self.weights, self.start, self.scheduler)


class Bar:
    """A progress bar on a terminal or in a notebook, silent elsewhere; it can be looped over and entered."""

    def __init__(self, iterable: Iterable[Any] | None, total: int | None, config: Mapping[str, Any]) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        shown = (console.is_terminal or console.is_jupyter) and not config.get("disable", False)
        self.iterable = iterable
        self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self.bar = Progress(console=console, disable=not shown, transient=not config.get("leave", True))
        self.task = self.bar.add_task(str(config.get("desc") or ""), total=self.total)

    def update(self, n: int = 1) -> None:
        """Say that so many more are done."""
        self.bar.update(self.task, advance=n)

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.iterable if self.iterable is not None else range(self.total or 0):
                yield item
                self.update()
