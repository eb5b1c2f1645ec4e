"""What people ask of any network."""

from __future__ import annotations

import torch
from torch import nn


class Network(nn.Module):
    """A module that says where and in which number format it is, by its first parameter."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(self.parameters()).dtype
