"""How an open pipeline keeps its weights; `fit` says what that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import torch

from sfumato import __version__
from sfumato.allocator import kept
from sfumato.pipelines.fit import Memory, check_memory, closed, networks, resident
from sfumato.prepare import prepare
from sfumato.weights.safe import lay_out

if TYPE_CHECKING:
    from sfumato.pipelines.pipeline import Pipeline
    from sfumato.weights.streaming import Residence


class Keeping:
    """What a pipeline can be told about its memory."""

    _residence: Residence | None = None
    _plain: Mapping[int, Callable[[], None]] = MappingProxyType({})  # what undoes the preparation of a network

    @property
    def memory(self) -> Memory:
        """How weights are kept: "fast", "balanced" or "low"."""
        return "fast" if self._residence is None else "low" if self._residence.stream else "balanced"

    def set_memory(self: Pipeline, memory: str) -> None:  # type: ignore[misc]
        """Keep weights in another way from now on; pictures are the same, but for tiles and rounding.

        fast:     all ready all the time, and on a CPU in the form that is quickest, which rounds otherwise
                  (`prepare`).
        balanced: those of a text encoder, the denoiser or the autoencoder are ready while it is at work.
        low:      those of a layer are ready while it is called; pictures beyond 512 pixels are decoded in tiles.
        What is not ready takes no memory where it is a view of a file, as after `from_pretrained(memory=...)`; on a
        GPU, what is not ready is not there. Nobody else may write to such weights.
        Raises ValueError for another word.
        """
        check_memory(memory)
        if memory == self.memory:
            return
        self.dressing().undress()
        if self._residence is not None:
            closed(self, self._residence)
            self._second = None
        for undo in self._plain.values():
            undo()
        self._plain = MappingProxyType({})
        self._residence = resident(self, self.runtime, cast(Memory, memory))
        if self._residence is None:
            self.to()

    def lay_out(self: Pipeline) -> None:  # type: ignore[misc]
        """Bring networks into the runtime's form; not before the first use, so that opening a model copies nothing.

        Does nothing for weights that come and go, which are brought into it when they come.
        """
        if self.runtime.channels_last and self._residence is None:
            for network in (self.denoiser, self.vae):
                lay_out(network)
                self._plain = {id(network): prepare(network), **self._plain}

    def allocating(self) -> AbstractContextManager[None]:
        """While pictures are made: large buffers are kept for the next ones, where memory is not to be spared."""
        return kept() if self._residence is None else nullcontext()

    def made_with(self: Pipeline) -> dict[str, str]:  # type: ignore[misc]
        """What besides the request decides the exact pixels: versions, device, precision, tiles."""
        known = {"sfumato": __version__, "torch": torch.__version__}
        known |= {"device": str(self.runtime.device), "precision": self.runtime.precision}
        return known | ({"memory": self.memory} if self.memory == "low" else {})

    def admit(self: Pipeline, other: Pipeline) -> None:  # type: ignore[misc]
        """Keep the weights of another model, which has this one's autoencoder, as its own; they take turns."""
        other.runtime = self.runtime
        if self._residence is not None:
            further = {f"{other.model}: {stage}": some for stage, some in networks(other).items() if stage != "vae"}
            self._residence.add(further, [other.denoiser] if self.runtime.channels_last else [])
            other._residence = self._residence

    def share_memory(self, other: Keeping) -> None:
        """Keep weights as another pipeline does whose networks these are."""
        self._residence = other._residence

    def leave(self) -> None:
        """Let go of the weights that are kept for the stage that was at work last."""
        if self._residence is not None:
            self._residence.leave()

    @contextmanager
    def _as_stored(self) -> Iterator[None]:
        """All weights as their file has them meanwhile, to be written to another."""
        if self._residence is None:
            yield
            return
        with self._residence.stored():
            yield
