"""The scheduler of Stable Diffusion 3 under diffusers' name, options and defaults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .path import FlowPath, Point
from .samplers import get_sampler
from .scheduler import Scheduler


@dataclass(eq=False)
class FlowMatchEulerDiscreteScheduler(Scheduler):
    """Euler's method on a rectified-flow path (Stable Diffusion 3), with a fixed shift or one by the picture's size.

    use_dynamic_shifting: the shift grows with the number of tokens of a picture from base_shift at base_image_seq_len
                          to max_shift at max_image_seq_len, exponents for time_shift_type "exponential"; `sized` and
                          the argument `mu` of `set_timesteps` say which. Until then it is 1.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    time_shift_type: str = "exponential"
    stochastic_sampling: bool = False

    def __post_init__(self) -> None:
        for option in ("invert_sigmas", "use_beta_sigmas", "stochastic_sampling"):
            self.allow(option, False)
        self.allow("time_shift_type", "exponential", "linear")
        self.allow("shift_terminal", None)
        curve = "exponential" if self.use_exponential_sigmas else "linspace"
        self.entry = get_sampler("euler")
        self.steps_offset = 0
        dynamic = self.use_dynamic_shifting
        path = FlowPath(1.0 if dynamic else self.shift, self.num_train_timesteps, twice=not dynamic)
        self.prepare(path, "flow_prediction", "karras" if self.use_karras_sigmas else curve)

    def at_sigma(self, sigma: float) -> Point:
        """The shift is applied to the levels that a caller gives."""
        assert isinstance(self.path, FlowPath)
        return self.path.at_level(self.path.shifted(sigma))

    def shifting(self, mu: float) -> None:
        """Take a shift for a picture's size, its logarithm for time_shift_type "exponential"."""
        if not self.use_dynamic_shifting:
            raise ValueError(f"mu = {mu:g} is for use_dynamic_shifting; this scheduler's shift is {self.shift:g}")
        shift = math.exp(mu) if self.time_shift_type == "exponential" else mu
        self.path = FlowPath(shift, self.num_train_timesteps, twice=False)

    def sized(self, tokens: int) -> FlowMatchEulerDiscreteScheduler:
        """This scheduler for pictures of so many tokens; itself where the shift is fixed."""
        mu = self.shift_of(tokens)
        if mu is None:
            return self
        other = replace(self)
        other.shifting(mu)
        return other

    def shift_of(self, tokens: int) -> float | None:
        """What `shifting` takes for pictures of so many tokens; None where the shift is fixed."""
        if not self.use_dynamic_shifting or self.base_shift is None or self.max_shift is None:
            return None
        share = (tokens - self.base_image_seq_len) / (self.max_image_seq_len - self.base_image_seq_len)
        return self.base_shift + (self.max_shift - self.base_shift) * share

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Lay the grid and begin anew, with the shift `mu` for the picture's size where that decides it."""
        if mu is not None:
            self.shifting(mu)
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name that flow pipelines call."""
        return self.add_noise(sample, noise, timestep)
