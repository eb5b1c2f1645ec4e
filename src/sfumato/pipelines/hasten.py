"""`fast`: the settings that save the most time for what they change, as `docs/speed.md` measures them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sfumato.models.mmdit import MMDiTConfig
from sfumato.pipelines.request import Request
from sfumato.presets import Preset

# By what denoises: the settings, each an option of its own.
FAST_UNET: Mapping[str, Any] = MappingProxyType({"deep_cache": 3, "guidance_interval": (0.0, 0.9)})
FAST_TRANSFORMER: Mapping[str, Any] = MappingProxyType({"block_cache": 0.1, "guidance_interval": (0.0, 0.9)})


def hastened(request: Request, preset: Preset) -> Request:
    """The request with the settings that `fast` stands for in its place, so that a recipe says what was done.

    What the request says itself stays. A U-Net of one level, a transformer of one block, and guidance that is not
    there have nothing to save.
    """
    if not request.fast:
        return request
    config = preset.denoiser
    transformer = isinstance(config, MMDiTConfig)
    wanted = dict(FAST_TRANSFORMER if transformer else FAST_UNET)
    if (config.num_layers if isinstance(config, MMDiTConfig) else len(config.block_out_channels)) < 2:
        wanted.pop("block_cache" if transformer else "deep_cache")
    steps = request.num_inference_steps or preset.num_inference_steps
    scale = preset.guidance_scale if request.guidance_scale is None else request.guidance_scale
    if not preset.texts or (scale == 1 and request.cfg_pp is None) or steps < 2:
        wanted.pop("guidance_interval")
    opened = {name: value for name, value in wanted.items() if getattr(request, name) is None}
    return request.model_copy(update={**opened, "fast": False})
