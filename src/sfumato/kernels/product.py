"""Products with a matrix, and convolutions, by the compiled kernel: with bias and sum in one pass, and nothing copied.

B pictures, C and N channels, H W height and width, K inner numbers of a product, R rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.kernels.library import Library, ProductArguments, library

PACKED_UP_TO = 2**20  # numbers of weights of which a second, packed copy is kept; larger ones are packed as they go


class Product:
    """The weights of a linear layer, (N, K), or of square filters, (N, C, k, k), made ready for the kernel.

    stride, padding: of the convolution; doubled: of pictures whose rows and columns are repeated first.
    Small weights are copied, large ones are read where they are, filters as channels-last ones.
    Raises ValueError where there is no compiled kernel, or for weights that it does not take.
    """

    def __init__(self, weight: Tensor, stride: int = 1, padding: int = 0, doubled: bool = False) -> None:
        found = library()
        if found is None or weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise ValueError(f"no product kernel for weights of {weight.dtype} on {weight.device}")
        self._library: Library = found
        self.stride, self.padding, self.doubled = stride, padding, doubled
        self.kernel = weight.shape[2] if weight.ndim == 4 else 1
        rows = weight.detach().permute(0, 2, 3, 1) if weight.ndim == 4 else weight.detach()  # (N, k, k, C)
        N, K = len(rows), rows[0].numel()
        packed = weight.numel() <= PACKED_UP_TO
        self.weight = _panels(rows.reshape(N, K), found.panel) if packed else rows.reshape(N, K).contiguous()
        a = self._arguments = ProductArguments()
        a.weight, a.N, a.C, a.kernel = self.weight.data_ptr(), N, rows.shape[-1], self.kernel
        a.stride, a.padding, a.packed, a.doubled = stride, padding, packed, doubled

    def linear(self, x: Tensor, bias: Tensor | None = None, add: Tensor | None = None) -> Tensor:
        """x W^T + bias + add of contiguous rows x (..., K) and add (..., N): (..., N)."""
        a, shape = self._copied(), x.shape
        y = x.new_empty(*shape[:-1], a.N)
        rows = x.numel() // shape[-1]
        a.B = a.H = a.out_H = 1
        a.W = a.out_W = rows
        return self._run(a, x, bias, add, y)

    def convolution(self, x: Tensor, bias: Tensor | None = None, add: Tensor | None = None) -> Tensor:
        """Channels-last pictures x (B, C, H, W) and add (B, N, H', W') to (B, N, H', W'), channels-last."""
        a = self._copied()
        a.B, _, a.H, a.W = x.shape
        times, more = 1 + self.doubled, 2 * self.padding - self.kernel
        H, W = ((times * side + more) // self.stride + 1 for side in (a.H, a.W))
        a.out_H, a.out_W = H, W
        y = torch.empty((a.B, a.N, H, W), memory_format=torch.channels_last)
        return self._run(a, x, bias, add, y)

    def _copied(self) -> ProductArguments:
        """What all calls have in common; each fills its own, as there may be several threads."""
        return ProductArguments.from_buffer_copy(self._arguments)

    def _run(self, a: ProductArguments, x: Tensor, bias: Tensor | None, add: Tensor | None, y: Tensor) -> Tensor:
        a.x, a.y, a.bias = x.data_ptr(), y.data_ptr(), None if bias is None else bias.data_ptr()
        a.add = None if add is None else add.data_ptr()
        a.x_stride, a.add_stride, a.y_stride = a.C, a.N, a.N
        if y.numel():
            self._library.call("product", a)
        return y


def _panels(rows: Tensor, panel: int) -> Tensor:
    """Weights (N, K) as panels of columns one after the other, (N / panel, K, panel), the last filled with zeros."""
    N = -(-len(rows) // panel) * panel
    return F.pad(rows, (0, 0, 0, N - len(rows))).unflatten(0, (-1, panel)).transpose(1, 2).contiguous()
