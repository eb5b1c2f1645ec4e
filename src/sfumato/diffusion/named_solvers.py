"""More schedulers under diffusers' names: the solvers of second order and the other multistep ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, cast

from torch import Tensor

from .grid import level_range
from .named import StraightScheduler
from .path import END, AnglePath, Point
from .samplers import Sampler, get_sampler
from .scheduler import Generators, Plan, Scheduler, StepNoise, StepOutput
from .table import LEVELS, TableScheduler, threshold


class GeneratorFourth:
    """`step` with the order of arguments that diffusers' schedulers without eta have."""

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
        variance_noise: Tensor | None = None,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """Go from `sample` at `timestep` to the next timestep, with noise from `generator` or `variance_noise`."""
        scheduler = cast(TableScheduler, self)
        return scheduler.advance(model_output, timestep, sample, generator, variance_noise, return_dict)


@dataclass(eq=False)
class HalfwayScheduler(StraightScheduler):
    """What the two KDPM2 schedulers share."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0

    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        self.allow("prediction_type", "epsilon", "v_prediction")
        sampler = next(iter(self.stands_for))
        self.settle(sampler, self.prediction_type, self.timestep_spacing, self.steps_offset, straight=True)

    def own_plan(self, steps: int, given: Sequence[Point] = ()) -> Plan:
        """Karras' levels are told to the network as whole times."""
        plan = super().own_plan(steps, given)
        if not self.use_karras_sigmas or given:
            return plan
        return replace(plan, grid=[replace(p, t=float(round(p.t))) for p in plan.grid])


@dataclass(eq=False)
class KDPM2DiscreteScheduler(HalfwayScheduler):
    """DPM-Solver-2 as in k-diffusion; 2 n - 1 timesteps for n steps."""

    stands_for: ClassVar[Mapping[str, Mapping[str, object]]] = {"dpm2": {}}


@dataclass(eq=False)
class KDPM2AncestralDiscreteScheduler(GeneratorFourth, HalfwayScheduler):  # type: ignore[misc]
    """The same with ancestral noise."""

    stands_for: ClassVar[Mapping[str, Mapping[str, object]]] = {"dpm2_a": {}}


@dataclass(eq=False)
class DPMSolverSDEScheduler(StraightScheduler):
    """SDE-DPM-Solver++(2S) as in k-diffusion, on a Brownian path; 2 n - 1 timesteps for n steps.

    noise_sampler_seed: of the path; None takes the generator's that `step` is given. The path is this
    package's own, so a seed gives another picture than with diffusers.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: str = "epsilon"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    noise_sampler_seed: int | None = None
    timestep_spacing: str = "linspace"
    steps_offset: int = 0

    order: ClassVar[int] = 2
    stands_for: ClassVar[Mapping[str, Mapping[str, object]]] = {"dpmpp_sde": {}}

    def __post_init__(self) -> None:
        self.allow("prediction_type", "epsilon", "v_prediction")
        self.settle("dpmpp_sde", self.prediction_type, self.timestep_spacing, self.steps_offset, straight=True)

    def noise(self) -> StepNoise:
        """Noise whose path has the configured seed."""
        return StepNoise(self, self.noise_sampler_seed)


@dataclass(eq=False)
class SolverScheduler(TableScheduler):
    """What the multistep solvers share: whole timesteps, and curves between the ends of the table."""

    solver_order: int = 2
    prediction_type: str = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    integer_times: ClassVar[bool] = True

    def whole_indices(self, steps: int) -> list[float]:
        """But for "trailing", those of one step more without the last, which is the table's first row."""
        if self.spacing == "trailing" or steps == self.num_train_timesteps:
            return super().whole_indices(steps)
        return super().whole_indices(steps + 1)[:-1]

    def points(self, steps: int, given: Sequence[Point] = ()) -> list[Point]:
        """Points of whole timesteps, or of noise levels between the first and last row of the table."""
        if given:
            return list(given)
        points = [self.path.point(i) for i in self.whole_indices(steps)]
        if self.curve():
            points = [self.path.at_level(level) for level in LEVELS[self.curve()](*level_range(self.path), steps)]
        whole = round if self.curve() == "karras" else int
        return [replace(p, t=float(whole(p.t))) for p in points]

    def end(self, points: Sequence[Point]) -> Point:
        """The first row of the table, or the last level again where a curve led to it."""
        return points[-1] if self.curve() else self.path.point(0)

    def limit(self, x0: Tensor) -> Tensor:
        """Dynamic thresholding, as configured."""
        if not self.thresholding:
            return x0
        return threshold(x0, self.dynamic_thresholding_ratio, self.sample_max_value)


