"""Paths from data to noise: everything in the family is `x = alpha * x0 + sigma * eps`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "cosine")
SMALLEST_ALPHA_BAR = 2.0**-24  # stands in for 0 where a finite sigma / alpha is needed; gives 4096


@dataclass(frozen=True)
class Point:
    """One place on a path: the noisy picture there is `alpha * x0 + sigma * eps`.

    t:     what the network is told.
    alpha: weight of the clean picture.
    sigma: weight of unit noise.
    path:  the path that it lies on, for samplers that ask for points in between; two points are equal
           without it.
    """

    t: float
    alpha: float
    sigma: float
    path: Path | None = field(default=None, compare=False, repr=False)

    @property
    def ratio(self) -> float:
        """sigma / alpha, the noise level in coordinates where alpha is 1; infinite at alpha = 0."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf

    @property
    def log_snr(self) -> float:
        """log(alpha / sigma), the lambda of DPM-Solver; +inf without noise, -inf without picture."""
        if self.alpha <= 0:
            return -math.inf
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf


END = Point(0.0, 1.0, 0.0)  # the data itself; no network is asked there


@dataclass(frozen=True)
class Points:
    """A place for each picture of a batch, as training needs it.

    t: (B,) float32, what the network is told; alpha, sigma: (B, 1, 1, 1) float32.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor


def add_noise(x0: Tensor, eps: Tensor, point: Point | Points) -> Tensor:
    """The noisy picture `alpha * x0 + sigma * eps` at a point (or at one point a picture)."""
    return point.alpha * x0 + point.sigma * eps


class Path(Protocol):
    """What grids, samplers and training ask of a path.

    Places are addressed in three ways: by the network's time t (`point`, `at`), by the index 0..N-1 into the
    training schedule, which may be fractional (`place`), and by a noise level (`level`, `at_level`) that is
    sigma in the coordinates where the path is straight.
    """

    @property
    def num_train_timesteps(self) -> int:
        """N, the length of the training schedule."""
        ...

    @property
    def last_index(self) -> float:
        """The index nearest to the data that a grid visits; the one nearest to noise is N - 1."""
        ...

    def point(self, t: float) -> Point:
        """The point where the network is told t, which may be fractional; ValueError outside the schedule."""
        ...

    def at(self, t: Tensor) -> Points:
        """The points for a batch of network times (B,), integer or floating, on t's device."""
        ...

    def place(self, index: float) -> Point:
        """The point at an index of the training schedule."""
        ...

    def level(self, point: Point) -> float:
        """The noise level of a point."""
        ...

    def at_level(self, level: float) -> Point:
        """The point with this noise level; t is clamped to the schedule."""
        ...

    def at_ratio(self, ratio: float) -> Point:
        """The point with this sigma / alpha; t is clamped to the schedule."""
        ...

    def index(self, point: Point) -> float:
        """The index of a point in the training schedule, the inverse of `place`."""
        ...


