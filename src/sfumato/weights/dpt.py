"""The key map of depth estimators in model folders."""

from __future__ import annotations

from sfumato.models.depth import DepthEstimator
from sfumato.models.dpt import DPTConfig
from sfumato.weights.keymap import KeyMap, Row
from sfumato.weights.meta import on_meta

# What transformers writes, and the published files lack: layers that no picture goes through.
UNREAD = ("neck.fusion_stage.layers.0.residual_layer1.*",)


def dpt_map(config: DPTConfig) -> KeyMap:
    """DPT as transformers names it: our names, and layers that take no part."""
    names = on_meta(lambda: DepthEstimator(config)).state_dict()
    return KeyMap(tuple(Row((name,), name) for name in names), UNREAD)
