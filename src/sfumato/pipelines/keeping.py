"""How an open pipeline keeps its weights; `fit` says what that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import torch

from sfumato import __version__
from sfumato.allocator import kept
from sfumato.compiling import compiled
from sfumato.models.autoencoder import Coder
from sfumato.pipelines.fit import Memory, check_memory, closed, networks, resident
from sfumato.pipelines.memory import LaidOut
from sfumato.prepare import prepare
from sfumato.runtime import Runtime, check_compile
from sfumato.weights.safe import lay_out
from sfumato.weights.streaming import Residence

if TYPE_CHECKING:
    from sfumato.pipelines.pipeline import Pipeline

T5 = "text_encoder_3"


class Keeping:
    """What a pipeline can be told about its memory, and about compiling."""

    runtime: Runtime
    _residence: Residence | None = None
    _t5: Residence | None = None  # T5's own, where it goes other ways than the rest
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
        Raises ValueError for another word, and for a compiled denoiser, whose weights have to stay.
        """
        check_memory(memory)
        check_staying(self.runtime.compile, memory)
        if memory == self.memory:
            return
        self.dressing().undress()
        if self._residence is not None:
            closed(self, self._residence)
            self._second = None
        for undo in self._plain.values():
            undo()
        self._plain = MappingProxyType({})
        apart = (T5,) if self._t5 is not None or self.source["t5"] == "keep" else ()
        self._residence = resident(self, self.runtime, cast(Memory, memory), apart=apart)
        if self._residence is None:
            self.to()

    def keep_t5(self: Pipeline, how: str | None, memory: str) -> None:  # type: ignore[misc]
        """Have T5's weights come and go apart from the rest, before `set_memory`; None changes nothing.

        off:  there are none, see `load_model`.
        cpu:  those of a layer are ready, on the CPU and in float32, while it is called.
        keep: they are ready from their first use on, whatever `memory` is for the others.
        Raises ValueError for a model that does not read T5, or came without it where it is wanted.
        """
        towers, encoder = self.towers, self.text_encoder_3
        if how is None:
            return
        if encoder is None and not towers.lacks_t5:
            raise ValueError(f"t5 = {how} is for models that read T5, and {self.preset.title} reads none; leave it out")
        if how != "off" and encoder is None:
            raise ValueError(f"t5 = {how}, but this model came without T5 (text_encoder_3); name it with base")
        if encoder is not None and (how == "cpu" or memory != "fast"):
            here = self.runtime.device, self.runtime.dtype
            form = (torch.device("cpu"), torch.float32) if how == "cpu" else here
            self._t5 = Residence({T5: [encoder]}, *form, stream=how == "cpu")
        self.source["t5"] = how

    def texts_are_read(self) -> None:
        """No text will be read for a while: what T5 needed for the last one goes."""
        if self._t5 is not None and self._t5.stream:
            self._t5.leave()

    def set_compile(self: Pipeline, how: str) -> None:  # type: ignore[misc]
        """Have the denoiser compiled by torch.compile from the next picture on, or not any more; see `compiling`.

        off:    it is not; on a CPU it is prepared instead (`prepare`).
        blocks: its repeated blocks are, which takes a minute or two, and of the second size of picture once more.
        graphs: all of it is, for replay as a CUDA graph: minutes for each size and number of pictures.
        Raises ValueError for another word, and where the device or the way of keeping weights does not allow it.
        """
        check_compile(how, self.runtime.device.type)
        check_staying(how, self.memory)
        self.runtime = replace(self.runtime, compile=how)
        self._plain.get(id(self.denoiser), lambda: None)()
        self._plain = {key: undo for key, undo in self._plain.items() if key != id(self.denoiser)}

    def lay_out(self: Pipeline) -> None:  # type: ignore[misc]
        """Bring networks into the runtime's form; not before the first use, so that opening a model copies nothing.

        Does nothing for weights that come and go, which are brought into it when they come.
        """
        if self._residence is not None:
            return
        how = self.runtime.compile
        if self.runtime.channels_last:
            for network in (self.denoiser, self.vae):
                if isinstance(network, Coder):
                    halves = network.encoder, network.decoder
                    self._plain = {**{id(half): LaidOut.when_called(half) for half in halves}, **self._plain}
                else:
                    lay_out(network)
                if how == "off" or network is self.vae:
                    self._plain = {id(network): prepare(network), **self._plain}
        if how != "off":
            self._plain = {id(self.denoiser): compiled(self.denoiser, how), **self._plain}

    def allocating(self) -> AbstractContextManager[None]:
        """While pictures are made: large buffers are kept for the next ones, where memory is not to be spared."""
        return kept() if self._residence is None else nullcontext()

    def made_with(self: Pipeline) -> dict[str, str]:  # type: ignore[misc]
        """What besides the request decides the exact pixels: versions, device, precision, tiles."""
        known = {"sfumato": __version__, "torch": torch.__version__}
        known |= {"device": str(self.runtime.device), "precision": self.runtime.precision}
        known |= {} if self.runtime.compile == "off" else {"compile": self.runtime.compile}
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
        self._residence, self._t5 = other._residence, other._t5

    def leave(self) -> None:
        """Let go of the weights that are kept for the stage that was at work last."""
        if self._residence is not None:
            self._residence.leave()

    @contextmanager
    def _as_stored(self) -> Iterator[None]:
        """All weights as their file has them meanwhile, to be written to another."""
        with ExitStack() as stack:
            for residence in (self._residence, self._t5):
                if residence is not None:
                    stack.enter_context(residence.stored())
            yield


def check_staying(how: str, memory: str) -> None:
    """ValueError for a network to be compiled whose weights come and go."""
    if how != "off" and memory != "fast":
        raise ValueError(
            f"compile = {how!r} is for weights that stay (memory = 'fast'), and memory is {memory!r}; "
            "leave compile out, or ask for fast"
        )
