"""Names from elsewhere."""

from __future__ import annotations

import pytest

from sfumato.diffusion import SAMPLERS, SPACINGS, Scheduler, find_sampler, find_spacing
from sfumato.diffusion.names import SAMPLER_NAMES, SPACING_NAMES, plain, spelled

A1111 = {
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ SDE": "dpmpp_sde",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ 2M SDE Heun": "dpmpp_2m_sde_heun",
    "DPM++ 2S a": "dpmpp_2s_a",
    "DPM++ 3M SDE": "dpmpp_3m_sde",
    "Euler a": "euler_a",
    "Euler": "euler",
    "LMS": "lms",
    "Heun": "heun",
    "DPM2": "dpm2",
    "DPM2 a": "dpm2_a",
    "DPM fast": "dpm_fast",
    "DPM adaptive": "dpm_adaptive",
    "Restart": "restart",
    "DDIM": "ddim",
    "PLMS": "plms",
    "UniPC": "unipc",
    "LCM": "lcm",
}
COMFY = {
    "euler": "euler",
    "euler_ancestral": "euler_a",
    "heun": "heun",
    "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2_a",
    "lms": "lms",
    "dpm_fast": "dpm_fast",
    "dpm_adaptive": "dpm_adaptive",
    "dpmpp_2s_ancestral": "dpmpp_2s_a",
    "dpmpp_sde": "dpmpp_sde",
    "dpmpp_sde_gpu": "dpmpp_sde",
    "dpmpp_2m": "dpmpp_2m",
    "dpmpp_2m_sde": "dpmpp_2m_sde",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_2m_sde_heun": "dpmpp_2m_sde_heun",
    "dpmpp_2m_sde_heun_gpu": "dpmpp_2m_sde_heun",
    "dpmpp_3m_sde": "dpmpp_3m_sde",
    "dpmpp_3m_sde_gpu": "dpmpp_3m_sde",
    "ddpm": "ddpm",
    "lcm": "lcm",
    "ipndm": "ipndm",
    "deis": "deis",
    "res_multistep": "res_multistep",
    "er_sde": "er_sde",
    "ddim": "ddim",
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
}
SCHEDULES = {
    "Karras": "karras",
    "Exponential": "exponential",
    "Polyexponential": "polyexponential",
    "SGM Uniform": "sgm_uniform",
    "KL Optimal": "kl_optimal",
    "Align Your Steps": "align_your_steps",
    "Simple": "simple",
    "Normal": "normal",
    "DDIM": "ddim_uniform",
    "Beta": "beta",
    "Uniform": "linspace",
    "ddim_uniform": "ddim_uniform",
    "kl_optimal": "kl_optimal",
    "sgm_uniform": "sgm_uniform",
}


def test_names_of_a1111_and_comfyui() -> None:
    """Alone, and with each schedule behind them."""
    for names in (A1111, COMFY):
        for name, sampler in names.items():
            assert find_sampler(name) == (sampler, None), name
            assert find_sampler(name.upper().replace("_", " ")) == (sampler, None), name
            for schedule, spacing in SCHEDULES.items():
                assert find_sampler(f"{name} {schedule}") == (sampler, spacing), (name, schedule)
    for schedule, spacing in SCHEDULES.items():
        assert find_spacing(schedule) == spacing
    for name, expected in (
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("dpmpp-2m--KARRAS", ("dpmpp_2m", "karras")),
        ("k_euler_a", ("euler_a", None)),
        ("k_dpm_2", ("dpm2", None)),
        ("dpmpp_2m_k", ("dpmpp_2m", "karras")),
        ("dpmpp_2m_sde_k", ("dpmpp_2m_sde", "karras")),
        ("sample_dpmpp_2m", ("dpmpp_2m", None)),
        ("DPM++ 2M Automatic", ("dpmpp_2m", None)),
    ):
        assert find_sampler(name) == expected


def test_names_of_diffusers() -> None:
    """Every class that is here under diffusers' name, and a few that are not."""
    for name, maker in Scheduler.makers().items():
        if name.endswith("InverseScheduler"):
            continue
        sampler, spacing = find_sampler(name)
        assert spacing is None
        stands_for = getattr(maker, "stands_for", {})
        assert sampler in stands_for or not stands_for, name
    assert find_sampler("DPMSolverMultistepScheduler") == ("dpmpp_2m", None)


def test_our_own_names_come_first() -> None:
    """Each registered name is itself, and no spelling stands for two."""
    for name in SAMPLERS:
        assert find_sampler(name) == (name, None)
    for name in SPACINGS:
        assert find_spacing(name) == name
    for known, names in ((SAMPLERS, SAMPLER_NAMES), (SPACINGS, SPACING_NAMES)):
        assert set(names) <= set(known)
        every = [(plain(alias), name) for name in known for alias in {plain(a) for a in (name, *names.get(name, ()))}]
        assert len(every) == len(spelled(list(known), names))


def test_unknown_names_get_near_misses() -> None:
    """In one line, with everything that is known."""
    with pytest.raises(ValueError, match=r"^unknown sampler 'dpm2m'; did you mean .*'dpmpp_2m'.*known: euler, "):
        find_sampler("dpm2m")
    with pytest.raises(ValueError, match=r"^unknown sampler 'euler_cfg_pp'; did you mean 'euler"):
        find_sampler("euler_cfg_pp")
    with pytest.raises(ValueError, match=r"^unknown sampler ''; known: "):
        find_sampler("")
    with pytest.raises(ValueError, match=r"^unknown spacing 'karass'; did you mean 'karras'"):
        find_spacing("karass")
