"""What people ask of any network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """A module that says where and in which number format it is, by its first parameter.

    runs_in: the two where its weights are kept in another way than they are used; None where they are not.
    """

    runs_in: tuple[torch.device, torch.dtype] | None = None

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.parameters()).device if self.runs_in is None else self.runs_in[0]

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(self.parameters()).dtype if self.runs_in is None else self.runs_in[1]


@dataclass(frozen=True)
class NetworkOutput:
    """What a denoising network answers to a call in diffusers' form: the prediction (B, C_out, H, W)."""

    sample: Tensor

    def __getitem__(self, key: int | str) -> Tensor:
        """The prediction for 0 and for "sample"."""
        return {0: self.sample, "sample": self.sample}[key]
