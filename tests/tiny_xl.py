"""Stable Diffusion XL so small that it runs at once: random parts in the shape of the base model and its siblings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sfumato.diffusion import named
from sfumato.models.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.models.clip import CLIPTextModel
from sfumato.models.unet import UNet, UNetConfig
from sfumato.text.tokenizer import train_vocabulary
from sfumato.weights.parts import Components

from .tiny_clip import tiny_clip

TEXTS = ("a red apple on a blue background, 3d style", "two green frogs", "a cat left of a red car") * 3
LENGTH = 16
# What is different in each class: the U-Net's entries.
REFINER = {"cross_attention_dim": 24, "projection_class_embeddings_input_dim": 24 + 5 * 8}
TINY_XL: dict[str, dict[str, Any]] = {
    "StableDiffusionXLPipeline": {},
    "StableDiffusionXLImg2ImgPipeline": REFINER,
    "StableDiffusionXLInpaintPipeline": {"in_channels": 9},
}


def tiny_xl(family: str = "StableDiffusionXLPipeline", seed: int = 0) -> Components:
    """The parts of a class: base model, refiner, inpainting model; pictures of 32x32."""
    torch.manual_seed(seed)
    tokenizer = train_vocabulary(TEXTS, size=540, max_length=LENGTH)
    text = tiny_clip(tokenizer, 16, layers=3)
    second = replace(text, hidden_size=24, intermediate_size=48, hidden_act="gelu", projection_dim=24, projected=True)
    unet = UNetConfig(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=40,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    vae = AutoencoderConfig(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.13025,
        force_upcast=True,
    )
    scheduler = named.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    refines = TINY_XL[family] is REFINER
    return Components(
        denoiser=UNet(replace(unet, **TINY_XL[family])).eval(),
        vae=AutoencoderKL(vae).eval(),
        text_encoder=None if refines else CLIPTextModel(text).eval(),
        tokenizer=None if refines else tokenizer,
        scheduler=scheduler,
        pipeline=family,
        text_encoder_2=CLIPTextModel(second).eval(),
        tokenizer_2=tokenizer,
        force_zeros_for_empty_prompt=not refines,
    )
