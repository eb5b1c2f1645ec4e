"""The mathematics: paths, grids, predictions, samplers, guidance, the one loop, and the scheduler facade."""

from .around import PAG, Limited, Rescale, Within, thresholded
from .brownian import Brownian, PictureNoise
from .drive import Driver, Run, drive
from .grid import SPACINGS, get_spacing, make_grid
from .guidance import APG, CFG, CFGPP, Guidance, InstructCFG, Plain, Query
from .named import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)
from .named_distilled import DDIMInverseScheduler, EDMEulerScheduler, LCMScheduler, TCDScheduler
from .named_flow import FlowMatchEulerDiscreteScheduler
from .named_solvers import (
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverSDEScheduler,
    DPMSolverSinglestepScheduler,
    IPNDMScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    UniPCMultistepScheduler,
)
from .names import find_sampler, find_spacing
from .path import AnglePath, FlowPath, Path, Point, Points, VEPath, VPPath, add_noise, betas
from .prediction import PREDICTIONS, Prediction, edm, get_prediction
from .samplers import SAMPLERS, Entry, ancestral, evaluations, get_sampler, move, sampler
from .scheduler import Plan, Scheduler, StepOutput

__all__ = [
    "APG",
    "CFG",
    "CFGPP",
    "PAG",
    "PREDICTIONS",
    "SAMPLERS",
    "SPACINGS",
    "AnglePath",
    "Brownian",
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "Driver",
    "EDMEulerScheduler",
    "Entry",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowPath",
    "Guidance",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "InstructCFG",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "Limited",
    "PNDMScheduler",
    "Path",
    "PictureNoise",
    "Plain",
    "Plan",
    "Point",
    "Points",
    "Prediction",
    "Query",
    "Rescale",
    "Run",
    "Scheduler",
    "StepOutput",
    "TCDScheduler",
    "UniPCMultistepScheduler",
    "VEPath",
    "VPPath",
    "Within",
    "add_noise",
    "ancestral",
    "betas",
    "drive",
    "edm",
    "evaluations",
    "find_sampler",
    "find_spacing",
    "get_prediction",
    "get_sampler",
    "get_spacing",
    "make_grid",
    "move",
    "sampler",
    "thresholded",
]