@dataclass(eq=False)
class DPMSolverSinglestepScheduler(GeneratorFourth, SolverScheduler):  # type: ignore[misc]
    """DPM-Solver++(2S) (Lu et al. 2022): every other timestep lies inside a step."""

    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float | str = -math.inf
    variance_type: str | None = None
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"

    time_spacings: ClassVar[Sequence[str]] = ()
    stands_for: ClassVar[Mapping[str, Mapping[str, object]]] = {"dpmpp_2s": {"solver_order": 2}}

    def __post_init__(self) -> None:
        if self.algorithm_type == "deis":
            self.algorithm_type = "dpmsolver++"
        if self.solver_type in ("logrho", "bh1", "bh2"):
            self.solver_type = "midpoint"
        self.lambda_min_clipped = float(self.lambda_min_clipped)
        self.allow("solver_order", 1, 2)
        self.allow("prediction_type", "epsilon", "sample", "v_prediction")
        self.allow("algorithm_type", "dpmsolver++")
        self.allow("solver_type", "midpoint")
        self.allow("final_sigmas_type", "zero", "sigma_min")
        self.allow("lambda_min_clipped", -math.inf)
        self.allow("variance_type", None)
        for option in ("use_flow_sigmas", "use_dynamic_shifting"):
            self.allow(option, False)
        sampler = "ddim" if self.solver_order == 1 else "dpmpp_2s"
        self.settle(sampler, self.prediction_type, "linspace", 0, straight=True)

    def own_plan(self, steps: int, given: Sequence[Point] = ()) -> Plan:
        """The points two by two; an odd one and, where asked for, the last two are steps of first order."""
        points = self.points(steps, given)
        grid = [*points, END if self.final_sigmas_type == "zero" else self.path.point(0)]
        if self.solver_order == 1:
            return Plan(self.entry.run, grid)
        lower = self.lower_order_final or len(points) % 2 == 1 or self.final_sigmas_type == "zero"
        return Plan(partial(self.entry.run, lower_order_final=lower), grid)

    def entered(self, plan: Plan, index: int) -> Sampler:
        """A run that begins inside a step makes a first-order step to the end of it."""
        inside = self.solver_order == 2 and index % 2 == 1
        return partial(self.entry.run, alone=True) if inside else plan.sampler


@dataclass(eq=False)
class DEISMultistepScheduler(SolverScheduler):
    """DEIS in log rho (Zhang & Chen 2022) of orders 1 to 3."""

    algorithm_type: str = "deis"
    solver_type: str = "logrho"
    lower_order_final: bool = True
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"

    stands_for: ClassVar[Mapping[str, Mapping[str, object]]] = {"deis": {}}

    def __post_init__(self) -> None:
        if self.algorithm_type in ("dpmsolver", "dpmsolver++"):  # as configurations of those are taken over
            self.algorithm_type = "deis"
        if self.solver_type in ("midpoint", "heun", "bh1", "bh2"):
            self.solver_type = "logrho"
        self.allow("solver_order", 1, 2, 3)
        self.allow("prediction_type", "epsilon", "sample", "v_prediction")
        self.allow("algorithm_type", "deis")
        self.allow("solver_type", "logrho")
        for option in ("use_flow_sigmas", "use_dynamic_shifting"):
            self.allow(option, False)
        self.settle("deis", self.prediction_type, self.timestep_spacing, self.steps_offset, straight=True)

    def own_plan(self, steps: int, given: Sequence[Point] = ()) -> Plan:
        """Down to the first row of the table; with few steps the last ones are of lower order."""
        points = self.points(steps, given)
        lower = self.lower_order_final and steps < 15
        run = partial(self.entry.run, history=self.solver_order, lower_order_final=lower)
        return Plan(run, [*points, self.end(points)])


