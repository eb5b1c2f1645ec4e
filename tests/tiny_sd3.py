"""Stable Diffusion 3 so small that it runs at once: random parts in the shapes of its variants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sfumato.diffusion.named_flow import FlowMatchEulerDiscreteScheduler
from sfumato.models.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.models.clip import CLIPTextModel
from sfumato.models.mmdit import MMDiT, MMDiTConfig
from sfumato.models.t5 import T5Config, T5EncoderModel
from sfumato.text.t5 import T5Tokenizer, read_sentencepiece, unigram
from sfumato.text.tokenizer import train_vocabulary
from sfumato.weights.parts import Components

from .models.parity import scramble
from .text.test_t5 import spiece
from .tiny_clip import tiny_clip

TEXTS = ("a red apple on a blue background, 3d style", "two green frogs", "a cat left of a red car") * 3
LENGTH = 16
VARIANTS: dict[str, dict[str, Any]] = {
    "sd3": {},
    "sd3.5-medium": {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
    "sd3.5-large": {"qk_norm": "rms_norm"},
}


def tiny_sd3(variant: str = "sd3", t5: bool = True, seed: int = 0, **schedule: Any) -> Components:
    """The parts of a variant, with T5 or without it; pictures of 64x64. schedule: options of the scheduler."""
    torch.manual_seed(seed)
    tokenizer = train_vocabulary(TEXTS, size=540, max_length=LENGTH)
    text = replace(tiny_clip(tokenizer, 16, layers=3), projected=True)
    second = replace(text, hidden_size=24, intermediate_size=48, hidden_act="gelu", projection_dim=24)
    third = T5Config(vocab_size=160, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    transformer = MMDiTConfig(
        sample_size=16,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=40,
        pos_embed_max_size=12,
    )
    vae = AutoencoderConfig(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        latent_channels=16,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )
    net = MMDiT(replace(transformer, **VARIANTS[variant])).eval()
    scramble(net, seed)
    encoder = T5EncoderModel(third).eval()
    reader = T5Tokenizer(unigram(read_sentencepiece(spiece(), "spiece.model")))
    return Components(
        denoiser=net,
        vae=AutoencoderKL(vae).eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **schedule}),
        pipeline="StableDiffusion3Pipeline",
        text_encoder_2=CLIPTextModel(second).eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=encoder if t5 else None,
        tokenizer_3=reader if t5 else None,
    )