def betas(schedule: str, n: int = 1000, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """The n variances of the forward steps, (n,) float64.

    linear (Ho et al. 2020), scaled_linear (linear in the square root; latent diffusion), squaredcos_cap_v2,
    also called cosine (Nichol & Dhariwal 2021, eq. 17, capped at 0.999). ValueError for another name.
    """
    if schedule == "linear":
        return torch.linspace(start, end, n, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2
    if schedule in ("squaredcos_cap_v2", "cosine"):
        u = torch.arange(n + 1, dtype=torch.float64) / n
        alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise ValueError(f"unknown beta schedule {schedule!r}; choose one of {', '.join(BETA_SCHEDULES)}")


class VPPath:
    """Variance preserving: alpha² + sigma² = 1 from a table of betas (DDPM, Stable Diffusion 1 and 2, SDXL).

    betas:         (N,) variances of the forward steps, given by `betas(...)` or trained.
    zero_snr:      shift and stretch alpha so that the last point is pure noise (Lin et al. 2023).
    floor:         smallest alpha² allowed, for samplers that divide by alpha; 0 leaves the table as it is.
    interpolation: what is interpolated at a fractional t: "log" (log of sigma / alpha, as k-diffusion does)
                   or "linear" (sigma / alpha itself, as diffusers' Euler family does).
    dtype:         precision of the product of 1 - beta; float32 gives the table that diffusers holds, which
                   differs by up to 1e-5.
    """

    def __init__(
        self,
        betas: Tensor | Sequence[float],
        zero_snr: bool = False,
        floor: float = 0.0,
        interpolation: Literal["log", "linear"] = "log",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if interpolation not in ("log", "linear"):
            raise ValueError(f"unknown interpolation {interpolation!r}; choose 'log' or 'linear'")
        table = torch.as_tensor(betas, dtype=torch.float64)
        if table.ndim != 1 or len(table) < 2 or not bool(((table >= 0) & (table <= 1)).all()):
            raise ValueError("betas must be a list of at least 2 numbers between 0 and 1")
        alpha_bar = torch.cumprod(1.0 - table.to(dtype), dim=0)  # Ho et al. 2020, section 2
        alpha = alpha_bar.double().numpy() ** 0.5
        if zero_snr:
            alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        alpha = np.maximum(alpha, floor**0.5)
        self.interpolation = interpolation
        self.alphas = alpha  # (N,) float64
        self.sigmas = (1.0 - alpha**2) ** 0.5  # (N,)
        with np.errstate(divide="ignore"):
            self.ratios = self.sigmas / alpha  # (N,), infinite at alpha = 0
            self.log_ratios = np.log(self.ratios)  # (N,)

    @property
    def num_train_timesteps(self) -> int:
        """N, the length of the table."""
        return len(self.alphas)

    @property
    def last_index(self) -> float:
        """0: grids may go down to the first row of the table."""
        return 0.0

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha² of each training step, (N,) float32."""
        return torch.from_numpy(self.alphas**2).float()

    def point(self, t: float) -> Point:
        """The point at time t in 0..N-1, interpolated between the rows of the table."""
        check_range(t, 0, self.num_train_timesteps - 1)
        low = min(int(t), self.num_train_timesteps - 2)
        w = t - low
        if w in (0.0, 1.0):
            row = low + int(w)
            return Point(float(t), float(self.alphas[row]), float(self.sigmas[row]), self)
        if math.isinf(self.ratios[low + 1]):  # no ratio to interpolate next to pure noise
            alpha = float((1 - w) * self.alphas[low])
            return Point(float(t), alpha, (1 - alpha**2) ** 0.5, self)
        table = self.ratios if self.interpolation == "linear" else self.log_ratios
        value = float((1 - w) * table[low] + w * table[low + 1])
        return self._from_ratio(float(t), value if self.interpolation == "linear" else math.exp(value))

    def at(self, t: Tensor) -> Points:
        """The points for a batch of times (B,): rows of the table for integers, interpolated otherwise."""
        if not t.is_floating_point():
            index = t.detach().cpu()
            alpha, sigma = torch.from_numpy(self.alphas)[index], torch.from_numpy(self.sigmas)[index]
            return batched(t, alpha, sigma)
        points = [self.point(v) for v in t.detach().cpu().double().tolist()]
        return batched(t, torch.tensor([p.alpha for p in points]), torch.tensor([p.sigma for p in points]))

    def place(self, index: float) -> Point:
        """The point at an index of the table, which is also the network's time."""
        return self.point(index)

    def level(self, point: Point) -> float:
        """sigma / alpha; pure noise counts as the finite level of alpha² = 2**-24."""
        return min(point.ratio, (1 / SMALLEST_ALPHA_BAR - 1) ** 0.5)

    def at_level(self, level: float) -> Point:
        """The point with sigma / alpha = level; its time is looked up by log level, clamped to 0..N-1."""
        t = float(np.interp(math.log(max(level, 1e-10)), self.log_ratios, np.arange(len(self.alphas))))
        return self._from_ratio(t, level)

    def at_ratio(self, ratio: float) -> Point:
        """The point with this sigma / alpha."""
        return self.at_level(ratio)

    def index(self, point: Point) -> float:
        """t."""
        return point.t

    def _from_ratio(self, t: float, ratio: float) -> Point:
        alpha = 1.0 / math.hypot(1.0, ratio)
        return Point(t, alpha, ratio * alpha, self)


class VEPath:
    """Variance exploding: alpha = 1 and sigma grows geometrically with the index (Karras et al. 2022).

    sigma_min, sigma_max: the first and the last sigma of the schedule.
    num_train_timesteps:  N, into how many indices the range is divided; grids count in them.
    The network's time is ln(sigma) / 4, the c_noise of Karras et al. 2022, table 1.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, num_train_timesteps: int = 1000) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min must lie between 0 and sigma_max, got {sigma_min} and {sigma_max}")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self._n = num_train_timesteps

    @property
    def num_train_timesteps(self) -> int:
        """N, the number of indices."""
        return self._n

    @property
    def last_index(self) -> float:
        """0, where sigma is sigma_min."""
        return 0.0

    def point(self, t: float) -> Point:
        """The point at network time t = ln(sigma) / 4."""
        return Point(float(t), 1.0, math.exp(4 * t), self)

    def at(self, t: Tensor) -> Points:
        """The points for a batch of network times (B,)."""
        sigma = (4 * t.float()).exp()
        return batched(t, torch.ones_like(sigma), sigma)

    def place(self, index: float) -> Point:
        """The point at an index 0..N-1."""
        check_range(index, 0, self._n - 1)
        w = index / (self._n - 1)
        return self.at_level(self.sigma_min ** (1 - w) * self.sigma_max**w)

    def level(self, point: Point) -> float:
        """sigma."""
        return point.sigma

    def at_level(self, level: float) -> Point:
        """The point with this sigma."""
        return Point(math.log(level) / 4, 1.0, level, self)

    def at_ratio(self, ratio: float) -> Point:
        """The point with this sigma / alpha, which is sigma."""
        return self.at_level(ratio)

    def index(self, point: Point) -> float:
        """Where the logarithm of sigma lies between those of the schedule's ends."""
        return math.log(point.sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min) * (self._n - 1)


class FlowPath:
    """Rectified flow: alpha = 1 - sigma, and the network is told N * sigma (Stable Diffusion 3).

    shift: places grid and training indices at higher noise for larger pictures (Esser et al. 2024, eq. 23):
           sigma = shift * u / (1 + (shift - 1) * u) with u = (index + 1) / N.
    twice: the smallest u is shifted before grids are laid to it, and then with them, as the released samplers with a
           fixed shift do.
    """

    def __init__(self, shift: float = 1.0, num_train_timesteps: int = 1000, twice: bool = True) -> None:
        if shift <= 0:
            raise ValueError(f"shift must be positive, got {shift}")
        self.shift = shift
        self.twice = twice
        self._n = num_train_timesteps

    @property
    def num_train_timesteps(self) -> int:
        """N, the scale of the network's time."""
        return self._n

    @property
    def last_index(self) -> float:
        """The index where grids end: 0, or where its u is a shifted sigma, as this end is shifted twice."""
        return self._n * self.shifted(1 / self._n) - 1 if self.twice else 0.0

    def shifted(self, u: float) -> float:
        """sigma for an evenly spaced u in 0..1."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def point(self, t: float) -> Point:
        """The point at network time t = N * sigma in 0..N."""
        check_range(t, 0, self._n)
        return Point(float(t), 1.0 - t / self._n, t / self._n, self)

    def at(self, t: Tensor) -> Points:
        """The points for a batch of network times (B,)."""
        sigma = t.float() / self._n
        return batched(t, 1 - sigma, sigma)

    def place(self, index: float) -> Point:
        """The point at an index 0..N-1, after the shift."""
        check_range(index, -1, self._n - 1)
        return self.at_level(self.shifted((index + 1) / self._n))

    def level(self, point: Point) -> float:
        """sigma."""
        return point.sigma

    def at_level(self, level: float) -> Point:
        """The point with this sigma."""
        return Point(level * self._n, 1.0 - level, level, self)

    def at_ratio(self, ratio: float) -> Point:
        """The point with this sigma / alpha."""
        return self.at_level(ratio / (1 + ratio) if math.isfinite(ratio) else 1.0)

    def index(self, point: Point) -> float:
        """N u - 1 for the u that is shifted to sigma."""
        s = point.sigma
        return self._n * s / (self.shift + (1 - self.shift) * s) - 1


class AnglePath:
    """Variance preserving, with an angle for the network's time: sigma = sin(pi t / 2), t in 0..1.

    The continuous schedule of v-diffusion (Salimans & Ho 2022, "cosine"), which Dance Diffusion's networks know.
    num_train_timesteps: N, into how many indices the quarter turn is divided; grids count in them.
    """

    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self._n = num_train_timesteps

    @property
    def num_train_timesteps(self) -> int:
        """N, the number of indices."""
        return self._n

    @property
    def last_index(self) -> float:
        """0, where t is 1 / N."""
        return 0.0

    def point(self, t: float) -> Point:
        """The point at network time t in 0..1."""
        check_range(t, 0, 1)
        return Point(float(t), math.sin((1 - t) * math.pi / 2), math.sin(t * math.pi / 2), self)

    def at(self, t: Tensor) -> Points:
        """The points for a batch of network times (B,)."""
        t = t.float()
        return batched(t, ((1 - t) * math.pi / 2).sin(), (t * math.pi / 2).sin())

    def place(self, index: float) -> Point:
        """The point at an index 0..N-1, the last of which is pure noise."""
        check_range(index, 0, self._n - 1)
        return self.point((index + 1) / self._n)

    def level(self, point: Point) -> float:
        """sigma / alpha; pure noise counts as the finite level of alpha² = 2**-24."""
        return min(point.ratio, (1 / SMALLEST_ALPHA_BAR - 1) ** 0.5)

    def at_level(self, level: float) -> Point:
        """The point with sigma / alpha = level."""
        return self.point(math.atan(level) * 2 / math.pi)

    def at_ratio(self, ratio: float) -> Point:
        """The point with this sigma / alpha."""
        return self.at_level(ratio)

    def index(self, point: Point) -> float:
        """N t - 1."""
        return self._n * point.t - 1


def batched(t: Tensor, alpha: Tensor, sigma: Tensor) -> Points:
    """Points in float32 on t's device, with alpha and sigma shaped (B, 1, 1, 1)."""
    shape = (-1, 1, 1, 1)
    return Points(t.float(), alpha.float().to(t.device).view(shape), sigma.float().to(t.device).view(shape))


def check_range(t: float, low: float, high: float) -> None:
    """ValueError unless low <= t <= high."""
    if not low <= t <= high:
        raise ValueError(f"time {t} lies outside this path's schedule; it must be between {low} and {high}")
