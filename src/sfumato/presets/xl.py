"""Stable Diffusion XL (Podell et al. 2023): https://github.com/Stability-AI/generative-models, and what was made of it.

The distilled models have the base model's shapes, see `alike`.
"""

from __future__ import annotations

from dataclasses import replace

from sfumato.models.clip import CLIPTextConfig
from sfumato.models.unet import UNetConfig
from sfumato.presets.base import Preset, frozen
from sfumato.presets.classic import CLIP_L, SD_SCHEDULE, SD_VAE

OPENCLIP_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
    bos_token_id=0,
    eos_token_id=2,
    projected=True,
)
XL_SCHEDULE = frozen(
    {name: value for name, value in SD_SCHEDULE.items() if name not in ("set_alpha_to_one", "skip_prk_steps")},
    _class_name="EulerDiscreteScheduler",
    timestep_spacing="leading",
)
XL_UNET = UNetConfig(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
SDXL = Preset(
    name="sdxl",
    title="Stable Diffusion XL",
    pipeline="StableDiffusionXLPipeline",
    task="text",
    denoiser=XL_UNET,
    vae=replace(SD_VAE, sample_size=1024, scaling_factor=0.13025, force_upcast=True),
    text=CLIP_L,
    text_2=OPENCLIP_G,
    scheduler=XL_SCHEDULE,
    width=1024,
    height=1024,
    guidance_scale=5.0,
    force_zeros_for_empty_prompt=True,
)
SDXL_INPAINT = replace(
    SDXL,
    name="sdxl-inpaint",
    title="Stable Diffusion XL inpainting",
    pipeline="StableDiffusionXLInpaintPipeline",
    task="inpaint",
    denoiser=replace(SDXL.denoiser, in_channels=9),
)
SDXL_REFINER = replace(
    SDXL,
    name="sdxl-refiner",
    title="Stable Diffusion XL refiner",
    pipeline="StableDiffusionXLImg2ImgPipeline",
    denoiser=replace(
        XL_UNET,
        block_out_channels=(384, 768, 1536, 1536),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=1280,
        transformer_layers_per_block=4,
        attention_head_dim=(6, 12, 24, 24),
        projection_class_embeddings_input_dim=2560,
    ),
    text=None,
    force_zeros_for_empty_prompt=False,
)
# Few steps and no guidance: Turbo (Sauer et al. 2023), Lightning (Lin et al. 2024), LCM (Luo et al. 2023) and Hyper
# (Ren et al. 2024), whose steps are those of trajectory consistency models.
SDXL_TURBO = replace(
    SDXL,
    name="sdxl-turbo",
    like="sdxl",
    title="Stable Diffusion XL Turbo",
    scheduler=frozen(XL_SCHEDULE, _class_name="EulerAncestralDiscreteScheduler", timestep_spacing="trailing"),
    width=512,
    height=512,
    num_inference_steps=1,
    guidance_scale=1.0,
    sampler="euler_a",
)
SDXL_LIGHTNING = replace(
    SDXL,
    name="sdxl-lightning",
    like="sdxl",
    title="Stable Diffusion XL Lightning",
    scheduler=frozen(XL_SCHEDULE, timestep_spacing="trailing"),
    num_inference_steps=4,
    guidance_scale=1.0,
    sampler="euler",
)
SDXL_LCM = replace(
    SDXL,
    name="sdxl-lcm",
    like="sdxl",
    title="Stable Diffusion XL LCM",
    scheduler=frozen(SD_SCHEDULE, _class_name="LCMScheduler"),
    num_inference_steps=4,
    guidance_scale=1.0,
    sampler="lcm",
)
SDXL_HYPER = replace(
    SDXL_LCM,
    name="sdxl-hyper",
    title="Hyper Stable Diffusion XL",
    scheduler=frozen(SD_SCHEDULE, _class_name="TCDScheduler"),
    num_inference_steps=8,
    sampler="tcd",
)
XL = (SDXL, SDXL_INPAINT, SDXL_REFINER, SDXL_TURBO, SDXL_LIGHTNING, SDXL_LCM, SDXL_HYPER)
