"""What the shapes of a component say of it: a signature that a configuration gives as well as a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.bert import LDMBertConfig
from sfumato.models.classes import ClassEmbedderConfig
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.dpt import STATES, DPTConfig
from sfumato.models.mmdit import MMDiTConfig
from sfumato.models.t5 import T5Config
from sfumato.models.tiny import TinyConfig
from sfumato.models.unet import UNetConfig
from sfumato.models.vq import VQConfig
from sfumato.weights.source import Info

Shapes = Mapping[str, Info]
Signature = tuple[Any, ...]


def unet_compvis(infos: Shapes, prefix: str) -> Signature:
    """Input channels, channels of the finest level, widths of context and added vector, number of class labels."""
    return _unet(infos, prefix, "input_blocks.0.0.weight", "label_emb.0.0.weight", "label_emb.weight")


def unet_folder(infos: Shapes, prefix: str) -> Signature:
    """The same in the folder layout."""
    return _unet(infos, prefix, "conv_in.weight", "add_embedding.linear_1.weight", "class_embedding.weight")


def _unet(infos: Shapes, prefix: str, first: str, added: str, labels: str) -> Signature:
    channels, inputs = infos[prefix + first].shape[:2]
    context = next(
        (i.shape[-1] for n, i in infos.items() if n.startswith(prefix) and n.endswith("attn2.to_k.weight")), None
    )
    vector = infos[prefix + added].shape[1] if prefix + added in infos else None
    rows = infos[prefix + labels].shape[0] if prefix + labels in infos else None
    return inputs, channels, context, vector, rows


def mmdit_original(infos: Shapes, prefix: str) -> Signature:
    """Input channels, width, widths of context and pooled text, places, blocks, those of dual attention, norms."""
    names = ("x_embedder.proj.weight", "context_embedder.weight", "y_embedder.mlp.0.weight", "pos_embed")
    block = prefix + "joint_blocks.{}.x_block."
    return _mmdit(
        infos, prefix, names, (block + "mlp.fc1.bias", block + "attn2.qkv.weight", block + "attn.ln_q.weight")
    )


def mmdit_folder(infos: Shapes, prefix: str) -> Signature:
    """The same in the folder layout."""
    text = "time_text_embed.text_embedder.linear_1.weight"
    names = ("pos_embed.proj.weight", "context_embedder.weight", text, "pos_embed.pos_embed")
    block = prefix + "transformer_blocks.{}."
    parts = (block + "ff.net.0.proj.bias", block + "attn2.to_q.weight", block + "attn.norm_q.weight")
    return _mmdit(infos, prefix, names, parts)


def _mmdit(infos: Shapes, prefix: str, names: tuple[str, ...], parts: tuple[str, str, str]) -> Signature:
    first, context, pooled, places = (infos[prefix + name].shape for name in names)
    block, dual, norm = parts
    depth = 0
    while block.format(depth) in infos:
        depth += 1
    dualists = tuple(i for i in range(depth) if dual.format(i) in infos)
    return first[1], first[0], context[1], pooled[1], places[1], depth, dualists, norm.format(0) in infos


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


def vae_tiny(infos: Shapes, prefix: str) -> Signature:
    """Latent channels and width of a tiny autoencoder."""
    width, latent = infos[f"{prefix}decoder.layers.0.weight"].shape[:2]
    return "tiny", latent, width


def table_of(name: str) -> Callable[[Shapes, str], Signature]:
    """The signature of a text tower: the size (rows, width) of its table of embeddings."""
    return lambda infos, prefix: tuple(infos[prefix + name].shape)


def signature_of(config: Any) -> Signature:
    """What `Dialect.signature` gives for a component of this configuration."""
    if isinstance(config, UNetConfig):
        context = config.cross_attention_dim if config.has_cross_attention else None
        added = config.projection_class_embeddings_input_dim
        return config.in_channels, config.block_out_channels[0], context, added, config.num_class_embeds
    if isinstance(config, MMDiTConfig):
        texts, places = (config.joint_attention_dim, config.pooled_projection_dim), config.pos_embed_max_size**2
        blocks = config.num_layers, config.dual_attention_layers, config.qk_norm is not None
        return config.in_channels, config.width, *texts, places, *blocks
    if isinstance(config, AutoencoderConfig | VQConfig):
        kind = "VQ" if isinstance(config, VQConfig) else "KL"
        return kind, config.latent_channels, config.block_out_channels[0], len(config.block_out_channels)
    if isinstance(config, TinyConfig):
        return "tiny", config.latent_channels, config.decoder_block_out_channels[0]
    if isinstance(config, CLIPTextConfig):
        return config.vocab_size, config.hidden_size
    if isinstance(config, LDMBertConfig | T5Config):
        return config.vocab_size, config.d_model
    if isinstance(config, ClassEmbedderConfig):
        return config.num_classes, config.embed_dim
    if isinstance(config, DPTConfig):
        return config.hidden_size, 1 + config.grid**2, config.neck_hidden_sizes
    raise TypeError(f"{type(config).__name__} is no configuration of a known network")
