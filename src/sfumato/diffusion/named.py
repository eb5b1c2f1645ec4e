"""Schedulers under the names, options and defaults that model folders and notebooks know from diffusers.

Each is a dataclass of its options and reads and writes `scheduler_config.json`. An option value that is not
supported is refused by name. Where diffusers' DDIM and PNDM step by N // steps although their timesteps lie
further apart (a number of steps that does not divide N, with "trailing" or "linspace"), these step to the
timestep that comes next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Protocol

from torch import Tensor

from .grid import level_range
from .path import END, Point
from .samplers import Sampler, Steps
from .scheduler import Generators, Plan, StepOutput
from .table import LEVELS, TableScheduler, threshold


class Limits(Protocol):
    """The options of schedulers that limit the clean picture."""

    thresholding: bool
    dynamic_thresholding_ratio: float
    sample_max_value: float
    clip_sample: bool
    clip_sample_range: float


def limited(scheduler: Limits, x0: Tensor) -> Tensor:
    """The clean picture thresholded, clipped, or left alone, as the scheduler's options say."""
    if scheduler.thresholding:
        return threshold(x0, scheduler.dynamic_thresholding_ratio, scheduler.sample_max_value)
    return x0.clamp(-scheduler.clip_sample_range, scheduler.clip_sample_range) if scheduler.clip_sample else x0


@dataclass(eq=False)
class DDIMScheduler(TableScheduler):
    """DDIM (Song et al. 2021); `step` takes eta."""

    clip_sample: bool = True
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False

    integer_times: ClassVar[bool] = True
    keeps_eps: ClassVar[bool] = True
    stands_for: ClassVar[Mapping[str, Mapping[str, object]]] = {"ddim": {}}

    def __post_init__(self) -> None:
        self.allow("prediction_type", "epsilon", "sample", "v_prediction")
        zero_snr = self.rescale_betas_zero_snr
        self.settle("ddim", self.prediction_type, self.timestep_spacing, self.steps_offset, zero_snr)

    def own_plan(self, steps: int, given: Sequence[Point] = ()) -> Plan:
        """Whole timesteps, and at the end the data itself or the first row of the table."""
        end = END if self.set_alpha_to_one else self.path.point(0)
        return Plan(self.entry.run, [*(given or map(self.path.point, self.whole_indices(steps))), end])

    def limit(self, x0: Tensor) -> Tensor:
        """Dynamic thresholding, or clipping, as configured."""
        return limited(self, x0)


