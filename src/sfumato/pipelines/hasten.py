"""`fast`: the settings that save the most time for what they change, as `docs/speed.md` measures them."""

from __future__ import annotations

from typing import Any

from sfumato.models.mmdit import MMDiTConfig
from sfumato.pipelines.request import Request
from sfumato.presets import Preset

GUIDED = (0.1, 1.0)  # of the steps of a U-Net, which guidance changes little in the first ones
EVERY = 2  # of so many steps one computes a U-Net's deep part
FEWEST = 10  # steps that are near enough to one another to share anything
LIMIT = 0.1  # of the change in a transformer's first block


def hastened(request: Request, preset: Preset) -> Request:
    """The request with the settings that `fast` stands for in its place, so that a recipe says what was done.

    What the request says itself stays. Fewer than `FEWEST` steps, a U-Net of one level, a transformer of one block and
    guidance that is not there have nothing to save.
    """
    if not request.fast:
        return request
    config = preset.denoiser
    steps = request.num_inference_steps or preset.num_inference_steps
    scale = preset.guidance_scale if request.guidance_scale is None else request.guidance_scale
    wanted: dict[str, Any] = {}
    if steps < FEWEST:
        return request.model_copy(update={"fast": False})
    if isinstance(config, MMDiTConfig) and config.num_layers > 1:
        wanted["block_cache"] = LIMIT
    elif not isinstance(config, MMDiTConfig) and len(config.block_out_channels) > 1:
        wanted["deep_cache"] = EVERY
    # A transformer on a flow path decides much in the first steps.
    if not isinstance(config, MMDiTConfig) and preset.texts and (scale != 1 or request.cfg_pp is not None):
        wanted["guidance_interval"] = GUIDED
    opened = {name: value for name, value in wanted.items() if getattr(request, name) is None}
    return request.model_copy(update={**opened, "fast": False})
