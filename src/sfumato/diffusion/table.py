"""What the named schedulers of variance-preserving models share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from .grid import (
    beta_levels,
    exponential_levels,
    get_spacing,
    karras_levels,
    leading_indices,
    linspace_indices,
    trailing_indices,
)
from .path import END, SMALLEST_ALPHA_BAR, Point, VPPath, betas
from .samplers import get_sampler
from .scheduler import Plan, Scheduler

TIME_SPACINGS = ("leading", "trailing", "linspace")
ZERO_SNR = "rescale_betas_zero_snr"
LEVELS: Mapping[str, Callable[[float, float, int], list[float]]] = MappingProxyType(
    {"karras": karras_levels, "exponential": exponential_levels, "beta": beta_levels}
)
"""Noise levels by the option use_..._sigmas that asks for them."""


@dataclass(eq=False)
class TableScheduler(Scheduler):
    """What schedulers on a variance-preserving path share: the table of betas."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: Sequence[float] | None = None

    time_spacings: ClassVar[Sequence[str]] = TIME_SPACINGS
    """The spacings that the option timestep_spacing takes."""

    own_times: ClassVar[bool] = False
    """The network knows few times, so a configuration's timestep_spacing does not count."""

    stands_for: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    """Names of the samplers that this class stands for, each with the options that select it."""

    def settle(
        self,
        sampler: str,
        prediction: str,
        spacing: str,
        steps_offset: int,
        zero_snr: bool = False,
        straight: bool = False,
    ) -> None:
        """Make the path and the state.

        straight: sigma / alpha is what the sampler works with, so it is interpolated itself and kept finite.
        """
        if spacing not in TIME_SPACINGS:
            known = ", ".join(TIME_SPACINGS)
            raise ValueError(f"unknown timestep_spacing {spacing!r}; choose one of {known}")
        if self.trained_betas is not None:
            table = torch.as_tensor(self.trained_betas, dtype=torch.float64)
        else:
            table = betas(self.beta_schedule, self.num_train_timesteps, self.beta_start, self.beta_end)
        floor = SMALLEST_ALPHA_BAR if zero_snr and straight else 0.0
        path = VPPath(table, zero_snr, floor, "linear" if straight else "log", torch.float32)
        self.entry = get_sampler(sampler)
        self.steps_offset = steps_offset
        self.prepare(path, prediction, spacing)

    def plan(
        self,
        steps: int,
        sampler: str | None = None,
        spacing: str | None = None,
        options: Mapping[str, object] | None = None,
    ) -> Plan:
        """How to sample with any registered sampler and spacing; None takes this scheduler's own.

        A sampler that a named scheduler stands for gets what that one makes of these options, as if the
        configuration had been loaded into it: lcm and tcd take their own timesteps unless `spacing` is another than
        the configuration's. One that nothing here stands for ends in the data, as in k-diffusion, unless of a grid it
        takes the ends only. ValueError for unknown names.
        """
        name = self.entry.name if sampler is None else get_sampler(sampler).name
        facade: TableScheduler = self
        zero_snr = getattr(self, ZERO_SNR, False)
        for maker in self.makers().values():
            if name == self.entry.name or not issubclass(maker, TableScheduler) or name not in maker.stands_for:
                continue
            if not zero_snr or ZERO_SNR in maker.option_names():  # else the table of betas would be another
                facade = maker.from_config(self.config, **maker.stands_for[name])
        names, points = facade.option_names(), list[Point]()
        spacing = None if facade.own_times and spacing == self.spacing else spacing
        if spacing in facade.time_spacings:
            facade = type(facade).from_config(facade.config, timestep_spacing=spacing)
        elif spacing in ("karras", "exponential") and f"use_{spacing}_sigmas" in names:
            curves = {f"use_{name}_sigmas": name == spacing for name in LEVELS}  # one at a time
            facade = type(facade).from_config(facade.config, **{k: v for k, v in curves.items() if k in names})
        elif spacing is not None:
            facade.check_steps(steps)
            points = get_spacing(spacing)(facade.path, steps, facade.steps_offset, None)
        plan = facade.own_plan(steps, points)
        if name != facade.entry.name:
            entry = get_sampler(name)
            plan = Plan(entry.run, plan.grid if entry.ends else [*plan.grid[:-1], END], plan.init_scale)
        return replace(plan, sampler=partial(plan.sampler, **options)) if options else plan

    def whole_indices(self, steps: int) -> list[float]:
        """The rows of the table that the timestep spacing visits, as whole numbers."""
        return [float(round(i)) for i in self.indices(steps)]

    def indices(self, steps: int) -> list[float]:
        """The rows of the table that the timestep spacing visits; "linspace" falls between rows."""
        n = self.num_train_timesteps
        self.check_steps(steps)
        if self.spacing == "leading":
            return leading_indices(steps, n, self.steps_offset)
        return trailing_indices(steps, n) if self.spacing == "trailing" else linspace_indices(steps, n - 1)

    def check_steps(self, steps: int) -> None:
        """ValueError for more steps than the network was trained on, or none."""
        if not 1 <= steps <= self.num_train_timesteps:
            raise ValueError(f"the number of steps must be between 1 and {self.num_train_timesteps}, got {steps}")

    def curve(self) -> str:
        """The curve of noise levels that replaces the timesteps', or nothing."""
        return next((name for name in LEVELS if getattr(self, f"use_{name}_sigmas", False)), "")


def threshold(x0: Tensor, ratio: float, largest: float) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): clip to a quantile of each image, and rescale.

    ratio: the quantile of the absolute values. largest: the quantile is brought into 1..largest first.
    """
    s = x0.flatten(1).abs().quantile(ratio, dim=1)  # (B,)
    s = s.clamp(min=1, max=largest).view(-1, *[1] * (x0.ndim - 1))
    return torch.minimum(torch.maximum(x0, -s), s) / s
