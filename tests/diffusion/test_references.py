"""Published sums of whole sampling loops, reproduced by the schedulers of the same names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.diffusion import Scheduler

DATA = Path(__file__).parent.parent / "data"
REFS = json.loads((DATA / "scheduler_refs.json").read_text(encoding="utf-8"))
CASES = [(name, test) for name, entry in REFS["schedulers"].items() for test in entry["tests"]]
# The sums of dpm_sde follow from random numbers of torchsde 0.2.6: its path from a step's start to the middle, and
# what that leaves of the whole step's increment for the second half, each in standard deviations, (18, 768).
TORCHSDE = np.load(DATA / "torchsde_draws.npz")
# Between these and back, the result of the last conversion must be that of the first scheduler.
SIBLINGS = (
    "EulerDiscreteScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler",
    "PNDMScheduler",
    "HeunDiscreteScheduler",
)


def dummy_sample() -> Tensor:
    """(4, 3, 8, 8): the numbers i / 768 with the picture's index running fastest."""
    return (torch.arange(768, dtype=torch.float32).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)


def dummy_model(x: Tensor, t: float | Tensor) -> Tensor:
    """x * t / (t + 1)."""
    t = t.to(x.dtype) if isinstance(t, Tensor) else t
    return x * t / (t + 1)


def build(entry: dict, test: dict) -> Scheduler:
    """The scheduler of a case."""
    config = {"_class_name": entry["class"], **entry["base_config"], **test["config_overrides"]}
    return Scheduler.from_config(config)


def loop(scheduler: Scheduler, kind: str, steps: int, start: int, options: dict) -> Tensor:
    """Recipe A, B or C of the reference file, from one of the timesteps on."""
    torch.manual_seed(0)
    x = dummy_sample()
    if kind == "B":
        for t in reversed(range(1000)):
            x = scheduler.step(dummy_model(x, t), t, x).prev_sample
        return x
    generator = torch.manual_seed(0)
    scheduler.set_timesteps(steps)
    if kind == "C":
        x = x * scheduler.init_noise_sigma
    times = scheduler.timesteps[start:]
    if type(scheduler).__name__ == "IPNDMScheduler":  # its loop is run twice, and the slopes of the first one stay
        times = torch.cat([times, times])
    draws: list[Tensor | None] = [None] * len(times)
    if type(scheduler).__name__ == "DPMSolverSDEScheduler":
        recorded = torch.from_numpy(TORCHSDE["karras" if scheduler.config["use_karras_sigmas"] else "linspace"])
        draws[: len(recorded)] = list(recorded.view(-1, *x.shape))
    for t, draw in zip(times, draws, strict=True):
        if kind == "C":
            x = scheduler.scale_model_input(x, t)
        if draw is not None:
            options = {"variance_noise": draw}
        x = scheduler.step(dummy_model(x, t), t, x, generator=generator, **options).prev_sample
    return x


@pytest.mark.parametrize(("name", "test"), CASES)
def test_reference_loop(name: str, test: str) -> None:
    """The sum and the mean lie within the published tolerances, and near what diffusers measures."""
    entry = REFS["schedulers"][name]
    case = entry["tests"][test]
    scheduler = build(entry, case)
    if test == "test_switch":
        for sibling in SIBLINGS:
            scheduler = Scheduler.known[sibling].from_config(scheduler.config)
        scheduler = Scheduler.known[entry["class"]].from_config(scheduler.config)
    steps, start = (50, 3) if test == "test_full_uneven_loop" else (case.get("num_inference_steps", 10), 0)
    x = loop(scheduler, entry["recipe"][0], steps, start, {"eta": 0.0} if name in ("ddim", "tcd") else {})
    measured = {"result_sum": x.abs().sum().item(), "result_mean": x.abs().mean().item()}
    expected = next(v for k, v in case["expected"].items() if k == "any" or "cpu" in k)
    for key in ("result_sum", "result_mean"):
        ours, theirs = measured[key], case["measured_cpu"][key]
        print(f"{name} {test} {key}: {ours:.8g}, diffusers {theirs:.8g}, apart {abs(ours - theirs):.2e}")
        if key in expected:
            assert abs(ours - expected[key]) <= max(
                expected[key + "_tol"], 2e-6 * abs(theirs)
            )  # float32 has no more digits
        assert abs(ours - theirs) <= 2e-5 * abs(theirs)
