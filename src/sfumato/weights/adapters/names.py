"""How files spell adapters: names of tensors into module and part, and spellings of modules into modules.

kohya and LyCORIS join a module's path with underscores behind `lora_unet_`, `lora_te_` or `lycoris_`; PEFT and
diffusers keep the dots behind `unet.`, `text_encoder.` or `base_model.model.`; either may speak of CompVis modules
(`input_blocks.1.1...`) instead of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from sfumato.models.unet import UNet
from sfumato.weights.compvis import unet_modules

UNET, TEXT = "unet", "text_encoder"
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
    "lycoris_": (UNET, TEXT),
}
# Prefixes with dots; the first that fits is taken off.
DOTTED: Mapping[str, tuple[str, ...]] = {
    "unet.": (UNET,),
    "model.diffusion_model.": (UNET,),
    "diffusion_model.": (UNET,),
    "text_encoder.": (TEXT,),
    "": (UNET, TEXT),
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


class ModuleNames:
    """The modules of a U-Net and a text encoder that have a weight, under all spellings that files use."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module | None) -> None:
        theirs = unet_modules(unet.config) if isinstance(unet, UNet) else {}
        self._spelled: dict[str, dict[str, str]] = {UNET: {}, TEXT: {}}
        for name in weighted(unet):
            for spelling in (name, theirs.get(name, name)):
                self._add(UNET, spelling, name)
        for name in weighted(text_encoder) if text_encoder is not None else ():
            # Recent versions of transformers leave the outermost name out.
            for spelling in (name, name.removeprefix("text_model.")):
                self._add(TEXT, spelling, name)

    def find(self, raw: str) -> tuple[str, str] | None:
        """(tower, module name) of a module as a file spells it; None when the model has no such module."""
        for tower, spelling in self._candidates(raw):
            name = self._spelled[tower].get(spelling)
            if name is not None:
                return tower, name
        return None

    def _add(self, tower: str, spelling: str, name: str) -> None:
        self._spelled[tower][spelling] = name
        self._spelled[tower][spelling.replace(".", "_")] = name

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
            for old, new in OLD_TEXT.items() if tower == TEXT else ():
                if spelling.endswith(old):
                    yield tower, spelling.removesuffix(old) + new


def weighted(module: nn.Module) -> Iterator[str]:
    """The names of the modules inside `module` that have a weight of their own."""
    return (name for name, part in module.named_modules() if part._parameters.get("weight") is not None)


def made_for(raws: Iterable[str]) -> str:
    """The family that module names of an adapter point to, "" when they give no hint."""
    text = "\n".join(raws)
    return next((family for family, marks in FOREIGN if re.search(marks, text)), "")
