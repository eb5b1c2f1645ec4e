"""More schedulers under diffusers' names: for distilled networks, for inversion, and for EDM."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from .grid import exponential_levels, karras_levels
from .named import limited
from .named_solvers import GeneratorFourth
from .path import END, Path, Point, VEPath
from .prediction import edm
from .samplers import get_sampler, invert
from .scheduler import Generators, Plan, Scheduler, StepOutput
from .table import TableScheduler


@dataclass(eq=False)
class DistilledScheduler(TableScheduler):
    """What the schedulers of networks distilled on few timesteps share: every N / original-th time, thinned out."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    original_inference_steps: int = 50
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"
    timestep_scaling: float = 10.0
    rescale_betas_zero_snr: bool = False

    integer_times: ClassVar[bool] = True
    time_spacings: ClassVar[Sequence[str]] = ()
    own_times: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.allow("prediction_type", "epsilon", "sample", "v_prediction")
        zero_snr, sampler = self.rescale_betas_zero_snr, next(iter(self.stands_for))
        self.settle(sampler, self.prediction_type, self.timestep_spacing, self.steps_offset, zero_snr)

    def whole_indices(self, steps: int) -> list[float]:
        """Some of the times that the network was distilled on; all of the network's before `set_timesteps`."""
        n, most = self.num_train_timesteps, self.original_inference_steps
        if steps == n and self.num_inference_steps is None:
            return [float(i) for i in reversed(range(n))]
        if not 1 <= steps <= most:
            raise ValueError(f"{type(self).__name__} takes 1 to {most} steps (original_inference_steps), got {steps}")
        times = [float(i * (n // most) - 1) for i in range(most, 0, -1)]
        return [times[math.floor(i * most / steps)] for i in range(steps)]

    def limit(self, x0: Tensor) -> Tensor:
        """Dynamic thresholding, or clipping, as configured."""
        return limited(self, x0)


@dataclass(eq=False)
class LCMScheduler(GeneratorFourth, DistilledScheduler):  # type: ignore[misc]
    """Latent consistency models (Luo et al. 2023)."""

    stands_for: ClassVar[Mapping[str, Mapping[str, object]]] = {"lcm": {}}

    def own_plan(self, steps: int, given: Sequence[Point] = ()) -> Plan:
        """To the data itself."""
        points = given or [self.path.point(i) for i in self.whole_indices(steps)]
        return Plan(partial(self.entry.run, timestep_scaling=self.timestep_scaling), [*points, END])


@dataclass(eq=False)
class TCDScheduler(DistilledScheduler):
    """Trajectory consistency distillation (Zheng et al. 2024); `step` takes eta, 0.3 unless it is given."""

    takes_eta: ClassVar[bool] = True
    stands_for: ClassVar[Mapping[str, Mapping[str, object]]] = {"tcd": {}}

    def own_plan(self, steps: int, given: Sequence[Point] = ()) -> Plan:
        """To the first row of the table."""
        points = given or [self.path.point(i) for i in self.whole_indices(steps)]
        return Plan(partial(self.entry.run, whole=True), [*points, self.path.point(0)])

    def step(  # type: ignore[override]  # the order of arguments is that of diffusers
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generators | None = None,
        return_dict: bool = True,
        variance_noise: Tensor | None = None,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """Go from `sample` at `timestep` to the next timestep; eta is the method's gamma."""
        return self.advance(model_output, timestep, sample, generator, variance_noise, return_dict, eta)


@dataclass(eq=False)
class DDIMInverseScheduler(TableScheduler):
    """DDIM inversion: timesteps rise, and the result is the noise that DDIM makes the sample from.

    Each evaluation is told the time that its step leads to.
    """

    clip_sample: bool = True
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    clip_sample_range: float = 1.0
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False

    integer_times: ClassVar[bool] = True
    time_spacings: ClassVar[Sequence[str]] = ("leading", "trailing")

    def __post_init__(self) -> None:
        self.allow("prediction_type", "epsilon")
        self.allow("timestep_spacing", "leading", "trailing")
        zero_snr = self.rescale_betas_zero_snr
        self.settle("ddim", self.prediction_type, self.timestep_spacing, self.steps_offset, zero_snr)

    def own_plan(self, steps: int, given: Sequence[Point] = ()) -> Plan:
        """From the data, or from where the first step would have begun, to the noise."""
        points = list(given or [self.path.point(i) for i in self.whole_indices(steps)])[::-1]
        before = points[0].t - self.num_train_timesteps // steps
        first = self.path.point(0)
        begin = self.path.point(before) if before >= 0 else END if self.set_alpha_to_one else first
        clip = self.clip_sample_range if self.clip_sample else None
        return Plan(partial(invert, clip=clip), [begin, *points])

    def asked_from(self, plan: Plan, place: int) -> int:
        """One point before the one that is asked about."""
        return place


@dataclass(eq=False)
class EDMEulerScheduler(Scheduler):
    """Euler's method for networks with EDM preconditioning (Karras et al. 2022), without churn."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    sigma_schedule: str = "karras"
    num_train_timesteps: int = 1000
    prediction_type: str = "epsilon"
    rho: float = 7.0
    final_sigmas_type: str = "zero"

    def __post_init__(self) -> None:
        self.allow("sigma_schedule", "karras", "exponential")
        self.allow("prediction_type", "epsilon")
        self.allow("final_sigmas_type", "zero")
        self.entry = get_sampler("euler")
        self.steps_offset = 0
        path: Path = VEPath(self.sigma_min, self.sigma_max, self.num_train_timesteps)
        self.prepare(path, "epsilon", self.sigma_schedule)
        self.rule = edm(self.sigma_data)

    def own_plan(self, steps: int, given: Sequence[Point] = ()) -> Plan:
        """Noise levels on the configured curve."""
        high, low = self.sigma_max, self.sigma_min
        karras = self.sigma_schedule == "karras"
        levels = karras_levels(high, low, steps, self.rho) if karras else exponential_levels(high, low, steps)
        return Plan(self.entry.run, [*(given or map(self.path.at_level, levels)), END], math.hypot(high, 1))

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The preconditioned sample."""
        if timestep is None:
            raise TypeError("EDMEulerScheduler.scale_model_input needs the timestep: its network sees c_in * x")
        return sample * self.rule.scale_in(self.find(timestep))
