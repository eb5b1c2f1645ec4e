"""Requests to guidance: what networks are told of the prompts, and the adapters that they wear meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from sfumato.cond import Cond
from sfumato.diffusion.guidance import InstructCFG, Plain, Turns
from sfumato.pipelines import sizes
from sfumato.pipelines.guided import Sides, sides
from sfumato.pipelines.request import Request
from sfumato.pipelines.start import Start
from sfumato.presets import Preset
from sfumato.text.prompt import LoraTag, extract_loras
from sfumato.text.towers import Cache, Towers
from sfumato.weights.adapters import Adapter, AdapterHost, Lexicon, read_adapter, read_embedding
from sfumato.weights.adapters.names import UNET, ModuleNames
from sfumato.weights.hub import find_file
from sfumato.weights.parts import Denoiser

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outfit:
    """What a picture wants added to the model: the adapters that its prompt names, and files of learned words."""

    loras: tuple[LoraTag, ...] = ()
    embeddings: tuple[str, ...] = ()

    def locate(self) -> None:
        """FileNotFoundError or ValueError for what is not found, before any work is done."""
        for tag in self.loras:
            find_file("lora", tag.name)
        for name in self.embeddings:
            find_file("embedding", name)


BARE = Outfit()


def outfit(request: Request) -> Outfit:
    """What a request wants; ValueError for an adapter in the negative prompt."""
    negative = extract_loras(request.negative_prompt)[1]
    if negative:
        raise ValueError(
            f"negative_prompt names the adapter {negative[0].name!r}, but adapters change the whole picture; "
            "name it in the prompt, with a weight below zero to lead away from it"
        )
    return Outfit(extract_loras(request.prompt)[1], request.embeddings)


def batches(
    requests: Sequence[Request], most: int | Callable[[Request], int]
) -> Iterator[tuple[int, Outfit, Sequence[Request]]]:
    """Neighbours to be made together: (place of the first, outfit, requests).

    most: so many of one outfit, tile, refiner and int8; or a function that says how many like a request, and then of
          those that differ in nothing but their seeds.
    """
    first = 0
    while first < len(requests):
        wanted = outfit(requests[first])
        end = first + 1
        alike = (wanted, requests[first].tile, requests[first].refiner, requests[first].int8)
        limit = most if isinstance(most, int) else most(requests[first])
        while end < min(first + limit, len(requests)):
            other = requests[end]
            if (outfit(other), other.tile, other.refiner, other.int8) != alike:
                break
            if not isinstance(most, int) and not siblings(requests[first], requests[end]):
                break
            end += 1
        yield first, wanted, requests[first:end]
        first = end


def siblings(a: Request, b: Request) -> bool:
    """Whether two requests for a picture each differ in nothing but the seeds."""
    unlike = {"seed": 0, "variation_seed": 0}
    return a is b or a.model_copy(update=unlike) == b.model_copy(update=unlike)


class Wardrobe:
    """A model's networks, what they wear, and the texts that they have read in it."""

    def __init__(self, denoiser: Denoiser, towers: Towers) -> None:
        self.denoiser, self.towers = denoiser, towers
        self._adapters = AdapterHost(denoiser, *towers.encoders)
        self._words = Lexicon(towers)
        self._worn = BARE
        self._texts: Cache = {}
        if towers.lacks_t5:
            log.warning("this model came without T5 (text_encoder_3); zeros stand for what it would say of prompts")

    def wear(self, wanted: Outfit) -> None:
        """Put on exactly these adapters and words.

        Raises FileNotFoundError or ValueError for a file that is not found or not made for this model; then
        nothing is on.
        """
        if wanted == self._worn:
            return
        self.undress()
        try:
            words = [read_embedding(find_file("embedding", name)) for name in wanted.embeddings]
            shares = [share for tag in wanted.loras for share in self._shares(tag)]
            self._words.apply(words)
            self._adapters.apply(shares)
        except BaseException:
            self.undress()
            raise
        self._worn = wanted

    def undress(self) -> None:
        """Take everything off, bit for bit, and forget the texts, as the networks may change from now on."""
        self._adapters.apply([])
        self._words.apply([])
        self._texts.clear()
        self._worn = BARE

    def guidance(self, request: Request, preset: Preset, start: Start) -> Sides:
        """What to ask for a picture, in what is worn: the prompts along its grid, and the inputs of its start."""
        task, told = preset.task, partial(self._told, request=request, preset=preset, start=start)
        cond = told(extract_loras(request.prompt)[0], start.concat)
        scale = cast(float, request.guidance_scale)
        if not self.towers.present:
            return Plain(cond)
        if task == "instruct":
            assert start.concat is not None
            image = told(request.negative_prompt, start.concat)
            nothing = told(request.negative_prompt, torch.zeros_like(start.concat))
            return InstructCFG(cond, image, nothing, scale, cast(float, request.image_guidance_scale))
        if scale == 1 and request.cfg_pp is None:
            return Plain(cond)
        return sides(request, cond, told(request.negative_prompt, start.concat, negative=True))

    def _told(
        self,
        text: str,
        concat: Tensor | None,
        request: Request,
        preset: Preset,
        start: Start,
        negative: bool = False,
    ) -> Cond | Turns:
        steps = len(start.grid) - 1
        towers = self.towers.replaced(self._words.tokenizers)
        rule = request.prompt_rule or "none"
        turns = towers.along(text, steps, request.clip_skip or 0, rule, self._texts, negative)
        count = sizes.told(preset.denoiser, preset.texts)
        if count:
            height, width = (side * preset.vae.factor for side in start.x.shape[2:])
            row = sizes.numbers(request, count, (height, width), negative)
            turns = [(end, sizes.with_numbers(cond, row)) for end, cond in turns]
        elif start.label is not None:
            turns = [(end, replace(cond, pooled=start.label)) for end, cond in turns]
        conds = [(end, replace(cond, concat=concat)) for end, cond in turns]
        return conds[0][1] if len(conds) == 1 else Turns(conds, start.grid)

    def _shares(self, tag: LoraTag) -> list[tuple[Adapter, float]]:
        """The adapter of a tag with its strength; cut in two where that differs between the networks."""
        adapter = read_adapter(find_file("lora", tag.name), tag.name)
        if tag.unet == tag.text:
            return [(adapter, tag.unet)]
        names = ModuleNames(self.denoiser, *self.towers.encoders)
        # What fits no network goes with the denoiser's, to be refused there.
        text = {raw: c for raw, c in adapter.changes.items() if any(spot.tower != UNET for spot in names.find(raw))}
        unet = {raw: c for raw, c in adapter.changes.items() if raw not in text}
        parts = (replace(adapter, changes=unet), tag.unet), (replace(adapter, changes=text), tag.text)
        return [(part, strength) for part, strength in parts if part.changes]
