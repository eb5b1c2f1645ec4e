"""sfumato: the whole Stable Diffusion family in one readable PyTorch package."""

from __future__ import annotations

__version__ = "0.1.0"
