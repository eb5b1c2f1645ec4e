"""Memory that goes between the stages of a picture; and out of memory: what is tried then, and how it is said.

First the autoencoder works in tiles, then the network gets one row at a time. Both change pictures by rounding and by
the seams of tiles only, which the autoencoder blends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from sfumato.cond import Cond
from sfumato.models.autoencoder import Coder
from sfumato.prepare import Way
from sfumato.weights.mapped import FileRanges, release_unwritten, trim
from sfumato.weights.safe import lay_out

LARGE = 2**28  # bytes of a file's pages that are worth handing back between the stages of a picture
log = logging.getLogger(__name__)
T = TypeVar("T")


def ran_out(error: RuntimeError) -> bool:
    """Whether an error says that there is no memory left, on a GPU or on the CPU."""
    words = "not enough memory", "can't allocate memory", "out of memory"
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error).lower() for word in words)


@contextmanager
def tiles(vae: nn.Module, wanted: bool) -> Iterator[None]:
    """An autoencoder that works in tiles meanwhile, where wanted and where it can."""
    if not wanted or not isinstance(vae, Coder) or vae.tile is not None:
        yield
        return
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()


def in_tiles_if_need_be(vae: nn.Module, call: Callable[[], T]) -> T:
    """What `call` gives, which uses the autoencoder; tried again in tiles where memory runs out.

    Tiling then stays on. Raises what `call` raises where tiles do not help.
    """
    try:
        return call()
    except RuntimeError as error:
        if not ran_out(error) or not isinstance(vae, Coder) or vae.tile is not None:
            raise
    vae.enable_tiling()
    _empty()
    log.warning("out of memory: the autoencoder works in tiles of %d pixels from now on", vae.tile)
    return call()


class RowByRow:
    """A network that gets one row at a time from the first time on that memory runs out."""

    def __init__(self, net: Callable[..., Tensor]) -> None:
        self.net = net
        self.single = False

    def __call__(self, x: Tensor, t: Tensor, cond: Cond, /, *perturb: str) -> Tensor:
        """Evaluate (B, C, h, w)."""
        if not self.single:
            try:
                return self.net(x, t, cond, *perturb)
            except RuntimeError as error:
                if not ran_out(error) or len(x) == 1:
                    raise
            self.single = True
            _empty()
            log.warning("out of memory: %d pictures at once are too many; the network gets one from now on", len(x))
        rows = (slice(i, i + 1) for i in range(len(x)))
        return torch.cat([self.net(x[row], t[row], cond[row], *perturb) for row in rows])


class LaidOut(Way[nn.Module]):
    """A half of an autoencoder whose kernels are laid out when it is called first: many pictures need one half only."""

    @staticmethod
    def when_called(half: nn.Module) -> Callable[[], None]:
        """Have that done; returns what leaves the half as it is by then. Nothing is done where it was done before."""
        if "forward" in half.__dict__:
            return lambda: None
        object.__setattr__(half, "forward", LaidOut(half))
        return lambda: half.__dict__.pop("forward", None)

    def __call__(self, x: Tensor) -> Tensor:
        """The half's own."""
        lay_out(self.module)
        return self.plain(x)


def idle(networks: Iterable[nn.Module]) -> None:
    """Networks will not be called for a while: pages of large ones' files go, and memory that is kept for buffers.

    Only pages that nothing was written to; they come again, from the system's cache, when they are touched.
    """
    files = FileRanges()
    tensors = [weight for network in networks for weight in network.parameters() if weight in files]
    if sum(weight.nbytes for weight in tensors) >= LARGE:
        for weight in tensors:
            release_unwritten(weight)
        trim()


def _empty() -> None:
    """Give cached memory back, so that what is tried next finds it in one piece."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
