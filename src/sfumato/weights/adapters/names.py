"""How files spell adapters: names of tensors into module and part, and spellings of modules into modules.

kohya and LyCORIS join a module's path with underscores behind `lora_unet_`, `lora_te_` or `lycoris_`; PEFT and
diffusers keep the dots behind `unet.`, `text_encoder.` or `base_model.model.`; either may speak of the
original modules (`input_blocks.1.1...`, `joint_blocks.0...`) instead of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from sfumato.models.mmdit import MMDiT
from sfumato.models.unet import UNet
from sfumato.weights.adapters.deltas import Take
from sfumato.weights.compvis import unet_modules
from sfumato.weights.keymap import swapped
from sfumato.weights.sd3 import mmdit_modules

UNET, TEXT, TEXT_2, TEXT_3 = "unet", "text_encoder", "text_encoder_2", "text_encoder_3"
TEXTS = (TEXT, TEXT_2, TEXT_3)
TOWERS = (UNET, *TEXTS)  # the denoiser, of whatever kind, and the text towers by place
# How a tensor's name ends, and which part of an adapter that is.
PARTS: Mapping[str, str] = {
    # kohya and LyCORIS
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".scalar": "scalar",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "diff",
    ".b_norm": "diff_b",
    **{f".hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    # PEFT
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    # diffusers before PEFT
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
}
ENDINGS = sorted(PARTS, key=len, reverse=True)
# PEFT in memory has the adapter's own name in the middle: lora_A.default.weight.
ADAPTER_NAME = re.compile(r"(\.lora_(?:A|B|magnitude_vector))\.[^.]+(\.(?:weight|bias))$")
# Prefixes of kohya's kind, and the towers that they stand for.
JOINED: Mapping[str, tuple[str, ...]] = {
    "lora_unet_": (UNET,),
    "lora_te_": (TEXT,),
    "lora_te1_": (TEXT,),
    "lora_te2_": (TEXT_2,),
    "lora_te3_": (TEXT_3,),
    "lora_transformer_": (UNET,),
    "lycoris_": TOWERS,
}
# Prefixes with dots; the first that fits is taken off.
DOTTED: Mapping[str, tuple[str, ...]] = {
    "unet.": (UNET,),
    "transformer.": (UNET,),
    "model.diffusion_model.": (UNET,),
    "diffusion_model.": (UNET,),
    **{f"{tower}.": (tower,) for tower in TEXTS},
    "": TOWERS,
}
# The names that diffusers gave the text tower's projections before PEFT.
OLD_TEXT: Mapping[str, str] = {".to_q": ".q_proj", ".to_k": ".k_proj", ".to_v": ".v_proj", ".to_out": ".out_proj"}
# Marks in the names of adapters of other families; the first that is found is reported.
FOREIGN: Sequence[tuple[str, str]] = (
    ("FLUX", r"(double|single)_blocks|single_transformer_blocks"),
    ("Stable Diffusion 3", r"joint_blocks|joint_transformer_blocks|\btransformer\.transformer_blocks"),
    ("SDXL", r"lora_te2_|text_encoder_2\.|add_embedding|label_emb|transformer_blocks[._][1-9]"),
)


def split_name(name: str) -> tuple[str, str] | None:
    """A tensor's name as (module as the file spells it, part); None when it is no part of an adapter."""
    name = ADAPTER_NAME.sub(r"\1\2", name)
    for ending in ENDINGS:
        if name.endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)], PARTS[ending]
    return None


@dataclass(frozen=True)
class Spot:
    """A module of ours that a file's module is, or a part of it.

    take: the rows of the file's that are ours; None where it is the same module.
    """

    tower: str
    name: str
    take: Take | None = None

    @property
    def place(self) -> tuple[str, str]:
        """Tower and name."""
        return self.tower, self.name


class ModuleNames:
    """The modules of a denoiser and its text encoders that have a weight, under all spellings that files use.

    text_encoders: by their place in the model, None where one is empty.
    """

    def __init__(self, denoiser: nn.Module, *text_encoders: nn.Module | None) -> None:
        theirs = unet_modules(denoiser.config) if isinstance(denoiser, UNet) else {}
        self._spelled: dict[str, dict[str, tuple[Spot, ...]]] = {tower: {} for tower in TOWERS}
        for name in weighted(denoiser):
            for spelling in (name, theirs.get(name, name)):
                self._add(UNET, spelling, (Spot(UNET, name),))
        for spelling, row in (mmdit_modules(denoiser.config) if isinstance(denoiser, MMDiT) else {}).items():
            takes: list[Take | None] = [swapped if row.shape == "swapped" else None]
            if len(row.ours) > 1:
                takes = [partial(_part, place=i, count=len(row.ours)) for i in range(len(row.ours))]
            self._add(UNET, spelling, tuple(map(partial(Spot, UNET), row.ours, takes)))
        for tower, text_encoder in zip(TEXTS, text_encoders, strict=False):
            for name in weighted(text_encoder) if text_encoder is not None else ():
                # Recent versions of transformers leave the outermost name out.
                for spelling in (name, name.removeprefix("text_model.")):
                    self._add(tower, spelling, (Spot(tower, name),))

    def find(self, raw: str) -> tuple[Spot, ...]:
        """What a module is as a file spells it: one of ours, or several that it joins; () when there is none."""
        for tower, spelling in self._candidates(raw):
            spots = self._spelled[tower].get(spelling)
            if spots is not None:
                return spots
        return ()

    def _add(self, tower: str, spelling: str, spots: tuple[Spot, ...]) -> None:
        self._spelled[tower][spelling] = spots
        self._spelled[tower][spelling.replace(".", "_")] = spots

    def _candidates(self, raw: str) -> Iterator[tuple[str, str]]:
        for prefix, towers in JOINED.items():
            if raw.startswith(prefix):
                yield from ((tower, raw[len(prefix) :]) for tower in towers)
                return
        raw = raw.removeprefix("base_model.model.")
        prefix, towers = next((p, towers) for p, towers in DOTTED.items() if raw.startswith(p))
        spelling = raw[len(prefix) :].replace(".processor.", ".")
        for tower in towers:
            yield tower, spelling
            if tower == UNET and spelling.endswith(".to_out"):
                yield tower, spelling + ".0"
            for old, new in OLD_TEXT.items() if tower in TEXTS else ():
                if spelling.endswith(old):
                    yield tower, spelling.removesuffix(old) + new


def _part(rows: Tensor, place: int, count: int) -> Tensor:
    """One of `count` parts of the rows; ValueError where they cannot be parted so."""
    if len(rows) % count:
        raise ValueError(f"has {len(rows)} rows, which are not {count} modules' of the same size")
    return rows.chunk(count)[place]


def weighted(module: nn.Module) -> Iterator[str]:
    """The names of the modules inside `module` that have a weight of their own."""
    return (name for name, part in module.named_modules() if part._parameters.get("weight") is not None)


def made_for(raws: Iterable[str]) -> str:
    """The family that module names of an adapter point to, "" when they give no hint."""
    text = "\n".join(raws)
    return next((family for family, marks in FOREIGN if re.search(marks, text)), "")
