"""What people call samplers and spacings elsewhere: A1111, ComfyUI, InvokeAI, k-diffusion and diffusers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from .grid import SPACINGS
from .samplers import SAMPLERS

# Names by sampler, as people write them; capitals, blanks and punctuation do not count, and ++ reads pp.
SAMPLER_NAMES: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "euler": ("Euler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"),
        "ddim": ("DDIM", "DDIMScheduler", "DDIMParallelScheduler"),
        "heun": ("Heun", "HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
        "dpm2": ("DPM2", "dpm_2", "KDPM2", "KDPM2DiscreteScheduler"),
        "lms": ("LMS", "LMSDiscreteScheduler"),
        "plms": ("PLMS", "PNDM", "PNDMScheduler"),
        "ipndm": ("iPNDM", "IPNDMScheduler"),
        "lcm": ("LCM", "LCMScheduler"),
        "tcd": ("TCD", "TCDScheduler"),
        "dpmpp_2m": ("DPM++ 2M", "DPM++", "DPMSolver++", "DPMSolverMultistep", "DPMSolverMultistepScheduler"),
        "dpmpp_2s": ("DPM++ 2S", "DPMSolverSinglestep", "DPMSolverSinglestepScheduler"),
        "res_multistep": ("RES multistep", "RES 2M"),
        "deis": ("DEIS", "DEISMultistep", "DEISMultistepScheduler"),
        "unipc": ("UniPC", "uni_pc_bh2", "UniPCMultistep", "UniPCMultistepScheduler"),
        "ddpm": ("DDPM", "DDPMScheduler", "DDPMParallelScheduler"),
        "euler_a": ("Euler a", "euler_ancestral", "EulerAncestralDiscreteScheduler"),
        "dpm2_a": ("DPM2 a", "dpm_2_ancestral", "KDPM2 a", "KDPM2AncestralDiscreteScheduler"),
        "dpmpp_2s_a": ("DPM++ 2S a", "dpmpp_2s_ancestral"),
        "dpmpp_sde": ("DPM++ SDE", "DPMSolverSDE", "DPMSolverSDEScheduler"),
        "dpmpp_2m_sde": ("DPM++ 2M SDE",),
        "dpmpp_2m_sde_heun": ("DPM++ 2M SDE Heun",),
        "dpmpp_3m_sde": ("DPM++ 3M SDE",),
        "er_sde": ("ER SDE",),
        "restart": ("Restart",),
        "dpm_fast": ("DPM fast",),
        "dpm_adaptive": ("DPM adaptive",),
    }
)
SPACING_NAMES: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "linspace": ("Uniform", "discrete"),
        "karras": ("Karras", "k"),
        "polyexponential": ("Polyexponential",),
        "sgm_uniform": ("SGM Uniform",),
        "ddim_uniform": ("DDIM", "DDIM Uniform"),
        "kl_optimal": ("KL Optimal",),
        "align_your_steps": ("Align Your Steps", "AYS", "align_your_steps_sd1"),
        "align_your_steps_sdxl": ("AYS SDXL",),
        "align_your_steps_svd": ("AYS SVD",),
    }
)


def plain(name: str) -> str:
    """A name without what does not count."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


def spelled(known: Sequence[str], names: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What each plain spelling stands for: the registered names, and the others in the table."""
    return {plain(alias): name for name in known for alias in (name, *names.get(name, ()))}


def find_sampler(name: str) -> tuple[str, str | None]:
    """A registered sampler, and the spacing that the name goes on to say, or None.

    "DPM++ 2M Karras" -> ("dpmpp_2m", "karras"); "dpmpp_2m_sde_gpu" -> ("dpmpp_2m_sde", None). ValueError with
    near misses for what nobody knows.
    """
    if name in SAMPLERS:
        return name, None
    samplers = spelled(list(SAMPLERS), SAMPLER_NAMES)
    ends: dict[str, str | None] = {"": None, "gpu": None, "automatic": None}
    ends.update(spelled(list(SPACINGS), SPACING_NAMES))
    wanted = plain(name)
    for end, spacing in sorted(ends.items(), key=lambda row: len(row[0])):
        begin = wanted[: len(wanted) - len(end)]
        for spelling in (begin, begin.removesuffix("gpu"), begin.removeprefix("k"), begin.removeprefix("sample")):
            if wanted.endswith(end) and spelling in samplers:
                return samplers[spelling], spacing
    raise ValueError(unknown("sampler", name, samplers, list(SAMPLERS)))


def find_spacing(name: str) -> str:
    """A registered spacing by any of its names; ValueError with near misses for what nobody knows."""
    spellings = spelled(list(SPACINGS), SPACING_NAMES)
    if plain(name) not in spellings:
        raise ValueError(unknown("spacing", name, spellings, list(SPACINGS)))
    return spellings[plain(name)]


def unknown(kind: str, name: str, spellings: Mapping[str, str], known: Sequence[str]) -> str:
    """The words for a name that nobody knows."""
    near = [spellings[s] for s in difflib.get_close_matches(plain(name), spellings, n=4, cutoff=0.5)]
    hint = f"; did you mean {' or '.join(map(repr, list(dict.fromkeys(near))[:2]))}?" if near else ";"
    return f"unknown {kind} {name!r}{hint} known: {', '.join(known)}"
