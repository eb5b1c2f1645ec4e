"""Samplers: coroutines as long as their pseudocode, and the registry of their names.

A sampler is called with x at the first point of a grid, the grid, and `noise`, which gives fresh standard
noise shaped like its argument. It yields `x, point` ("evaluate me here"), receives x (possibly edited by the
caller) and the predicted clean picture, and returns the final x.
"""

from .base import (
    SAMPLERS,
    BrownianNoise,
    Entry,
    Noise,
    Sampler,
    Steps,
    ancestral,
    between,
    evaluations,
    get_sampler,
    increment,
    lagrange_means,
    move,
    renoise,
    sampler,
)
from .classic import ddim, dpm2, euler, heun, ipndm, lms, plms
from .distilled import lcm, tcd
from .logsnr import deis, dpmpp_2m, dpmpp_2s, res_multistep, unipc
from .sde import ddpm, dpm2_a, dpmpp_2m_sde, dpmpp_2s_a, dpmpp_3m_sde, dpmpp_sde, er_sde, euler_a, restart
from .single import dpm_adaptive, dpm_fast, invert

__all__ = [
    "SAMPLERS",
    "BrownianNoise",
    "Entry",
    "Noise",
    "Sampler",
    "Steps",
    "ancestral",
    "between",
    "ddim",
    "ddpm",
    "deis",
    "dpm2",
    "dpm2_a",
    "dpm_adaptive",
    "dpm_fast",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s",
    "dpmpp_2s_a",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "er_sde",
    "euler",
    "euler_a",
    "evaluations",
    "get_sampler",
    "heun",
    "increment",
    "invert",
    "ipndm",
    "lagrange_means",
    "lcm",
    "lms",
    "move",
    "plms",
    "renoise",
    "res_multistep",
    "restart",
    "sampler",
    "tcd",
    "unipc",
]
