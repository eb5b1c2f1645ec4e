"""sfumato: the whole Stable Diffusion family in one readable PyTorch package.

import sfumato
pipe = sfumato.load()
images = pipe("a red apple on a blue background", seed=40).images
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.diffusion.named import (
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        HeunDiscreteScheduler,
        LMSDiscreteScheduler,
        PNDMScheduler,
    )
    from sfumato.diffusion.scheduler import Scheduler
    from sfumato.pipelines.pipeline import Pipeline, PipelineOutput, StableDiffusionPipeline, load
    from sfumato.pipelines.request import Request

__version__ = "0.1.0"

# Where each public name lives; it is imported when first asked for, so that `import sfumato` costs nothing.
_HOMES = {
    "sfumato.pipelines.pipeline": ("Pipeline", "PipelineOutput", "StableDiffusionPipeline", "load"),
    "sfumato.pipelines.request": ("Request",),
    "sfumato.diffusion.scheduler": ("Scheduler",),
    "sfumato.diffusion.named": (
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
    ),
}

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "Pipeline",
    "PipelineOutput",
    "Request",
    "Scheduler",
    "StableDiffusionPipeline",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'sfumato' has no attribute {name!r}; it has: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