@dataclass(eq=False)
class DDPMScheduler(TableScheduler):
    """Ancestral sampling (Ho et al. 2020), and the schedule that training scripts draw timesteps from."""

    variance_type: str = "fixed_small"
    clip_sample: bool = True
    prediction_type: str = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False

    integer_times: ClassVar[bool] = True
    stands_for: ClassVar[Mapping[str, Mapping[str, object]]] = {"ddpm": {}}

    def __post_init__(self) -> None:
        self.allow("variance_type", "fixed_small", "fixed_small_log", "fixed_large")
        self.allow("prediction_type", "epsilon", "sample", "v_prediction")
        zero_snr = self.rescale_betas_zero_snr
        self.settle("ddpm", self.prediction_type, self.timestep_spacing, self.steps_offset, zero_snr)

    def own_plan(self, steps: int, given: Sequence[Point] = ()) -> Plan:
        """Whole timesteps down to the data itself."""
        variance = "large" if self.variance_type == "fixed_large" else "small"
        grid = [*(given or map(self.path.point, self.whole_indices(steps))), END]
        return Plan(partial(self.entry.run, variance=variance), grid)

    def limit(self, x0: Tensor) -> Tensor:
        """Dynamic thresholding, or clipping, as configured."""
        return limited(self, x0)

    def step(  # type: ignore[override]  # the order of arguments is that of diffusers
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
        variance_noise: Tensor | None = None,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """Go from `sample` at `timestep` to the next timestep, with noise from `generator` or `variance_noise`."""
        return self.advance(model_output, timestep, sample, generator, variance_noise, return_dict)


@dataclass(eq=False)
class PNDMScheduler(TableScheduler):
    """PNDM (Liu et al. 2022): Runge-Kutta first, or with skip_prk_steps the PLMS of Stable Diffusion 1."""

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    integer_times: ClassVar[bool] = True
    stands_for: ClassVar[Mapping[str, Mapping[str, object]]] = {"plms": {"skip_prk_steps": True}}

    def __post_init__(self) -> None:
        self.allow("prediction_type", "epsilon", "v_prediction")
        self.settle("plms", self.prediction_type, self.timestep_spacing, self.steps_offset)

    def own_plan(self, steps: int, given: Sequence[Point] = ()) -> Plan:
        """Whole timesteps; Runge-Kutta steps also visit half a step above each of the first three ends."""
        points = given or [self.path.point(i) for i in self.whole_indices(steps)]
        grid = [*points, END if self.set_alpha_to_one else self.path.point(0)]
        if given:  # of no spacing that has midpoints
            return Plan(self.entry.run, grid)
        run = partial(self.entry.run, mix="v" if self.prediction_type == "v_prediction" else "slope")
        midway = partial(run, warmup="none")
        if self.skip_prk_steps:
            return Plan(run, grid, midway=midway)
        half = self.num_train_timesteps // steps // 2
        middle = [self.path.point(p.t + half) for p in points[1:4]]
        return Plan(partial(run, warmup="runge_kutta", middle=middle), grid, midway=midway)

    def entered(self, plan: Plan, index: int) -> Sampler:
        """As diffusers does it: without Runge-Kutta steps, the warm-up slips past a step."""
        run: Callable[..., Steps] = plan.sampler
        return partial(run, slip=True) if index > 0 and self.skip_prk_steps else super().entered(plan, index)

    @property
    def prk_timesteps(self) -> Tensor:
        """The part of `timesteps` that Runge-Kutta steps ask for."""
        steps = self.num_inference_steps or self.num_train_timesteps
        return self.timesteps[: 0 if self.skip_prk_steps else 4 * min(3, steps - 1)]

    @property
    def plms_timesteps(self) -> Tensor:
        """The rest of `timesteps`, for the linear multistep."""
        return self.timesteps[len(self.prk_timesteps) :]


@dataclass(eq=False)
class StraightScheduler(TableScheduler):
    """What the schedulers that work on x / alpha share: samples are the clean picture plus sigma times noise."""

    def scale(self, point: Point) -> float:
        """alpha."""
        return point.alpha

    def final(self) -> Point:
        """Where sampling ends."""
        return END

    def bounds(self, high: float, low: float) -> tuple[float, float]:
        """The noise levels that a curve runs between, given those of the timesteps."""
        return high, low

    def own_plan(self, steps: int, given: Sequence[Point] = ()) -> Plan:
        """The timesteps' points, or points between the first and the last level of these."""
        points = list(given) or [self.path.point(i) for i in self.indices(steps)]
        high, low = self.bounds(self.path.level(points[0]), self.path.level(points[-1]))
        if self.curve() and not given:
            points = [self.path.at_level(level) for level in LEVELS[self.curve()](high, low, steps)]
        first = self.path.level(points[0])
        sample = first if self.spacing in ("linspace", "trailing") else math.hypot(first, 1)
        return Plan(self.entry.run, [*points, self.final()], init_scale=sample * points[0].alpha)


@dataclass(eq=False)
class EulerDiscreteScheduler(StraightScheduler):
    """Euler's method (Karras et al. 2022, algorithm 2 without churn)."""

    prediction_type: str = "epsilon"
    interpolation_type: str = "linear"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_spacing: str = "linspace"
    timestep_type: str = "discrete"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: str = "zero"

    stands_for: ClassVar[Mapping[str, Mapping[str, object]]] = {"euler": {}}

    def __post_init__(self) -> None:
        self.allow("prediction_type", "epsilon", "sample", "v_prediction")
        self.allow("interpolation_type", "linear")
        self.allow("timestep_type", "discrete")
        self.allow("final_sigmas_type", "zero", "sigma_min")
        zero_snr = self.rescale_betas_zero_snr
        self.settle("euler", self.prediction_type, self.timestep_spacing, self.steps_offset, zero_snr, True)

    def final(self) -> Point:
        """The data itself, or the first row of the table."""
        return END if self.final_sigmas_type == "zero" else self.path.point(0)

    def bounds(self, high: float, low: float) -> tuple[float, float]:
        """Those of the timesteps, unless configured."""
        return self.sigma_max or high, self.sigma_min or low


@dataclass(eq=False)
class EulerAncestralDiscreteScheduler(StraightScheduler):
    """Euler's method with ancestral noise."""

    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False

    stands_for: ClassVar[Mapping[str, Mapping[str, object]]] = {"euler_a": {}}

    def __post_init__(self) -> None:
        self.allow("prediction_type", "epsilon", "v_prediction")
        zero_snr = self.rescale_betas_zero_snr
        self.settle("euler_a", self.prediction_type, self.timestep_spacing, self.steps_offset, zero_snr, True)


@dataclass(eq=False)
class HeunDiscreteScheduler(StraightScheduler):
    """Heun's method (Karras et al. 2022, algorithm 1); 2 n - 1 timesteps for n steps."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: str = "epsilon"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    timestep_spacing: str = "linspace"
    steps_offset: int = 0

    order: ClassVar[int] = 2
    stands_for: ClassVar[Mapping[str, Mapping[str, object]]] = {"heun": {}}

    def __post_init__(self) -> None:
        self.allow("prediction_type", "epsilon", "sample", "v_prediction")
        self.settle("heun", self.prediction_type, self.timestep_spacing, self.steps_offset, straight=True)

    def limit(self, x0: Tensor) -> Tensor:
        """Clipping, as configured."""
        return x0.clamp(-self.clip_sample_range, self.clip_sample_range) if self.clip_sample else x0


@dataclass(eq=False)
class LMSDiscreteScheduler(StraightScheduler):
    """Linear multistep of fourth order, as in k-diffusion."""

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0

    stands_for: ClassVar[Mapping[str, Mapping[str, object]]] = {"lms": {}}

    def __post_init__(self) -> None:
        self.allow("prediction_type", "epsilon", "sample", "v_prediction")
        self.settle("lms", self.prediction_type, self.timestep_spacing, self.steps_offset, straight=True)

    def entered(self, plan: Plan, index: int) -> Sampler:
        """As diffusers does it: steps before the first one have no slope, but weight."""
        return partial(self.entry.run, before=plan.grid[:index])


@dataclass(eq=False)
class DPMSolverMultistepScheduler(TableScheduler):
    """DPM-Solver++ (Lu et al. 2022) of first and second order, as an ODE or an SDE."""

    solver_order: int = 2
    prediction_type: str = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float | str = -math.inf
    variance_type: str | None = None
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"

    integer_times: ClassVar[bool] = True
    stands_for: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "dpmpp_2m": {"algorithm_type": "dpmsolver++", "solver_order": 2},
        "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
        "dpmpp_2m_sde_heun": {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "solver_type": "heun"},
    }

    def __post_init__(self) -> None:
        if self.algorithm_type == "deis":  # as DEIS and UniPC configurations are taken over
            self.algorithm_type = "dpmsolver++"
        if self.solver_type in ("logrho", "bh1", "bh2"):
            self.solver_type = "midpoint"
        self.lambda_min_clipped = float(self.lambda_min_clipped)
        self.allow("solver_order", 1, 2)
        self.allow("prediction_type", "epsilon", "sample", "v_prediction")
        self.allow("algorithm_type", "dpmsolver++", "sde-dpmsolver++")
        self.allow("solver_type", "midpoint", "heun")
        self.allow("final_sigmas_type", "zero", "sigma_min")
        self.allow("lambda_min_clipped", -math.inf)
        self.allow("variance_type", None)
        for option in ("use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting"):
            self.allow(option, False)
        ode, sde = ("ddim", "euler_a") if self.solver_order == 1 else ("dpmpp_2m", "dpmpp_2m_sde")
        sampler = ode if self.algorithm_type == "dpmsolver++" else sde
        zero_snr = self.rescale_betas_zero_snr
        self.settle(sampler, self.prediction_type, self.timestep_spacing, self.steps_offset, zero_snr, True)

    def whole_indices(self, steps: int) -> list[float]:
        """But for "trailing", those of one step more without the last, which is the table's first row."""
        if self.spacing == "trailing" or steps == self.num_train_timesteps:
            return super().whole_indices(steps)
        return super().whole_indices(steps + 1)[:-1]

    def own_plan(self, steps: int, given: Sequence[Point] = ()) -> Plan:
        """Points of whole timesteps, or of noise levels between the first and last row of the table."""
        points = list(given) or [self.path.point(i) for i in self.whole_indices(steps)]
        if self.curve() and not given:
            points = [self.path.at_level(level) for level in LEVELS[self.curve()](*level_range(self.path), steps)]
        whole = round if self.use_karras_sigmas and self.beta_schedule != "squaredcos_cap_v2" else int
        points = points if given else [replace(p, t=float(whole(p.t))) for p in points]
        grid = [*points, END if self.final_sigmas_type == "zero" else self.path.point(0)]
        if self.solver_order == 1:
            return Plan(self.entry.run, grid)
        euler = self.euler_at_final or (self.lower_order_final and steps < 15)
        return Plan(partial(self.entry.run, rule=self.solver_type, euler_at_final=euler), grid)

    def limit(self, x0: Tensor) -> Tensor:
        """Dynamic thresholding, as configured."""
        if not self.thresholding:
            return x0
        return threshold(x0, self.dynamic_thresholding_ratio, self.sample_max_value)
