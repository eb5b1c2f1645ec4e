"""What a network predicts: pairs of inverse functions, one row for each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from .path import Point, Points
from .registry import find


@dataclass(frozen=True)
class Prediction:
    """One kind of network output.

    target(x0, eps, point) is what the network is trained to say, and x0(x, out, point) is its inverse: the
    clean picture read off an output. `scale_in` multiplies the network's input and is 1 but for
    preconditioned networks.
    """

    name: str
    target: Callable[[Tensor, Tensor, Point | Points], Tensor]
    x0: Callable[[Tensor, Tensor, Point | Points], Tensor]
    scale_in: Callable[[Point | Points], float | Tensor] = lambda point: 1.0


def eps_x0(x: Tensor, out: Tensor, point: Point | Points) -> Tensor:
    """Clean picture from predicted noise; ValueError where alpha is 0, since x then holds no picture."""
    alpha = point.alpha
    if bool((alpha == 0).any()) if isinstance(alpha, Tensor) else alpha == 0:
        raise ValueError(
            "an 'epsilon' prediction says nothing about the picture at alpha = 0 (zero terminal SNR, or "
            "the start of a flow path); start from a point with alpha > 0, or use a model that says "
            "'v_prediction', 'flow_prediction' or 'sample'"
        )
    return (x - point.sigma * out) / alpha


EPS = Prediction("epsilon", lambda x0, eps, point: eps, eps_x0)  # Ho et al. 2020, eq. 12 and 15

V = Prediction(  # Salimans & Ho 2022, appendix D, on any path: v is the picture's and the noise's rotation
    "v_prediction",
    lambda x0, eps, point: point.alpha * eps - point.sigma * x0,
    lambda x, out, point: (point.alpha * x - point.sigma * out) / (point.alpha**2 + point.sigma**2),
)

X0 = Prediction("sample", lambda x0, eps, point: x0, lambda x, out, point: out)

FLOW = Prediction(  # Liu et al. 2022, eq. 1: the velocity from data to noise
    "flow_prediction",
    lambda x0, eps, point: eps - x0,
    lambda x, out, point: (x - point.sigma * out) / (point.alpha + point.sigma),
)

PREDICTIONS: Mapping[str, Prediction] = MappingProxyType({p.name: p for p in (EPS, V, X0, FLOW)})
"""The pair table under the names that configs use."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}
)


def get_prediction(name: str) -> Prediction:
    """The row called `name`, a config's name or eps, v, x0, flow; ValueError with near misses."""
    return find(PREDICTIONS, ALIASES.get(name, name), "prediction")


def edm(sigma_data: float = 0.5) -> Prediction:
    """EDM preconditioning for data of standard deviation sigma_data (Karras et al. 2022, table 1).

    The network sees c_in * x and its output is scaled to unit variance; c_noise = ln(sigma) / 4 is the time
    that a `VEPath` tells. On other paths the formulas apply to x / alpha and sigma / alpha.
    """
    d = sigma_data

    def c_out(sigma: float | Tensor) -> float | Tensor:
        return sigma * d / (sigma**2 + d**2) ** 0.5

    def c_skip(sigma: float | Tensor) -> float | Tensor:
        return d**2 / (sigma**2 + d**2)

    def target(x0: Tensor, eps: Tensor, point: Point | Points) -> Tensor:
        sigma = point.sigma / point.alpha
        return torch.as_tensor((x0 - c_skip(sigma) * (x0 + sigma * eps)) / c_out(sigma))

    def x0(x: Tensor, out: Tensor, point: Point | Points) -> Tensor:
        sigma = point.sigma / point.alpha
        return c_skip(sigma) * (x / point.alpha) + c_out(sigma) * out

    def scale_in(point: Point | Points) -> float | Tensor:
        return 1 / (point.alpha * ((point.sigma / point.alpha) ** 2 + d**2) ** 0.5)

    return Prediction("edm", target, x0, scale_in)
