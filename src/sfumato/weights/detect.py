"""What a file of tensors is, told from the names and shapes in it and from nothing else.

A dialect is one way in which files spell the names of one component. A file is looked through for each dialect's
anchor; the shapes below it give a signature, and the preset with the same signatures says what model it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.diffusion.prediction import get_prediction
from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.bert import LDMBertConfig
from sfumato.models.classes import ClassEmbedderConfig
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.dpt import DPTConfig
from sfumato.models.mmdit import MMDiTConfig
from sfumato.models.t5 import T5Config
from sfumato.models.tiny import TinyConfig
from sfumato.models.unet import UNetConfig
from sfumato.models.vq import VQConfig
from sfumato.presets import SINGLE, DenoiserConfig, Kind, Preset, TextConfig, VAEConfig
from sfumato.weights import compvis, dpt, sd3, t5
from sfumato.weights.keymap import KeyMap, Row
from sfumato.weights.parts import network
from sfumato.weights.signatures import (
    Shapes,
    Signature,
    depth_midas,
    mmdit_folder,
    mmdit_original,
    signature_of,
    table_of,
    unet_compvis,
    unet_folder,
    vae_compvis,
    vae_folder,
    vae_tiny,
)
from sfumato.weights.source import Weights

DENOISER, VAE, TEXT, TEXT_2, TEXT_3 = "denoiser", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"
DEPTH = "depth_estimator"
TOWERS = (TEXT, TEXT_2, TEXT_3)
PARTS = (DENOISER, VAE, *TOWERS, DEPTH)
EMA = "model_ema."
# How many steps the two 512-pixel models of the Stable Diffusion 2 kind had been trained when they were published;
# their weights look like those of the 768-pixel ones, which predict v.
BASE_STEPS = ("875000", "220000")
# Names under which programs note the prediction type in a file's metadata, and tensors that stand for "v".
PREDICTION_NOTES = ("sfumato.prediction", "modelspec.prediction_type", "modelspec.predict_type", "prediction_type")
V_MARKS = ("v_pred",)
GUESS = "the family"


@dataclass(frozen=True)
class Dialect:
    """One spelling of one component's names.

    anchor:    a name that each such file has, below one of `prefixes`.
    config:    the class of configurations that it spells.
    table:     the key map for a configuration.
    signature: what the shapes below the prefix say, comparable with `signature_of`.
    """

    part: str
    name: str
    anchor: str
    prefixes: tuple[str, ...]
    config: type
    table: Callable[[Any], KeyMap]
    signature: Callable[[Shapes, str], Signature]


@dataclass(frozen=True)
class Place:
    """Where a component stands in a file, and in which spelling."""

    dialect: Dialect
    prefix: str
    signature: Signature


@dataclass(frozen=True)
class Found:
    """What a file holds.

    places:      the components by name.
    preset:      the released model that they make, with the file's prediction; None when nothing matches.
    evidence:    where the prediction type was read.
    ema:         whether averaged weights of the U-Net are there, too.
    guessed:     whether nothing in the file says what the network predicts.
    kind:        which it is of the models that look alike, see `kinds`; None where nothing speaks for another.
    """

    places: Mapping[str, Place]
    preset: Preset | None
    evidence: str
    ema: bool
    guessed: bool = False
    kind: Kind | None = None


def plain_map(config: Any) -> KeyMap:
    """The folder layout itself: every name stands for itself."""
    names = network(config).state_dict()
    return KeyMap(tuple(Row((name,), name) for name in names))


def spells(dialect: Dialect, config: Any) -> bool:
    """Whether a configuration is of the kind that a dialect writes.

    Of the two kinds of CLIP towers, OpenCLIP's files spell those with the exact GELU.
    """
    if not isinstance(config, dialect.config):
        return False
    return dialect.name != "OpenCLIP" or (isinstance(config, CLIPTextConfig) and config.hidden_act == "gelu")


OLD_VAE = "diffusers up to 0.14"
WHOLE = ("model.diffusion_model.", "")  # in front of a denoiser's names
CLIP_TABLE = "embeddings.token_embedding.weight"
# In front of the names of each tower, in the layouts of whole models.
SD3_TOWERS = {TEXT: "text_encoders.clip_l.", TEXT_2: "text_encoders.clip_g.", TEXT_3: "text_encoders.t5xxl."}
CLIP_PREFIXES: Mapping[str, tuple[str, ...]] = {
    TEXT: (
        compvis.CLIP,
        "conditioner.embedders.0.transformer.",
        SD3_TOWERS[TEXT] + "transformer.",
        "text_encoder.",
        "",
    ),
    TEXT_2: (SD3_TOWERS[TEXT_2] + "transformer.", "text_encoder_2."),
}
OPENCLIP_PREFIXES: Mapping[str, tuple[str, ...]] = {
    TEXT: (compvis.OPENCLIP, ""),
    TEXT_2: ("conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
}
T5_PREFIXES = (SD3_TOWERS[TEXT_3] + "transformer.", "text_encoder_3.", "")
DIALECTS: tuple[Dialect, ...] = (
    *(
        Dialect(DENOISER, name, anchor, prefixes, config, table, signature)
        for name, anchor, prefixes, config, table, signature in (
            ("CompVis", "input_blocks.0.0.weight", WHOLE, UNetConfig, compvis.unet_map, unet_compvis),
            (
                "diffusers",
                "down_blocks.0.resnets.0.conv1.weight",
                ("unet.", ""),
                UNetConfig,
                plain_map,
                unet_folder,
            ),
            (
                "Stability",
                "joint_blocks.0.x_block.attn.qkv.weight",
                WHOLE,
                MMDiTConfig,
                sd3.mmdit_map,
                mmdit_original,
            ),
            (
                "diffusers",
                "transformer_blocks.0.attn.add_q_proj.weight",
                ("transformer.", ""),
                MMDiTConfig,
                plain_map,
                mmdit_folder,
            ),
        )
    ),
    *(
        Dialect(VAE, name, anchor, ("first_stage_model.", "vae.", ""), config, table, signature)
        for name, anchor, table, signature in (
            ("CompVis", "encoder.down.0.block.0.conv1.weight", compvis.vae_map, vae_compvis),
            (OLD_VAE, "encoder.mid_block.attentions.0.query.weight", compvis.old_attention_map, vae_folder),
            ("diffusers", "encoder.down_blocks.0.resnets.0.conv1.weight", plain_map, vae_folder),
        )
        for config in (AutoencoderConfig, VQConfig)
    ),
    Dialect(
        VAE, "diffusers", "decoder.layers.0.weight", ("first_stage_model.", "vae.", ""), TinyConfig, plain_map, vae_tiny
    ),
    *(
        Dialect(part, name, anchor, prefixes[part], CLIPTextConfig, table, table_of(tokens))
        for name, anchor, tokens, prefixes, table in (
            ("CLIP", f"text_model.{CLIP_TABLE}", f"text_model.{CLIP_TABLE}", CLIP_PREFIXES, compvis.clip_map),
            ("CLIP, names cut short", CLIP_TABLE, CLIP_TABLE, CLIP_PREFIXES, compvis.bare_clip_map),
            (
                "OpenCLIP",
                "transformer.resblocks.0.attn.in_proj_weight",
                "token_embedding.weight",
                OPENCLIP_PREFIXES,
                compvis.openclip_map,
            ),
        )
        for part in (TEXT, TEXT_2)
    ),
    *(
        Dialect(part, name, anchor, prefixes, config, table, table_of(anchor))
        for part, name, anchor, prefixes, config, table in (
            (TEXT, "x-transformers", "token_emb.weight", (compvis.BERT,), LDMBertConfig, compvis.bert_map),
            (TEXT, "class table", "embedding.weight", (compvis.CLASSES,), ClassEmbedderConfig, compvis.classes_map),
            (TEXT_3, "T5", "shared.weight", T5_PREFIXES, T5Config, t5.t5_map),
            (TEXT_3, "T5 of llama.cpp", "token_embd.weight", ("",), T5Config, t5.ggml_map),
        )
    ),
    Dialect(
        DEPTH,
        "MiDaS",
        "pretrained.model.cls_token",
        ("depth_model.model.",),
        DPTConfig,
        dpt.midas_map,
        depth_midas,
    ),
)


def home_of(preset: Preset, part: str, config: Any) -> tuple[Dialect, str]:
    """How a component is spelled in one file that holds the whole model, as it was published, and behind what.

    Raises ValueError for a component that no such file has.
    """
    prefix = ""
    if isinstance(preset.denoiser, MMDiTConfig) and part in SD3_TOWERS:
        prefix = f"{SD3_TOWERS[part]}transformer."
    elif isinstance(config, CLIPTextConfig):
        kind = "model." if config.hidden_act == "gelu" else "transformer."
        number = int(part == TEXT_2 and preset.text is not None)
        prefix = f"cond_stage_model.{kind}" if preset.text_2 is None else f"conditioner.embedders.{number}.{kind}"
    for dialect in DIALECTS:
        if dialect.part == part and spells(dialect, config) and (not prefix or prefix in dialect.prefixes):
            return dialect, prefix or dialect.prefixes[0]
    raise ValueError(f"no file in the original layout has such a {part} ({signature_of(config)}); write a folder")


def places(infos: Shapes) -> dict[str, Place]:
    """The components of a file by name: the first dialect and prefix whose anchor is there."""
    found: dict[str, Place] = {}
    for dialect in DIALECTS:
        vq = dialect.config is VQConfig
        for prefix in dialect.prefixes:
            if dialect.part in found or prefix + dialect.anchor not in infos:
                continue
            if dialect.part == VAE and vq != (prefix + "quantize.embedding.weight" in infos):
                continue
            found[dialect.part] = Place(dialect, prefix, dialect.signature(infos, prefix))
    return found


def identify(weights: Weights, prediction: str | None = None, presets: Sequence[Preset] = SINGLE) -> Found:
    """Say what a file holds.

    prediction: overrides what the file or the family says.
    presets:    the models to compare with, the likelier first where two look the same.
    Raises ValueError for an unknown prediction.
    """
    there = places(weights.infos)
    known = fitting(there, presets)
    wanted, evidence = _prediction(weights, known, prediction)
    same = [p for p in known if p.prediction == wanted]
    preset = same[0] if same else known[0].predicting(wanted) if known and wanted else None
    averages = any(name.startswith(EMA) for name in weights.infos)
    return Found(there, preset, evidence, averages, evidence.startswith(GUESS))


def fitting(there: Mapping[str, Place], presets: Sequence[Preset]) -> list[Preset]:
    """Those of some presets whose components have the shapes of these."""
    return [p for p in presets if there and all(_fits(p, place) for place in there.values())]


def label(place: Place) -> str:
    """What people call a component: the denoiser is a unet or a transformer."""
    if place.dialect.part != DENOISER:
        return place.dialect.part
    return "unet" if place.dialect.config is UNetConfig else "transformer"


def config_of(preset: Preset, part: str) -> DenoiserConfig | VAEConfig | TextConfig | DPTConfig | None:
    """A preset's configuration of one component."""
    if part in TOWERS:
        return text_of(preset, part)
    return {DENOISER: preset.denoiser, VAE: preset.vae, DEPTH: preset.depth}[part]


