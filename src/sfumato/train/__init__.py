"""Training: objectives, the loop, the stages and the recipes that string them together."""

from __future__ import annotations

from sfumato.train.recipe import run

__all__ = ["run"]
