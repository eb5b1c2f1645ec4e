"""What people ask of any network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


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


@dataclass(frozen=True)
class NetworkOutput:
    """What a denoising network answers to a call in diffusers' form: the prediction (B, C_out, H, W)."""

    sample: Tensor

    def __getitem__(self, key: int | str) -> Tensor:
        """The prediction for 0 and for "sample"."""
        return {0: self.sample, "sample": self.sample}[key]