def text_of(preset: Preset, part: str) -> TextConfig | None:
    """A preset's configuration of one text tower."""
    return (preset.text, preset.text_2, preset.text_3)[TOWERS.index(part)]


def _fits(preset: Preset, place: Place) -> bool:
    config = config_of(preset, place.dialect.part)
    return spells(place.dialect, config) and signature_of(config) == place.signature


def _prediction(weights: Weights, fitting: Sequence[Preset], asked: str | None) -> tuple[str | None, str]:
    """The prediction type and where it was read; None where nothing fits."""
    if asked is not None:
        return get_prediction(asked).name, "as asked"
    for note in PREDICTION_NOTES:
        if note in weights.metadata:
            kind = weights.metadata[note].lower()
            return get_prediction({"v-prediction": "v", "vpred": "v"}.get(kind, kind)).name, f"the file's {note}"
    for mark in V_MARKS:
        if mark in weights.infos:
            return "v_prediction", f"the file's mark {mark!r}"
    kinds = dict.fromkeys(p.prediction for p in fitting)
    if len(kinds) > 1 and weights.metadata.get("global_step") in BASE_STEPS:
        return "epsilon", f"the file's global_step {weights.metadata['global_step']}"
    if not kinds:
        return None, "nothing"
    first = next(iter(kinds))
    others = " or ".join(kind for kind in kinds if kind != first)
    doubt = f"; {others} looks the same, --prediction says which" if others else ""
    return first, f"{GUESS}{doubt}"
