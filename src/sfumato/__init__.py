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
        HeunDiscreteScheduler,
        LMSDiscreteScheduler,
        PNDMScheduler,
    )
    from sfumato.diffusion.named_distilled import (
        DDIMInverseScheduler,
        EDMEulerScheduler,
        LCMScheduler,
        TCDScheduler,
    )
    from sfumato.diffusion.named_flow import FlowMatchEulerDiscreteScheduler
    from sfumato.diffusion.named_solvers import (
        DEISMultistepScheduler,
        DPMSolverMultistepInverseScheduler,
        DPMSolverSDEScheduler,
        DPMSolverSinglestepScheduler,
        IPNDMScheduler,
        KDPM2AncestralDiscreteScheduler,
        KDPM2DiscreteScheduler,
        UniPCMultistepScheduler,
    )
    from sfumato.diffusion.scheduler import Scheduler
    from sfumato.pipelines.doors import (
        StableDiffusionDepth2ImgPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
        StableDiffusionInstructPix2PixPipeline,
        StableDiffusionPipeline,
        StableDiffusionPipelineOutput,
        StableDiffusionUpscalePipeline,
    )
    from sfumato.pipelines.doors_auto import (
        AutoPipelineForImage2Image,
        AutoPipelineForInpainting,
        AutoPipelineForText2Image,
        DiffusionPipeline,
    )
    from sfumato.pipelines.doors_sd3 import (
        StableDiffusion3Img2ImgPipeline,
        StableDiffusion3InpaintPipeline,
        StableDiffusion3Pipeline,
    )
    from sfumato.pipelines.doors_xl import (
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLInpaintPipeline,
        StableDiffusionXLPipeline,
    )
    from sfumato.pipelines.opening import (
        AutoencoderKL,
        CLIPTextModel,
        CLIPTokenizer,
        UNet2DConditionModel,
    )
    from sfumato.pipelines.pipeline import Pipeline, PipelineOutput, load
    from sfumato.pipelines.request import Request
    from sfumato.pipelines.restore import restore

__version__ = "0.1.0"

# Where each public name lives; it is imported when first asked for, so that `import sfumato` costs nothing.
_HOMES = {
    "sfumato.diffusion.named": (
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
    ),
    "sfumato.diffusion.named_distilled": (
        "DDIMInverseScheduler",
        "EDMEulerScheduler",
        "LCMScheduler",
        "TCDScheduler",
    ),
    "sfumato.diffusion.named_flow": ("FlowMatchEulerDiscreteScheduler",),
    "sfumato.diffusion.named_solvers": (
        "DEISMultistepScheduler",
        "DPMSolverMultistepInverseScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "IPNDMScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "UniPCMultistepScheduler",
    ),
    "sfumato.diffusion.scheduler": ("Scheduler",),
    "sfumato.pipelines.doors": (
        "StableDiffusionDepth2ImgPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionPipeline",
        "StableDiffusionPipelineOutput",
        "StableDiffusionUpscalePipeline",
    ),
    "sfumato.pipelines.doors_auto": (
        "AutoPipelineForImage2Image",
        "AutoPipelineForInpainting",
        "AutoPipelineForText2Image",
        "DiffusionPipeline",
    ),
    "sfumato.pipelines.doors_sd3": (
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3Pipeline",
    ),
    "sfumato.pipelines.doors_xl": (
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLPipeline",
    ),
    "sfumato.pipelines.opening": (
        "AutoencoderKL",
        "CLIPTextModel",
        "CLIPTokenizer",
        "UNet2DConditionModel",
    ),
    "sfumato.pipelines.pipeline": (
        "Pipeline",
        "PipelineOutput",
        "load",
    ),
    "sfumato.pipelines.request": ("Request",),
    "sfumato.pipelines.restore": ("restore",),
}

__all__ = [
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "AutoencoderKL",
    "CLIPTextModel",
    "CLIPTokenizer",
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "DiffusionPipeline",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "Pipeline",
    "PipelineOutput",
    "Request",
    "Scheduler",
    "StableDiffusion3Img2ImgPipeline",
    "StableDiffusion3InpaintPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionPipelineOutput",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLPipeline",
    "TCDScheduler",
    "UNet2DConditionModel",
    "UniPCMultistepScheduler",
    "__version__",
    "load",
    "restore",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'sfumato' has no attribute {name!r}; it has: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
