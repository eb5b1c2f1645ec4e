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
from sfumato.models.mmdit import MMDiTConfig
from sfumato.models.t5 import T5Config
from sfumato.presets import SINGLE, Preset
from sfumato.text.standard import bert_tokenizer, clip_tokenizer
from sfumato.text.t5 import T5Tokenizer, read_sentencepiece, unigram
from sfumato.weights.parts import NETWORKS, Components
from sfumato.weights.single import unprojected

from ..text.test_t5 import spiece

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
    texts = {name: tiny_text(getattr(preset, name)) for name in ("text", "text_2", "text_3")}
    vae = replace(
        preset.vae,
        block_out_channels=(16,) * len(preset.vae.block_out_channels),
        norm_num_groups=4,
        **({"num_vq_embeddings": 64} if hasattr(preset.vae, "num_vq_embeddings") else {}),
    )
    if isinstance(preset.denoiser, MMDiTConfig):
        return replace(preset, denoiser=tiny_mmdit(preset.denoiser), vae=vae, **texts)
    levels = len(preset.denoiser.block_out_channels)
    context = preset.denoiser.cross_attention_dim // WIDTH if preset.denoiser.has_cross_attention else 1280
    unet = replace(
        preset.denoiser,
        block_out_channels=(WIDTH,) * (levels - 1) + (2 * WIDTH,),
        cross_attention_dim=context,
        attention_head_dim=preset.denoiser.attention_head_dim if not preset.denoiser.has_cross_attention else 2,
        norm_num_groups=8,
    )
    told = preset.denoiser.projection_class_embeddings_input_dim
    if told is not None:  # the vector of the text, and numbers
        numbers = (told - 1280) // 256
        deep = isinstance(preset.denoiser.transformer_layers_per_block, tuple)
        unet = replace(
            unet,
            transformer_layers_per_block=(1, 1, 2) if deep else 1,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=1280 // WIDTH + 8 * numbers,
        )
    depth = None if preset.depth is None else TINY_DEPTH
    return replace(preset, denoiser=unet, vae=vae, depth=depth, **texts)


def tiny_mmdit(config: MMDiTConfig) -> MMDiTConfig:
    heads = config.num_attention_heads // 6
    return replace(
        config,
        sample_size=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=heads,
        joint_attention_dim=config.joint_attention_dim // WIDTH,
        caption_projection_dim=8 * heads,
        pooled_projection_dim=config.pooled_projection_dim // WIDTH,
        pos_embed_max_size=config.pos_embed_max_size // 16,
        dual_attention_layers=config.dual_attention_layers[:2],
    )


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
    if isinstance(text, T5Config):
        return replace(text, vocab_size=160, d_model=text.d_model // WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
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
    """Random networks for a preset, with its tokenizers and schedulers."""
    texts = (preset.text, preset.text_2, preset.text_3)
    towers = [None if text is None else build(text, seed + 2 + 10 * i) for i, text in enumerate(texts)]
    if unprojected(preset.text):
        nn.init.eye_(towers[0].text_projection.weight)  # as released; files leave it out
    tokenizers = [public_tokenizer(text) for text in texts]
    low_res = preset.low_res_scheduler
    return Components(
        denoiser=build(preset.denoiser, seed),
        vae=build(preset.vae, seed + 1),
        text_encoder=towers[0],
        tokenizer=tokenizers[0],
        scheduler=Scheduler.from_config(preset.scheduler),
        low_res_scheduler=None if low_res is None else Scheduler.from_config(low_res),
        pipeline=preset.pipeline,
        depth_estimator=None if preset.depth is None else build(preset.depth, seed + 3),
        text_encoder_2=towers[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=towers[2],
        tokenizer_3=tokenizers[2],
        force_zeros_for_empty_prompt=preset.force_zeros_for_empty_prompt,
    )


def public_tokenizer(text: Any) -> Any:
    if isinstance(text, CLIPTextConfig):
        return clip_tokenizer("!") if text.hidden_act == "gelu" else clip_tokenizer()
    if isinstance(text, T5Config):
        return T5Tokenizer(unigram(read_sentencepiece(spiece(), "spiece.model")))
    return bert_tokenizer() if isinstance(text, LDMBertConfig) else None


RELEASED = tuple(p for p in SINGLE if p.name not in ("mini", "mmdit-mini"))
TINY = {p.name: tiny(p) for p in RELEASED}
