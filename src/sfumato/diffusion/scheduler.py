"""The samplers' coroutines turned inside out, for people who write their own denoising loop.

`Scheduler` speaks the protocol that everybody knows (set_timesteps, scale_model_input, step, add_noise). The
names that model folders and notebooks use (DDIMScheduler and so on) are configured facades in `named.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .brownian import Brownian
from .config import Configured
from .grid import make_grid
from .path import END, Path, Point, VPPath
from .prediction import get_prediction
from .samplers import Sampler, Steps, ddim, evaluations, get_sampler

Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class Plan:
    """How to sample with a model: what a facade decides before the first step.

    sampler:    the coroutine function with its options bound.
    grid:       its points; sampling starts from x = init_scale * (standard noise) at grid[0].
    init_scale: 1, or less by a hair where the schedule does not end in pure noise.
    midway:     the sampler for a run that enters the grid after its first point; None takes `sampler`.
    """

    sampler: Sampler
    grid: list[Point]
    init_scale: float = 1.0
    midway: Sampler | None = None


@dataclass(frozen=True)
class StepOutput:
    """What `step` returns: the sample to go on with, and the clean picture seen in the one before."""

    prev_sample: Tensor
    pred_original_sample: Tensor

    def __getitem__(self, key: int | str) -> Tensor:
        """The sample for 0, the clean picture for 1, or either by its name."""
        names = ("prev_sample", "pred_original_sample")
        return {name: getattr(self, name) for name in names}[names[key] if isinstance(key, int) else key]


class Scheduler(Configured):
    """A sampler on a path, driven from outside.

    path:         VPPath, VEPath, FlowPath or AnglePath.
    sampler:      a name in SAMPLERS.
    prediction:   what the network says; a name in PREDICTIONS.
    spacing:      a name in SPACINGS.
    steps_offset: added to each index by the "leading" spacing.

    `step` always works on the sample that it is handed, so the caller may edit it between steps. A timestep
    out of turn begins anew there: one-step samplers do not notice, others forget their history.
    """

    order: ClassVar[int] = 1
    integer_times: ClassVar[bool] = False
    takes_eta: ClassVar[bool] = False  # `step` always says what eta is
    keeps_eps: ClassVar[bool] = False  # DDIM: limiting the clean picture leaves the predicted noise as it was

    def __init__(
        self,
        path: Path,
        sampler: str = "ddim",
        prediction: str = "epsilon",
        spacing: str = "trailing",
        steps_offset: int = 0,
    ) -> None:
        self.entry = get_sampler(sampler)
        self.steps_offset = steps_offset
        self.prepare(path, prediction, spacing)

    def prepare(self, path: Path, prediction: str, spacing: str) -> None:
        """Set what every facade has; the rest of the state belongs to `set_timesteps`."""
        self.path = path
        self.num_train_timesteps = path.num_train_timesteps
        self.rule = get_prediction(prediction)
        self.prediction = self.rule.name
        self.spacing = spacing
        self.num_inference_steps: int | None = None
        self.device: torch.device | str | None = None
        self.begin_index: int | None = None
        self._plan: Plan | None = None
        self._given: Tensor | None = None  # timesteps as the caller wants them: same times, other dtype or device
        self._evaluations: list[Point] = []
        self._places: dict[float, list[int]] = {}  # where in the evaluations each time stands
        self._steps: Steps | None = None
        self._point: Point | None = None
        self._eta = 0.0
        self.noise_source: tuple[Generators | None, Tensor | None] = (None, None)

    # What a configured facade decides -------------------------------------------------------------

    def own_plan(self, steps: int, given: Sequence[Point] = ()) -> Plan:
        """The plan of this facade's own sampler and spacing; `given` are points to take instead of the spacing's."""
        grid = [*given, END] if given else make_grid(self.path, self.spacing, steps, self.steps_offset)
        return Plan(self.entry.run, grid)

    def at_sigma(self, sigma: float) -> Point:
        """The point of one of the noise levels that a caller gives."""
        return self.path.at_level(sigma)

    def entered(self, plan: Plan, index: int) -> Sampler:
        """The sampler for a run that begins at a point of the plan's grid."""
        return plan.sampler if index == 0 else plan.midway or plan.sampler

    def asked_from(self, plan: Plan, place: int) -> int:
        """Where in the plan's grid a run begins whose first evaluation has this place in `timesteps`."""
        return plan.grid.index(self._evaluations[place])

    def scale(self, point: Point) -> float:
        """The caller's samples are x / scale; 1 but for the Euler family on a variance-preserving path."""
        return 1.0

    def limit(self, x0: Tensor) -> Tensor:
        """The clean picture brought into its permitted range."""
        return x0

    # What a pipeline asks -------------------------------------------------------------------------

    def plan(
        self,
        steps: int,
        sampler: str | None = None,
        spacing: str | None = None,
        options: Mapping[str, object] | None = None,
    ) -> Plan:
        """How to sample with any registered sampler and spacing; None takes this facade's own.

        options: keywords of the sampler's coroutine, such as eta. ValueError for unknown names.
        """
        points = [] if spacing is None else make_grid(self.path, spacing, steps, self.steps_offset)[:-1]
        plan = self.own_plan(steps, points)
        run: Callable[..., Steps] = plan.sampler if sampler is None else get_sampler(sampler).run
        return replace(plan, sampler=partial(run, **(options or {})))

    def grid(self, steps: int, spacing: str | None = None, sampler: str | None = None) -> list[Point]:
        """The grid of `plan`."""
        return self.plan(steps, sampler, spacing).grid

    # The protocol ---------------------------------------------------------------------------------

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha² of every training step, (N,) float32; AttributeError on a path that has none."""
        if not isinstance(self.path, VPPath):
            raise AttributeError(f"{type(self.path).__name__} has no alphas_cumprod; use path.at(t).alpha")
        return self.path.alphas_cumprod

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Lay the grid and begin anew; the `timesteps` that follow go to `device`.

        For a number of steps, or through `timesteps` or noise levels `sigmas` (the last may be 0) of the
        caller's own. ValueError unless one of the three is given, and for a list that does not go from noise
        to data.
        """
        if sum(x is not None for x in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("set_timesteps takes one of num_inference_steps, timesteps and sigmas")
        given: list[Point] = []
        if timesteps is not None:
            given = [self.path.point(float(t)) for t in timesteps]
        elif sigmas is not None:
            levels = [float(sigma) for sigma in sigmas]
            given = [self.at_sigma(level) for level in (levels[:-1] if levels[-1:] == [0.0] else levels)]
        if num_inference_steps is None and not given:
            raise ValueError("set_timesteps was given an empty list; it needs one timestep or noise level at least")
        if any(a.ratio <= b.ratio for a, b in pairwise(given)):
            name, values = ("timesteps", timesteps) if timesteps is not None else ("sigmas", sigmas)
            raise ValueError(f"{name} must fall from noise to data, got {list(values or ())}")
        steps = len(given) if num_inference_steps is None else num_inference_steps
        self.num_inference_steps = steps
        self.device = device
        self.begin_index = None
        self._steps = None
        self._plan = None
        self.lay(steps, given)

    def lay(self, steps: int, given: Sequence[Point] = ()) -> Plan:
        """Make the plan and list its evaluations."""
        plan = self.own_plan(steps, given)
        self._evaluations = evaluations(plan.sampler, plan.grid)
        if not self._evaluations:
            raise ValueError(
                f"{self.entry.name} finds its points while it runs, so there are no timesteps to loop over; "
                f"use a pipeline or drive(), or another sampler"
            )
        self._places = {}
        self._given = None
        for i, point in enumerate(self._evaluations):
            self._places.setdefault(self.time(point.t), []).append(i)
        self._plan = plan
        return plan

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say at which entry of `timesteps` the loop will start, where a repeated entry leaves that open."""
        self.begin_index = begin_index

    @property
    def laid(self) -> Plan:
        """The plan in use; before `set_timesteps` it visits every training step."""
        return self._plan if self._plan is not None else self.lay(self.num_train_timesteps)

    @property
    def timesteps(self) -> Tensor:
        """The network's time at each evaluation: int64, or float32 where times may be fractional."""
        _ = self.laid
        if self._given is not None:
            return self._given
        dtype = torch.int64 if self.integer_times else torch.float32
        return torch.tensor([p.t for p in self._evaluations], dtype=dtype, device=self.device)

    @timesteps.setter
    def timesteps(self, times: Tensor) -> None:
        """Keep the same times in another dtype or on another device; ValueError for other times."""
        own = self.timesteps
        if own.shape != times.shape or not torch.equal(own.double().cpu(), times.double().cpu()):
            raise ValueError("timesteps follow from set_timesteps; only their dtype and device can be assigned")
        self._given = times

    @property
    def sigmas(self) -> Tensor:
        """The noise level at each evaluation and at the end, float32."""
        end = self.laid.grid[-1]
        points = [*self._evaluations, end]
        return torch.tensor([self.path.level(p) for p in points], dtype=torch.float32)

    @property
    def init_noise_sigma(self) -> float:
        """What standard noise is multiplied by to give the first sample."""
        return self.laid.init_scale / self.scale(self.laid.grid[0])

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What the network is to be shown of a sample; schedulers that scale nothing need no timestep."""
        if timestep is None:
            if self.scale(self.laid.grid[0]) != 1.0:
                name = type(self).__name__
                raise TypeError(f"{name}.scale_model_input needs the timestep: its samples are x / alpha")
            return sample
        return sample * self.scale(self.find(timestep))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """Go from `sample` at `timestep` to the next timestep.

        eta scales DDIM's fresh noise. use_clipped_model_output makes DDIM recompute the noise from the
        limited clean picture. Fresh noise is `variance_noise`, or drawn from `generator` (one, or one an
        image). ValueError for a timestep that is not in `timesteps`, and for an eta that the sampler does not
        have.
        """
        return self.advance(
            model_output, timestep, sample, generator, variance_noise, return_dict, eta, use_clipped_model_output
        )

    def advance(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators | None,
        variance_noise: Tensor | None,
        return_dict: bool,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """What `step` does, whatever the order of its arguments is."""
        awaited = None if self._point is None else self.time(self._point.t)
        if self._steps is None or self.time(timestep) != awaited or eta != self._eta:
            self.begin(timestep, sample, eta)
        steps, point = self._steps, self._point
        assert steps is not None and point is not None
        x = (sample if sample.dtype == torch.float64 else sample.float()) * self.scale(point)
        x0 = self.rule.x0(x, model_output.to(x.dtype), point)
        limited = self.limit(x0)
        if self.keeps_eps and not use_clipped_model_output:
            x = x + point.alpha * (limited - x0)
        self.noise_source = (generator, variance_noise)
        try:
            x, after = steps.send((x, limited))
            self._point = after
        except StopIteration as stop:
            x, after = stop.value, self.laid.grid[-1]
            self._steps = None
        prev_sample = (x / self.scale(after)).to(sample.dtype)
        pred_original_sample = limited.to(sample.dtype)
        answer = StepOutput(prev_sample, pred_original_sample)
        return answer if return_dict else (answer[0], answer[1])

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Samples (B, ...) as they are at timesteps (B,) or (1,), in this facade's coordinates."""
        points = [self.find(t) for t in timesteps.reshape(-1)]
        alpha = column([p.alpha / self.scale(p) for p in points], original_samples)
        sigma = column([p.sigma / self.scale(p) for p in points], original_samples)
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of a v-predicting network for clean samples (B, ...) at timesteps (B,)."""
        points = [self.find(t) for t in timesteps.reshape(-1)]
        alpha = column([p.alpha for p in points], sample)
        sigma = column([p.sigma for p in points], sample)
        return alpha * noise - sigma * sample

    def __len__(self) -> int:
        return self.num_train_timesteps

    # Inside ---------------------------------------------------------------------------------------

    def time(self, t: float | Tensor) -> float:
        """A time as `timesteps` holds it."""
        return float(int(t)) if self.integer_times else float(np.float32(float(t)))

    def find(self, t: float | Tensor) -> Point:
        """The point with a network time: what `step` waits for, or one of the grid, or one of the path."""
        wanted = self.time(t)
        if self._steps is not None and self._point is not None and self.time(self._point.t) == wanted:
            return self._point
        known = self._places if self.laid else {}
        return self._evaluations[known[wanted][0]] if wanted in known else self.path.point(float(t))

    def begin(self, timestep: float | Tensor, sample: Tensor, eta: float) -> None:
        """Start a coroutine at a timestep."""
        plan = self.laid
        wanted = self.time(timestep)
        places = self._places.get(wanted, [])
        if not places:
            raise ValueError(f"timestep {float(timestep)} is not in scheduler.timesteps; take one from there")
        if self.begin_index in places:
            place = self.begin_index
        elif places[0] == 0:
            place = 0
        else:  # a repeated time is first the second evaluation of the step before, then a step of its own
            place = places[min(len(places) - 1, 1)]
        if self._evaluations[place] not in plan.grid:
            raise ValueError(f"sampling cannot start at timestep {float(timestep)}, which lies inside a step")
        index = self.asked_from(plan, place)
        sampler = self.entered(plan, index)
        self._eta = eta
        if eta != 0 or self.takes_eta:
            if self.entry.run is not ddim and not self.takes_eta:
                raise ValueError(f"eta is an option of DDIM; {self.entry.name} takes none, got {eta}")
            run: Callable[..., Steps] = sampler
            sampler = partial(run, eta=eta)
        self._steps = sampler(sample, plan.grid[index:], self.noise())
        _, self._point = next(self._steps)

    def noise(self) -> StepNoise:
        """What a coroutine draws its noise from."""
        return StepNoise(self)


class StepNoise:
    """A coroutine's noise, from what `step` was given last; its Brownian path has a seed of its own if given."""

    def __init__(self, scheduler: Scheduler, seed: int | None = None) -> None:
        self.scheduler, self.seed = scheduler, seed
        self.paths: dict[int, Brownian] = {}  # by seed

    def __call__(self, x: Tensor, /) -> Tensor:
        """Fresh standard noise like x."""
        generator, given = self.scheduler.noise_source
        if given is not None:
            return given.to(x)
        if generator is None or isinstance(generator, torch.Generator):
            return draw(tuple(x.shape), generator, x)
        return torch.cat([draw((1, *x.shape[1:]), g, x) for g in generator])

    def between(self, x: Tensor, a: Point, b: Point, /) -> Tensor:
        """The increment from a to b of the Brownian path that belongs to a generator's seed, or one for each image.

        Without a generator, a seed is drawn from torch's own at the first question.
        """
        generator, given = self.scheduler.noise_source
        if given is not None:
            return given.to(x)
        if self.seed is not None:
            return self._path(self.seed).between(x, a, b)
        if isinstance(generator, Sequence):
            rows = zip(x.split(1), generator, strict=True)
            return torch.cat([self._path(g.initial_seed()).between(row, a, b) for row, g in rows])
        if generator is not None:
            return self._path(generator.initial_seed()).between(x, a, b)
        seed = next(iter(self.paths)) if self.paths else int(torch.randint(2**62, ()).item())
        return self._path(seed).between(x, a, b)

    def _path(self, seed: int) -> Brownian:
        if seed not in self.paths:
            self.paths[seed] = Brownian(seed)
        return self.paths[seed]


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """One value an image, shaped to broadcast over images like `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, *[1] * (like.ndim - 1))


def draw(shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Standard noise drawn on the generator's device."""
    device = generator.device if generator is not None else like.device
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
