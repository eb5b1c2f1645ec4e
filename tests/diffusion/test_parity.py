"""Loops of the same-named diffusers schedulers, and configurations that travel between the two."""

from __future__ import annotations

import importlib
import json
import sys
import types
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.schedulers import AysSchedules
from torch import Tensor

from sfumato.cond import Cond
from sfumato.diffusion import (
    SAMPLERS,
    SPACINGS,
    DDIMScheduler,
    DPMSolverSDEScheduler,
    EulerDiscreteScheduler,
    Plain,
    PNDMScheduler,
    Run,
    Scheduler,
    drive,
)
from sfumato.diffusion import DPMSolverMultistepScheduler as DPM

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
NAMES = sorted(set(Scheduler.makers()) - {"DPMSolverSDEScheduler"})  # whose peer needs a package; see its test
LATENT = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}
SD1 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def net(x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
    """A toy network that mixes channels and neighbours."""
    weight = torch.linspace(-0.3, 0.35, 4 * 4 * 9).view(4, 4, 3, 3)
    t = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1) / 1000
    return torch.tanh(torch.conv2d(x, weight, padding=1)) + x * (0.2 - t)


def first() -> Tensor:
    """Standard noise (1, 4, 8, 8)."""
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def loop(scheduler: Scheduler | diffusers.SchedulerMixin, steps: int, **options: object) -> Tensor:
    """The loop of a diffusers pipeline."""
    generator = torch.Generator().manual_seed(1)
    scheduler.set_timesteps(steps)
    x = first() * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        answer = scheduler.step(net(shown, t), t, x, return_dict=False, **{"generator": generator} | options)
        x = answer[0]
    return x


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference as a part of the range."""
    return ((ours - theirs).abs().max() / (theirs.max() - theirs.min())).item()


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
@pytest.mark.parametrize("config", [LATENT, SD1], ids=["v trailing", "sd1"])
def test_driven_plan_is_the_diffusers_loop(sampler: str, config: dict, tmp_path: Path) -> None:
    """From one scheduler_config.json: 20 steps of three samplers equal the classes that stand for them."""
    name = "PNDMScheduler" if "skip_prk_steps" in config else "DDIMScheduler"
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": name, **config}), encoding="utf-8")
    scheduler = Scheduler.from_pretrained(tmp_path)
    assert type(scheduler).__name__ == name
    plan = scheduler.plan(20, sampler)
    run = Run.begin(
        plan.sampler,
        first() * plan.init_scale,
        plan.grid,
        torch.randn_like,
        Plain(Cond()),
        scheduler.prediction,
    )
    (ours,) = drive([run], net)
    kinds = {
        "ddim": "DDIMScheduler",
        "euler": "EulerDiscreteScheduler",
        "dpmpp_2m": "DPMSolverMultistepScheduler",
    }
    loaded = getattr(diffusers, name).from_pretrained(tmp_path)
    peer = getattr(diffusers, kinds[sampler]).from_config(loaded.config)
    theirs = _plain(peer, 20)
    print(f"{sampler}: {apart(ours, theirs):.1e} of the range")
    assert apart(ours, theirs) < 1e-5


CASES: list[tuple[str, dict, int]] = [
    ("DDIMScheduler", {"clip_sample": True}, 20),
    ("DDIMScheduler", {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}, 20),
    ("DDIMScheduler", {"rescale_betas_zero_snr": True}, 20),
    ("DDIMScheduler", {"timestep_spacing": "leading", "set_alpha_to_one": False}, 30),
    ("DDIMScheduler", {"prediction_type": "sample"}, 20),
    ("DDPMScheduler", {}, 20),
    ("DDPMScheduler", {"variance_type": "fixed_large", "timestep_spacing": "leading", "steps_offset": 0}, 30),
    ("DDPMScheduler", {"variance_type": "fixed_small_log", "thresholding": True}, 20),
    ("DDPMScheduler", {"timestep_spacing": "linspace"}, 30),
    ("PNDMScheduler", {"skip_prk_steps": True, "timestep_spacing": "leading"}, 30),
    ("PNDMScheduler", {"skip_prk_steps": True}, 20),
    ("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": "epsilon"}, 20),
    ("PNDMScheduler", {"timestep_spacing": "leading", "prediction_type": "epsilon"}, 20),
    ("PNDMScheduler", {"timestep_spacing": "leading"}, 20),
    ("EulerDiscreteScheduler", {}, 30),
    ("EulerDiscreteScheduler", {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}, 30),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "use_karras_sigmas": True}, 30),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 20.0}, 12),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}, 20),
    ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True}, 20),
    ("EulerDiscreteScheduler", {"prediction_type": "sample"}, 20),
    ("EulerAncestralDiscreteScheduler", {}, 20),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "linspace"}, 30),
    ("HeunDiscreteScheduler", {}, 20),
    ("HeunDiscreteScheduler", {"timestep_spacing": "leading", "use_karras_sigmas": True}, 15),
    ("HeunDiscreteScheduler", {"clip_sample": True, "timestep_spacing": "linspace"}, 15),
    ("LMSDiscreteScheduler", {}, 20),
    ("LMSDiscreteScheduler", {"timestep_spacing": "leading", "use_exponential_sigmas": True}, 30),
    ("DPMSolverMultistepScheduler", {}, 10),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}, 25),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}, 20),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, 10),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 20),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, 20),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, 20),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}, 20),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}, 20),
    ("DPMSolverMultistepScheduler", {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}, 20),
    ("DPMSolverMultistepScheduler", {"rescale_betas_zero_snr": True, "euler_at_final": True}, 20),
    ("DPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 1.5}, 20),
    ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, 12),
    ("KDPM2DiscreteScheduler", {}, 20),
    ("KDPM2DiscreteScheduler", {"timestep_spacing": "leading", "use_karras_sigmas": True}, 15),
    ("KDPM2DiscreteScheduler", {"timestep_spacing": "linspace", "use_exponential_sigmas": True}, 15),
    ("KDPM2AncestralDiscreteScheduler", {}, 20),
    ("KDPM2AncestralDiscreteScheduler", {"timestep_spacing": "leading", "use_karras_sigmas": True}, 15),
    ("DPMSolverSinglestepScheduler", {}, 20),
    ("DPMSolverSinglestepScheduler", {}, 15),
    ("DPMSolverSinglestepScheduler", {"final_sigmas_type": "sigma_min"}, 20),
    ("DPMSolverSinglestepScheduler", {"final_sigmas_type": "sigma_min", "lower_order_final": True}, 20),
    ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True, "prediction_type": "epsilon"}, 20),
    ("DPMSolverSinglestepScheduler", {"solver_order": 1, "thresholding": True, "sample_max_value": 1.5}, 12),
    ("DEISMultistepScheduler", {}, 10),
    ("DEISMultistepScheduler", {"timestep_spacing": "linspace", "solver_order": 3}, 20),
    ("DEISMultistepScheduler", {"solver_order": 3}, 9),
    ("DEISMultistepScheduler", {"timestep_spacing": "leading", "use_karras_sigmas": True}, 20),
    ("DEISMultistepScheduler", {"solver_order": 1}, 10),
    ("UniPCMultistepScheduler", {}, 10),
    ("UniPCMultistepScheduler", {"timestep_spacing": "linspace", "solver_order": 3}, 20),
    ("UniPCMultistepScheduler", {"solver_type": "bh1", "solver_order": 3, "final_sigmas_type": "sigma_min"}, 20),
    ("UniPCMultistepScheduler", {"timestep_spacing": "leading", "use_karras_sigmas": True}, 20),
    ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, 20),
    ("UniPCMultistepScheduler", {"solver_order": 1}, 20),
    ("LCMScheduler", {}, 4),
    ("LCMScheduler", {"prediction_type": "epsilon", "clip_sample": True}, 7),
    ("LCMScheduler", {"original_inference_steps": 100, "timestep_scaling": 0.02}, 8),
    ("TCDScheduler", {}, 4),
    ("TCDScheduler", {"prediction_type": "epsilon"}, 7),
    ("DDIMInverseScheduler", {"prediction_type": "epsilon", "timestep_spacing": "leading"}, 20),
    ("DDIMInverseScheduler", {"prediction_type": "epsilon", "set_alpha_to_one": False, "clip_sample": True}, 20),
    ("DPMSolverMultistepInverseScheduler", {}, 20),
    ("DPMSolverMultistepInverseScheduler", {"timestep_spacing": "leading", "solver_type": "heun"}, 12),
    ("DPMSolverMultistepInverseScheduler", {"timestep_spacing": "linspace", "use_karras_sigmas": True}, 20),
    ("EDMEulerScheduler", {"prediction_type": "epsilon"}, 12),
    ("EDMEulerScheduler", {"prediction_type": "epsilon", "sigma_schedule": "exponential"}, 12),
    ("IPNDMScheduler", {}, 10),
    ("IPNDMScheduler", {}, 3),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 20),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 1.0, "use_karras_sigmas": True}, 20),
    ("FlowMatchEulerDiscreteScheduler", {"use_exponential_sigmas": True}, 28),
]


@pytest.mark.parametrize(("name", "overrides", "steps"), CASES)
def test_facade_is_the_diffusers_loop(name: str, overrides: dict, steps: int) -> None:
    """Timesteps, sigmas and the whole loop of each class under many options; fresh noise included."""
    maker = Scheduler.makers()[name]
    ours = maker.from_config({**LATENT, **overrides, "_class_name": "PNDMScheduler"})
    options = {k: v for k, v in {**LATENT, **overrides}.items() if k in ours.option_names()}
    peer = getattr(diffusers, name)(**options)
    stochastic = any(word in f"{name} {overrides}" for word in ("DDPM", "Ancestral", "sde-", "LCM", "TCD"))
    result = loop(ours, steps)
    theirs = loop(peer, steps) if stochastic else _plain(peer, steps)
    assert torch.equal(ours.timesteps.float(), peer.timesteps.float()) or (
        (ours.timesteps - peer.timesteps).abs().max() < 1e-2
    )
    assert ours.timesteps.dtype == peer.timesteps.dtype or name.startswith("KDPM2")  # double there for curves
    if hasattr(peer, "sigmas") and ours.order == 1:
        relative = ((ours.sigmas - peer.sigmas).abs() / peer.sigmas.clamp(min=1e-3)).max().item()
        assert relative < 1e-4
    print(f"{name} {overrides}: {apart(result, theirs):.1e} of the range")
    assert apart(result, theirs) < 1e-4


def _plain(peer: diffusers.SchedulerMixin, steps: int) -> Tensor:
    peer.set_timesteps(steps)
    x = first() * getattr(peer, "init_noise_sigma", 1.0)
    for t in peer.timesteps:
        shown = peer.scale_model_input(x, t) if hasattr(peer, "scale_model_input") else x
        x = peer.step(net(shown, t), t, x, return_dict=False)[0]
    return x


def test_ddim_eta_and_clipped_output() -> None:
    """DDIM's own arguments."""
    ours, peer = (
        DDIMScheduler(beta_schedule="scaled_linear"),
        diffusers.DDIMScheduler(beta_schedule="scaled_linear"),
    )
    for options in ({"eta": 1.0}, {"eta": 0.4, "use_clipped_model_output": True}):
        difference = apart(loop(ours, 20, **options), loop(peer, 20, **options))
        print(f"{options}: {difference:.1e}")
        assert difference < 1e-5


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
        ("UniPCMultistepScheduler", {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"}),
        ("DEISMultistepScheduler", {"use_beta_sigmas": True}),
        ("DPMSolverSinglestepScheduler", {"use_exponential_sigmas": True}),
    ],
)
def test_curves_have_the_levels_of_diffusers(name: str, overrides: dict) -> None:
    """Where its float32 falls short of the last timestep by a rounding error and is cut to the one before."""
    ours, peer = Scheduler.makers()[name](**overrides), getattr(diffusers, name)(**overrides)
    ours.set_timesteps(20)
    peer.set_timesteps(20)
    relative = ((ours.sigmas - peer.sigmas).abs() / peer.sigmas.clamp(min=1e-3)).max().item()
    print(f"{name} {overrides}: {relative:.1e}")
    assert relative < 1e-4
    assert (ours.timesteps - peer.timesteps).abs().max() <= 1


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"DDIMInverseScheduler", "IPNDMScheduler"}))  # these add none
def test_add_noise_and_velocity(name: str) -> None:
    """As diffusers computes them at the timesteps of the schedule."""
    ours, peer = Scheduler.makers()[name](), getattr(diffusers, name)()
    ours.set_timesteps(10)
    peer.set_timesteps(10)
    x0, noise = first().repeat(2, 1, 1, 1), first().flip(-1).repeat(2, 1, 1, 1)
    t = ours.timesteps[[4, 8]]
    if name.startswith("Flow"):
        theirs = peer.scale_noise(x0, peer.timesteps[[4, 8]], noise)
    else:
        theirs = peer.add_noise(x0, noise, peer.timesteps[[4, 8]])
    difference = apart(ours.add_noise(x0, noise, t), theirs)
    print(f"{name}: {difference:.1e}")
    assert difference < 1e-5
    if hasattr(peer, "get_velocity") and not name.startswith("Euler"):
        assert apart(ours.get_velocity(x0, noise, t), peer.get_velocity(x0, noise, t)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_configuration_round_trip(name: str, tmp_path: Path) -> None:
    """Ours is read by ours and by diffusers' class of the same name, theirs by ours, with equal options."""
    maker = Scheduler.makers()[name]
    eps_only = {"prediction_type": "epsilon"} if name in ("DDIMInverseScheduler", "EDMEulerScheduler") else {}
    overrides = {k: v for k, v in (LATENT | eps_only).items() if k in maker.option_names()}
    ours = maker(**overrides)
    ours.save_pretrained(tmp_path / "ours")
    again = Scheduler.from_pretrained(tmp_path / "ours")
    assert type(again) is maker
    assert {k: again.config[k] for k in again.option_names()} == {k: ours.config[k] for k in ours.option_names()}
    peer = getattr(diffusers, name).from_pretrained(tmp_path / "ours")
    assert {k: peer.config[k] for k in ours.option_names()} == {k: ours.config[k] for k in ours.option_names()}
    peer.save_pretrained(tmp_path / "theirs")
    back = Scheduler.from_pretrained(tmp_path / "theirs")
    assert {k: back.config[k] for k in ours.option_names()} == {k: ours.config[k] for k in ours.option_names()}


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_those_of_diffusers(name: str) -> None:
    """Every option, in the same order."""
    ours, theirs = Scheduler.makers()[name]().config, getattr(diffusers, name)().config
    names = [k for k in theirs if not k.startswith("_")]
    assert Scheduler.makers()[name].option_names() == names
    assert {k: ours[k] for k in names} == {k: theirs[k] for k in names}


def test_conversions_follow_diffusers() -> None:
    """Options left at their defaults take the new class's, foreign ones survive the way there and back."""
    pndm = PNDMScheduler.from_config({"_class_name": "PNDMScheduler", **SD1})
    peer = diffusers.PNDMScheduler.from_config({"_class_name": "PNDMScheduler", **SD1})
    for name in NAMES:
        if not name.startswith("Flow"):
            ours = Scheduler.makers()[name].from_config(pndm.config)
            theirs = getattr(diffusers, name).from_config(peer.config)
            assert {k: ours.config[k] for k in ours.option_names()} == {
                k: theirs.config[k] for k in ours.option_names()
            }
    assert EulerDiscreteScheduler.from_config(pndm.config).timestep_spacing == "linspace"
    there = EulerDiscreteScheduler.from_config(pndm.config, use_karras_sigmas=True)
    assert there.config.use_karras_sigmas is True
    assert PNDMScheduler.from_config(there.config).skip_prk_steps is True
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(there.config)
    assert theirs.config.use_karras_sigmas is True


def test_configurations_of_other_classes_are_taken_over() -> None:
    """Options become DPM-Solver++'s where a named class is asked for; otherwise an unknown name is refused."""
    unipc = dict(diffusers.UniPCMultistepScheduler(**{k: LATENT[k] for k in ("beta_start", "prediction_type")}).config)
    ours = DPM.from_config(unipc)
    assert ours.solver_type == "midpoint" and ours.prediction_type == "v_prediction"
    deis = dict(diffusers.DEISMultistepScheduler().config) | {"_use_default_values": []}
    assert DPM.from_config(deis).algorithm_type == "dpmsolver++"
    with pytest.raises(ValueError, match="unknown scheduler class 'SASolverScheduler'"):
        Scheduler.from_config({**unipc, "_class_name": "SASolverScheduler"})
    with pytest.raises(ValueError, match="lacks _class_name"):
        Scheduler.from_config(unipc)


def test_what_is_not_supported_is_refused_by_name() -> None:
    """The value, and what may stand there."""
    with pytest.raises(ValueError, match=r"solver_order=3; allowed: 1, 2"):
        DPM(solver_order=3)
    with pytest.raises(ValueError, match=r"timestep_type='continuous'"):
        EulerDiscreteScheduler(timestep_type="continuous")
    with pytest.raises(ValueError, match=r"prediction_type='flow'; allowed: 'epsilon', 'sample', 'v_prediction'"):
        DDIMScheduler(prediction_type="flow")
    with pytest.raises(ValueError, match=r"timestep_spacing 'trailling'; choose one of leading"):
        DDIMScheduler(timestep_spacing="trailling")
    with pytest.raises(ValueError, match=r"DDIMScheduler has no option 'clip_samples'"):
        Scheduler.from_config({"_class_name": "DDIMScheduler", "clip_samples": True})
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json"):
        Scheduler.from_pretrained("/nowhere")
    with pytest.raises(AttributeError, match="has no option 'shift'"):
        _ = DDIMScheduler().config.shift


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_plan_takes_any_sampler_and_spacing(sampler: str, spacing: str) -> None:
    """From every kind of configuration; the samplers' own options are passed on."""
    for config in ({"_class_name": "DDIMScheduler", **LATENT}, {"_class_name": "PNDMScheduler", **SD1}):
        scheduler = Scheduler.from_config(config)
        plan = scheduler.plan(12, sampler, spacing, {"eta": 0.5} if sampler in ("ddim", "euler_a") else None)
        noise = Run.begin(plan.sampler, first(), plan.grid, torch.randn_like, Plain(Cond()), scheduler.prediction)
        (x,) = drive([noise], net)
        assert torch.isfinite(x).all() and len(plan.grid) == 13
        assert [p.ratio for p in scheduler.grid(12, spacing, sampler)] == [p.ratio for p in plan.grid]


def test_karras_spacing_is_the_diffusers_option() -> None:
    """plan(..., spacing="karras") equals use_karras_sigmas of the classes that have it."""
    scheduler = DDIMScheduler(**LATENT)
    for sampler, name in (("euler", "EulerDiscreteScheduler"), ("dpmpp_2m", "DPMSolverMultistepScheduler")):
        plan = scheduler.plan(20, sampler, "karras")
        x = first() * plan.init_scale
        run = Run.begin(plan.sampler, x, plan.grid, torch.randn_like, Plain(Cond()), scheduler.prediction)
        peer = getattr(diffusers, name).from_config({**LATENT, "use_karras_sigmas": True})
        difference = apart(drive([run], net)[0], _plain(peer, 20))
        print(f"{sampler}: {difference:.1e}")
        assert difference < 1e-5


def test_converted_extras_survive_saving(tmp_path: Path) -> None:
    """A configuration taken over from a class that is not here can be saved, loaded and converted again."""
    unipc = dict(diffusers.UniPCMultistepScheduler().config) | {"_use_default_values": []}
    DPM.from_config(unipc).save_pretrained(tmp_path)
    again = Scheduler.from_pretrained(tmp_path)
    assert again.config.predict_x0 is True
    assert EulerDiscreteScheduler.from_config(again.config).config.solver_type == "midpoint"


def test_sde_solver_is_the_diffusers_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """DPMSolverSDEScheduler, with the Brownian path of torchsde, which is not here, played by ours' increments."""

    class Interval:
        """What diffusers asks of torchsde: first from a to the middle, then from a to b."""

        def __init__(self, size: tuple[int, ...], **_: object) -> None:
            self.size, self.generator = size, torch.Generator().manual_seed(5)
            self.half: tuple[float, Tensor] | None = None

        def __call__(self, low: Tensor, high: Tensor) -> Tensor:
            fresh, (b, a) = torch.randn(self.size, generator=self.generator), (float(low), float(high))
            if self.half is None:
                self.half = b, fresh
                return -fresh * (a - b) ** 0.5  # it counts against the direction of sampling
            m, first = self.half
            self.half = None
            ups = [s * (1 - (s / above) ** 2) ** 0.5 for above, s in ((a, m), (m, b), (a, b))]
            carried = (b / m) ** 2 * ups[0]
            return -(carried * first + ups[1] * fresh) / ups[2] * (a - b) ** 0.5

    monkeypatch.setitem(sys.modules, "torchsde", types.SimpleNamespace(BrownianInterval=Interval))
    maker = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    assert DPMSolverSDEScheduler.option_names() == [k for k in maker().config if not k.startswith("_")]
    for options in ({}, {"use_karras_sigmas": True}, {"timestep_spacing": "leading", "use_exponential_sigmas": True}):
        config = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", **options}
        ours = DPMSolverSDEScheduler(**config)
        theirs = _plain(maker(**config), 12)
        ours.set_timesteps(12)
        plan = ours.plan(12)
        generator = torch.Generator().manual_seed(5)
        start = first() * plan.init_scale
        noise = partial(lambda g, x: torch.randn(x.shape, generator=g), generator)
        (x,) = drive([Run.begin(plan.sampler, start, plan.grid, noise, Plain(Cond()), "v_prediction")], net)
        print(f"{options}: {apart(x, theirs):.1e} of the range")
        assert apart(x, theirs) < 1e-4


def test_timesteps_and_sigmas_of_the_callers_own() -> None:
    """As pipelines pass them on: the optimised steps of a paper, as timesteps and as noise levels."""
    for name, key, values in (
        ("EulerDiscreteScheduler", "timesteps", AysSchedules["StableDiffusionTimesteps"]),
        ("EulerDiscreteScheduler", "sigmas", AysSchedules["StableDiffusionXLSigmas"]),
        ("DPMSolverMultistepScheduler", "timesteps", AysSchedules["StableDiffusionTimesteps"]),
        ("DPMSolverSinglestepScheduler", "timesteps", [999, 800, 500, 200]),
        ("DDPMScheduler", "timesteps", [999, 800, 500, 200]),
        ("LCMScheduler", "timesteps", [999, 759, 499, 259]),
        ("TCDScheduler", "timesteps", [999, 759, 499, 259]),
        ("FlowMatchEulerDiscreteScheduler", "sigmas", [1.0, 0.7, 0.2]),
    ):
        options = {} if name.startswith("Flow") else {"beta_schedule": "scaled_linear", "beta_end": 0.012}
        ours, peer = Scheduler.makers()[name](**options), getattr(diffusers, name)(**options)
        for scheduler in (ours, peer):
            scheduler.set_timesteps(**{key: values})
        assert (ours.timesteps - peer.timesteps).abs().max() < 1e-2
        if name == "DDPMScheduler":  # steps as if its own grid had been laid
            continue
        results = []
        for scheduler in (ours, peer):
            generator, x = torch.Generator().manual_seed(1), first() * getattr(scheduler, "init_noise_sigma", 1.0)
            for t in scheduler.timesteps:
                shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                x = scheduler.step(net(shown, t), t, x, generator=generator, return_dict=False)[0]
            results.append(x)
        print(f"{name} {key}: {apart(*results):.1e}")
        assert apart(*results) < 1e-4
    scheduler = EulerDiscreteScheduler()
    for options, message in (
        ({}, "takes one of"),
        ({"num_inference_steps": 3, "sigmas": [1.0]}, "takes one of"),
        ({"timesteps": []}, "empty list"),
        ({"timesteps": [10, 20]}, r"timesteps must fall from noise to data, got \[10, 20\]"),
        ({"timesteps": [1000, 20]}, "between 0 and 999"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.set_timesteps(**options)


def test_arguments_in_the_order_of_diffusers() -> None:
    """Generators as the fourth argument where they are that there."""
    x = first()
    for name in ("DDPMScheduler", "LCMScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSinglestepScheduler"):
        ours, peer = Scheduler.makers()[name](), getattr(diffusers, name)()
        results = []
        for scheduler in (ours, peer):
            scheduler.set_timesteps(4)
            results.append(scheduler.step(x / 2, scheduler.timesteps[0], x, torch.Generator().manual_seed(1), False)[0])
        assert apart(*results) < 1e-5, name