@dataclass(eq=False)
class UniPCMultistepScheduler(SolverScheduler):
    """UniPC (Zhao et al. 2023) on the clean picture, of orders 1 to 3."""

    predict_x0: bool = True
    solver_type: str = "bh2"
    lower_order_final: bool = True
    disable_corrector: Sequence[int] = ()
    solver_p: object = None
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    final_sigmas_type: str = "zero"
    rescale_betas_zero_snr: bool = False
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    sigma_min: float | None = None
    sigma_max: float | None = None
    shift_terminal: bool | None = None

    stands_for: ClassVar[Mapping[str, Mapping[str, object]]] = {"unipc": {}}

    def __post_init__(self) -> None:
        self.disable_corrector = list(self.disable_corrector)
        if self.solver_type in ("midpoint", "heun", "logrho"):
            self.solver_type = "bh2"
        self.allow("solver_order", 1, 2, 3)
        self.allow("prediction_type", "epsilon", "sample", "v_prediction")
        self.allow("predict_x0", True)
        self.allow("solver_type", "bh1", "bh2")
        self.allow("disable_corrector", [])
        self.allow("final_sigmas_type", "zero", "sigma_min")
        for option in ("use_flow_sigmas", "use_dynamic_shifting"):
            self.allow(option, False)
        for option in ("solver_p", "sigma_min", "sigma_max", "shift_terminal"):
            self.allow(option, None)
        zero_snr = self.rescale_betas_zero_snr
        self.settle("unipc", self.prediction_type, self.timestep_spacing, self.steps_offset, zero_snr, True)

    def own_plan(self, steps: int, given: Sequence[Point] = ()) -> Plan:
        """Down to the data or the first row of the table."""
        points = self.points(steps, given)
        variant, lower = self.solver_type, self.lower_order_final
        run = partial(self.entry.run, solver_order=self.solver_order, variant=variant, lower_order_final=lower)
        return Plan(run, [*points, END if self.final_sigmas_type == "zero" else self.end(points)])


@dataclass(eq=False)
class DPMSolverMultistepInverseScheduler(SolverScheduler):
    """DPM-Solver++ (Lu et al. 2022) backwards: timesteps rise, and the result is the noise of the sample."""

    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    lambda_min_clipped: float | str = -math.inf
    variance_type: str | None = None
    timestep_spacing: str = "linspace"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        if self.algorithm_type == "deis":
            self.algorithm_type = "dpmsolver++"
        if self.solver_type in ("logrho", "bh1", "bh2"):
            self.solver_type = "midpoint"
        self.lambda_min_clipped = float(self.lambda_min_clipped)
        self.allow("solver_order", 1, 2)
        self.allow("prediction_type", "epsilon", "sample", "v_prediction")
        self.allow("algorithm_type", "dpmsolver++")
        self.allow("solver_type", "midpoint", "heun")
        self.allow("lambda_min_clipped", -math.inf)
        self.allow("variance_type", None)
        self.allow("use_flow_sigmas", False)
        sampler = "ddim" if self.solver_order == 1 else "dpmpp_2m"
        self.settle(sampler, self.prediction_type, self.timestep_spacing, self.steps_offset, straight=True)

    def whole_indices(self, steps: int) -> list[float]:
        """But for "trailing", those of one step more without the first, where sampling backwards ends."""
        if self.spacing == "trailing" or steps == self.num_train_timesteps:
            return TableScheduler.whole_indices(self, steps)
        return TableScheduler.whole_indices(self, steps + 1)[1:]

    def own_plan(self, steps: int, given: Sequence[Point] = ()) -> Plan:
        """From the least noise to the last row of the table, or to the highest level of a curve."""
        points = self.points(steps, given)[::-1]
        end = points[-1] if self.curve() else self.path.point(self.num_train_timesteps - 1)
        if self.solver_order == 1:
            return Plan(self.entry.run, [*points, end])
        euler = self.euler_at_final or (self.lower_order_final and steps < 15)
        return Plan(partial(self.entry.run, rule=self.solver_type, euler_at_final=euler), [*points, end])


@dataclass(eq=False)
class IPNDMScheduler(Scheduler):
    """Improved PNDM (Zhang & Chen 2022) for networks that say v and are told an angle, as Dance Diffusion's.

    Its slopes are kept until `set_timesteps`: a loop that is run again goes on with those of the loop before.
    """

    num_train_timesteps: int = 1000
    trained_betas: Sequence[float] | None = None

    def __post_init__(self) -> None:
        self.allow("trained_betas", None)
        self.entry = get_sampler("ipndm")
        self.steps_offset = 0
        self.past: list[Tensor] = []
        self.prepare(AnglePath(self.num_train_timesteps), "v_prediction", "linspace")

    def own_plan(self, steps: int, given: Sequence[Point] = ()) -> Plan:
        """From pure noise; sigma is a squared sine, and the data is where its angle is 0."""
        if steps < 1:
            raise ValueError(f"the number of steps must be 1 or more, got {steps}")
        sigmas = [math.sin(i / steps * math.pi / 2) ** 2 for i in range(steps, 0, -1)]
        points = given or [self.path.point(math.asin(sigma) * 2 / math.pi) for sigma in sigmas]
        return Plan(partial(self.entry.run, mix="eps"), [*points, END])

    def lay(self, steps: int, given: Sequence[Point] = ()) -> Plan:
        """No slopes are known of a new plan."""
        self.past = []
        return super().lay(steps, given)

    def entered(self, plan: Plan, index: int) -> Sampler:
        """As diffusers does it: with all slopes since the plan was laid."""
        return partial(self.entry.run, mix="eps", past=self.past)
