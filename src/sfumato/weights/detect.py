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
from sfumato.models.dpt import STATES, DPTConfig
from sfumato.models.unet import UNetConfig
from sfumato.models.vq import VQConfig
from sfumato.presets import SINGLE, DenoiserConfig, Preset, TextConfig, VAEConfig
from sfumato.weights import compvis, dpt
from sfumato.weights.keymap import KeyMap, Row
from sfumato.weights.parts import network
from sfumato.weights.source import Info, Weights

UNET, VAE, TEXT, DEPTH = "unet", "vae", "text_encoder", "depth_estimator"
PARTS = (UNET, VAE, TEXT, DEPTH)
EMA = "model_ema."
# How many steps the two 512-pixel models of the Stable Diffusion 2 kind had been trained when they were published;
# their weights look like those of the 768-pixel ones, which predict v.
BASE_STEPS = ("875000", "220000")
# Names under which programs note the prediction type in a file's metadata, and tensors that stand for "v".
PREDICTION_NOTES = ("sfumato.prediction", "modelspec.prediction_type", "modelspec.predict_type", "prediction_type")
V_MARKS = ("v_pred",)
Shapes = Mapping[str, Info]
Signature = tuple[Any, ...]


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
    """

    places: Mapping[str, Place]
    preset: Preset | None
    evidence: str
    ema: bool


def plain_map(config: Any) -> KeyMap:
    """The folder layout itself: every name stands for itself."""
    names = network(config).state_dict()
    return KeyMap(tuple(Row((name,), name) for name in names))


def unet_compvis(infos: Shapes, prefix: str) -> Signature:
    """Input channels, channels of the finest level, width of the context, number of class labels."""
    return _unet(infos, prefix, "input_blocks.0.0.weight", "label_emb.weight")


def unet_folder(infos: Shapes, prefix: str) -> Signature:
    """The same in the folder layout."""
    return _unet(infos, prefix, "conv_in.weight", "class_embedding.weight")


def _unet(infos: Shapes, prefix: str, first: str, labels: str) -> Signature:
    channels, inputs = infos[prefix + first].shape[:2]
    context = next(
        (i.shape[-1] for n, i in infos.items() if n.startswith(prefix) and n.endswith("attn2.to_k.weight")), None
    )
    rows = infos[prefix + labels].shape[0] if prefix + labels in infos else None
    return inputs, channels, context, rows


def vae_compvis(infos: Shapes, prefix: str) -> Signature:
    """Kind, latent channels, channels of the finest level, levels."""
    return _vae(infos, prefix, "encoder.down.{}.block.0.norm1.weight")


def vae_folder(infos: Shapes, prefix: str) -> Signature:
    """The same in the folder layout."""
    return _vae(infos, prefix, "encoder.down_blocks.{}.resnets.0.norm1.weight")


def _vae(infos: Shapes, prefix: str, level: str) -> Signature:
    codes = infos.get(prefix + "quantize.embedding.weight")
    latent = infos[prefix + "decoder.conv_in.weight"].shape[1]
    levels = 0
    while prefix + level.format(levels) in infos:
        levels += 1
    return "KL" if codes is None else "VQ", latent, infos[prefix + "encoder.conv_in.weight"].shape[0], levels


def depth_midas(infos: Shapes, prefix: str) -> Signature:
    """Width, number of tokens, channels of the states that are fused."""
    model = f"{prefix}pretrained.model"
    states = (infos.get(f"{prefix}scratch.layer{i + 1}_rn.weight") for i in range(STATES))
    tokens = infos.get(f"{model}.pos_embed")
    return (
        infos[f"{model}.cls_token"].shape[-1],
        None if tokens is None else tokens.shape[1],
        tuple(state.shape[1] for state in states if state is not None),
    )


def table_of(name: str) -> Callable[[Shapes, str], Signature]:
    """The signature of a text tower: the size (rows, width) of its table of embeddings."""
    return lambda infos, prefix: tuple(infos[prefix + name].shape)


def signature_of(config: Any) -> Signature:
    """What `Dialect.signature` gives for a component of this configuration."""
    if isinstance(config, UNetConfig):
        context = config.cross_attention_dim if config.has_cross_attention else None
        return config.in_channels, config.block_out_channels[0], context, config.num_class_embeds
    if isinstance(config, AutoencoderConfig | VQConfig):
        kind = "VQ" if isinstance(config, VQConfig) else "KL"
        return kind, config.latent_channels, config.block_out_channels[0], len(config.block_out_channels)
    if isinstance(config, CLIPTextConfig):
        return config.vocab_size, config.hidden_size
    if isinstance(config, LDMBertConfig):
        return config.vocab_size, config.d_model
    if isinstance(config, ClassEmbedderConfig):
        return config.num_classes, config.embed_dim
    if isinstance(config, DPTConfig):
        return config.hidden_size, 1 + config.grid**2, config.neck_hidden_sizes
    raise TypeError(f"{type(config).__name__} is no configuration of a known network")


def spells(dialect: Dialect, config: Any) -> bool:
    """Whether a configuration is of the kind that a dialect writes.

    Of the two kinds of CLIP towers, OpenCLIP's files spell those with the exact GELU.
    """
    if not isinstance(config, dialect.config):
        return False
    return dialect.name != "OpenCLIP" or (isinstance(config, CLIPTextConfig) and config.hidden_act == "gelu")


OLD_VAE = "diffusers up to 0.14"
CLIP_TABLE = "embeddings.token_embedding.weight"
DIALECTS: tuple[Dialect, ...] = (
    Dialect(
        UNET,
        "CompVis",
        "input_blocks.0.0.weight",
        ("model.diffusion_model.", ""),
        UNetConfig,
        compvis.unet_map,
        unet_compvis,
    ),
    Dialect(
        UNET,
        "diffusers",
        "down_blocks.0.resnets.0.conv1.weight",
        ("unet.", ""),
        UNetConfig,
        plain_map,
        unet_folder,
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
        TEXT,
        "CLIP",
        f"text_model.{CLIP_TABLE}",
        ("cond_stage_model.transformer.", "text_encoder.", ""),
        CLIPTextConfig,
        compvis.clip_map,
        table_of(f"text_model.{CLIP_TABLE}"),
    ),
    Dialect(
        TEXT,
        "CLIP, names cut short",
        CLIP_TABLE,
        ("cond_stage_model.transformer.", "text_encoder.", ""),
        CLIPTextConfig,
        compvis.bare_clip_map,
        table_of(CLIP_TABLE),
    ),
    Dialect(
        TEXT,
        "OpenCLIP",
        "transformer.resblocks.0.attn.in_proj_weight",
        ("cond_stage_model.model.",),
        CLIPTextConfig,
        compvis.openclip_map,
        table_of("token_embedding.weight"),
    ),
    Dialect(
        TEXT,
        "x-transformers",
        "token_emb.weight",
        ("cond_stage_model.transformer.",),
        LDMBertConfig,
        compvis.bert_map,
        table_of("token_emb.weight"),
    ),
    Dialect(
        TEXT,
        "class table",
        "embedding.weight",
        ("cond_stage_model.",),
        ClassEmbedderConfig,
        compvis.classes_map,
        table_of("embedding.weight"),
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
    fitting = [p for p in presets if there and all(_fits(p, place) for place in there.values())]
    wanted, evidence = _prediction(weights, fitting, prediction)
    same = [p for p in fitting if p.prediction == wanted]
    preset = same[0] if same else fitting[0].predicting(wanted) if fitting and wanted else None
    return Found(there, preset, evidence, any(name.startswith(EMA) for name in weights.infos))


def config_of(preset: Preset, part: str) -> DenoiserConfig | VAEConfig | TextConfig | DPTConfig | None:
    """A preset's configuration of one component."""
    return {UNET: preset.denoiser, VAE: preset.vae, TEXT: preset.text, DEPTH: preset.depth}[part]


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
    return first, f"the family{doubt}"
