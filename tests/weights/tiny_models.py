"""Every released model at a size for tests: the same blocks and names, narrow layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sfumato.diffusion.scheduler import Scheduler
from sfumato.models.bert import LDMBertConfig
from sfumato.models.bit import BitConfig
from sfumato.models.classes import ClassEmbedderConfig
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.dpt import DPTConfig
from sfumato.presets import SINGLE, Preset
from sfumato.text.standard import bert_tokenizer, clip_tokenizer
from sfumato.weights.parts import NETWORKS, Components

WIDTH = 32
TINY_DEPTH = DPTConfig(
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=64,
    backbone_out_indices=(0, 1, 2, 3),
    reassemble_factors=(1, 1, 1, 0.5),
    neck_hidden_sizes=(32, 64, 24, 40),
    fusion_hidden_size=16,
    backbone_config=BitConfig(embedding_size=16, hidden_sizes=(32, 64, 96), depths=(1, 1, 1), num_groups=4),
)


def tiny(preset: Preset) -> Preset:
    """The preset with narrow networks; the numbers of levels, blocks, channels in and out, and labels stay.

    Text states shrink by a common factor, so that the families stay apart.
    """
    levels = len(preset.denoiser.block_out_channels)
    context = preset.denoiser.cross_attention_dim // WIDTH if preset.denoiser.has_cross_attention else 1280
    unet = replace(
        preset.denoiser,
        block_out_channels=(WIDTH,) * (levels - 1) + (2 * WIDTH,),
        cross_attention_dim=context,
        attention_head_dim=preset.denoiser.attention_head_dim if not preset.denoiser.has_cross_attention else 2,
        norm_num_groups=8,
    )
    vae = replace(
        preset.vae,
        block_out_channels=(16,) * len(preset.vae.block_out_channels),
        norm_num_groups=4,
        **({"num_vq_embeddings": 64} if hasattr(preset.vae, "num_vq_embeddings") else {}),
    )
    depth = None if preset.depth is None else TINY_DEPTH
    return replace(preset, denoiser=unet, vae=vae, text=tiny_text(preset.text), depth=depth)


def tiny_text(text: Any) -> Any:
    if isinstance(text, CLIPTextConfig):
        width = text.hidden_size // WIDTH
        return replace(
            text,
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=width,
        )
    if isinstance(text, LDMBertConfig):
        return replace(
            text,
            d_model=text.d_model // WIDTH,
            encoder_layers=2,
            encoder_ffn_dim=64,
            encoder_attention_heads=2,
            head_dim=16,
        )
    if isinstance(text, ClassEmbedderConfig):
        return replace(text, embed_dim=text.embed_dim // WIDTH)
    return None


def build(config: Any, seed: int) -> Any:
    """A random network, norms and biases random, too."""
    network = NETWORKS[type(config)](config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5))
    assert isinstance(network, nn.Module)
    return network


def random_parts(preset: Preset, seed: int = 0) -> Components:
    """Random networks for a preset, with its tokeniser and schedulers."""
    text = preset.text
    tokenizer: Any = None
    if isinstance(text, CLIPTextConfig):
        tokenizer = clip_tokenizer("!") if text.hidden_act == "gelu" else clip_tokenizer()
    elif isinstance(text, LDMBertConfig):
        tokenizer = bert_tokenizer()
    low_res = preset.low_res_scheduler
    return Components(
        denoiser=build(preset.denoiser, seed),
        vae=build(preset.vae, seed + 1),
        text_encoder=None if text is None else build(text, seed + 2),
        tokenizer=tokenizer,
        scheduler=Scheduler.from_config(preset.scheduler),
        low_res_scheduler=None if low_res is None else Scheduler.from_config(low_res),
        pipeline=preset.pipeline,
        depth_estimator=None if preset.depth is None else build(preset.depth, seed + 3),
    )


RELEASED = tuple(p for p in SINGLE if p.name != "mini")
TINY = {p.name: tiny(p) for p in RELEASED}
