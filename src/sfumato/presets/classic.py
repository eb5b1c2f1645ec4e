"""Stable Diffusion 1.x and 2.x, and latent diffusion before them."""

from __future__ import annotations

from dataclasses import replace

from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.bert import LDMBertConfig
from sfumato.models.classes import ClassEmbedderConfig
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.dpt import DPT_HYBRID
from sfumato.models.unet import UNetConfig
from sfumato.models.vq import VQConfig
from sfumato.presets.base import Preset, frozen

# Stable Diffusion 1.x: https://github.com/CompVis/stable-diffusion, configs/stable-diffusion/v1-inference.yaml,
# and the model folders that were published with it.

SD_SCHEDULE = frozen(
    {
        "_class_name": "PNDMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
)
# The later folders name DDIM, which is told not to clip latents.
V_SCHEDULE = frozen(
    {name: value for name, value in SD_SCHEDULE.items() if name != "skip_prk_steps"},
    _class_name="DDIMScheduler",
    clip_sample=False,
    prediction_type="v_prediction",
)
SD_VAE = AutoencoderConfig(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    sample_size=512,
    force_upcast=False,
)
CLIP_L = CLIPTextConfig(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=768,
    bos_token_id=0,
    eos_token_id=2,  # as in the published folders: "the largest id"
)
SD15 = Preset(
    name="sd15",
    title="Stable Diffusion 1.x",
    pipeline="StableDiffusionPipeline",
    task="text",
    denoiser=UNetConfig(sample_size=64, cross_attention_dim=768),
    vae=SD_VAE,
    text=CLIP_L,
    scheduler=SD_SCHEDULE,
    width=512,
    height=512,
)
SD15_INPAINT = replace(
    SD15,
    name="sd15-inpaint",
    title="Stable Diffusion 1.5 inpainting",
    pipeline="StableDiffusionInpaintPipeline",
    task="inpaint",
    denoiser=replace(SD15.denoiser, in_channels=9),
)
PIX2PIX = replace(
    SD15,
    name="pix2pix",
    title="InstructPix2Pix",
    pipeline="StableDiffusionInstructPix2PixPipeline",
    task="instruct",
    denoiser=replace(SD15.denoiser, in_channels=8),
    scheduler=frozen(
        {name: SD_SCHEDULE[name] for name in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")},
        _class_name="EulerAncestralDiscreteScheduler",
        prediction_type="epsilon",
        steps_offset=1,
    ),
    sampler="euler_a",
)
# Few steps without guidance: LCM (Luo et al. 2023) and Hyper (Ren et al. 2024).
SD15_LCM = replace(
    SD15,
    name="sd15-lcm",
    like="sd15",
    title="Stable Diffusion 1.x LCM",
    scheduler=frozen(SD_SCHEDULE, _class_name="LCMScheduler"),
    num_inference_steps=4,
    guidance_scale=1.0,
    sampler="lcm",
)
SD15_HYPER = replace(
    SD15_LCM,
    name="sd15-hyper",
    title="Hyper Stable Diffusion 1.x",
    scheduler=frozen(SD_SCHEDULE, _class_name="TCDScheduler"),
    num_inference_steps=8,
    sampler="tcd",
)

# Stable Diffusion 2.x: https://github.com/Stability-AI/stablediffusion, configs/stable-diffusion/v2-*.yaml.
# The weights do not tell 2.0 from 2.1, so attention is computed in float32 as 2.1 needs it in half precision.

OPENCLIP_H = CLIPTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,  # of 24: the last but one is read
    num_attention_heads=16,
    hidden_act="gelu",
    projection_dim=512,
    bos_token_id=0,
    eos_token_id=2,
)
SD21 = Preset(
    name="sd21",
    title="Stable Diffusion 2.x (768)",
    pipeline="StableDiffusionPipeline",
    task="text",
    denoiser=UNetConfig(
        sample_size=96,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
        upcast_attention=True,
    ),
    vae=replace(SD_VAE, sample_size=768),
    text=OPENCLIP_H,
    scheduler=V_SCHEDULE,
    width=768,
    height=768,
)
SD21_BASE = replace(
    SD21,
    name="sd21-base",
    title="Stable Diffusion 2.x base (512)",
    denoiser=replace(SD21.denoiser, sample_size=64),
    vae=SD_VAE,
    scheduler=SD_SCHEDULE,
    width=512,
    height=512,
)
SD_TURBO = replace(
    SD21_BASE,
    name="sd-turbo",
    like="sd21-base",
    title="Stable Diffusion 2.x Turbo",
    scheduler=frozen(SD_SCHEDULE, _class_name="EulerDiscreteScheduler", timestep_spacing="trailing"),
    num_inference_steps=1,
    guidance_scale=1.0,
    sampler="euler",
)
SD2_INPAINT = replace(
    SD21_BASE,
    name="sd2-inpaint",
    title="Stable Diffusion 2 inpainting",
    pipeline="StableDiffusionInpaintPipeline",
    task="inpaint",
    denoiser=replace(SD21_BASE.denoiser, in_channels=9),
)
SD2_DEPTH = replace(
    SD21_BASE,
    name="sd2-depth",
    title="Stable Diffusion 2 depth to image",
    pipeline="StableDiffusionDepth2ImgPipeline",
    task="depth",
    denoiser=replace(SD21_BASE.denoiser, in_channels=5),
    depth=DPT_HYBRID,
)
UPSCALER_SCHEDULE = frozen(V_SCHEDULE, beta_start=0.0001, beta_end=0.02)
UPSCALER = replace(
    SD21,
    name="x4-upscaler",
    title="Stable Diffusion x4 upscaler",
    pipeline="StableDiffusionUpscalePipeline",
    task="upscale",
    denoiser=UNetConfig(
        sample_size=128,
        in_channels=7,
        block_out_channels=(256, 512, 512, 1024),
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
        only_cross_attention=(True, True, True, False),
        cross_attention_dim=1024,
        attention_head_dim=8,
        use_linear_projection=True,
        num_class_embeds=1000,
    ),
    vae=replace(
        SD_VAE,
        block_out_channels=(128, 256, 512),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=256,
        scaling_factor=0.08333,
    ),
    scheduler=UPSCALER_SCHEDULE,
    low_res_scheduler=frozen(
        {name: UPSCALER_SCHEDULE[name] for name in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")},
        _class_name="DDPMScheduler",
    ),
    width=512,
    height=512,
    guidance_scale=9.0,
)

# Latent diffusion, the ancestors: https://github.com/CompVis/latent-diffusion, models/ldm/*/config.yaml and
# configs/latent-diffusion/{cin256-v2,txt2img-1p4B-eval}.yaml.

VQ_F4 = VQConfig(
    block_out_channels=(128, 256, 512),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=2,
    latent_channels=3,
    num_vq_embeddings=8192,
    sample_size=256,
    scaling_factor=1.0,
)
LDM_SCHEDULE = frozen(V_SCHEDULE, prediction_type="epsilon")
IMAGE_SCHEDULE = frozen(LDM_SCHEDULE, beta_start=0.0015, beta_end=0.0195)
LDM_TEXT = Preset(
    name="ldm-text",
    title="Latent diffusion, text to image 1.4B",
    pipeline="LDMTextToImagePipeline",
    task="text",
    denoiser=UNetConfig(sample_size=32, cross_attention_dim=1280),
    vae=replace(SD_VAE, sample_size=256),
    text=LDMBertConfig(),
    scheduler=LDM_SCHEDULE,
    width=256,
    height=256,
    ema=True,
    num_inference_steps=50,
    guidance_scale=5.0,
    sampler="ddim",
)
LDM_CLASS = Preset(
    name="ldm-class",
    title="Latent diffusion, ImageNet classes",
    pipeline="LDMClassToImagePipeline",
    task="class",
    denoiser=UNetConfig(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        block_out_channels=(192, 384, 576, 960),
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
        cross_attention_dim=512,
        attention_head_dim=1,
    ),
    vae=VQ_F4,
    text=ClassEmbedderConfig(),
    scheduler=IMAGE_SCHEDULE,
    width=256,
    height=256,
    ema=True,
    num_inference_steps=50,
    guidance_scale=3.0,
    sampler="ddim",
)
LDM_FACES = Preset(
    name="ldm-unconditional",
    title="Latent diffusion, unconditional",
    pipeline="LDMPipeline",
    task="unconditional",
    denoiser=UNetConfig.from_dict(
        {
            "_class_name": "UNet2DModel",
            "sample_size": 64,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": [224, 448, 672, 896],
            "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
            "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
            "layers_per_block": 2,
            "attention_head_dim": 32,
        }
    ),
    vae=VQ_F4,
    text=None,
    scheduler=IMAGE_SCHEDULE,
    width=256,
    height=256,
    ema=True,
    num_inference_steps=50,
    guidance_scale=1.0,
    sampler="ddim",
)

# The model inside the package is a folder with its own configurations; only what it prefers is said here.
MINI = replace(
    SD15,
    name="mini",
    title="the built-in model",
    denoiser=UNetConfig(sample_size=64, cross_attention_dim=256),
    width=128,
    height=128,
    num_inference_steps=20,
    guidance_scale=3.5,
)

CLASSIC: tuple[Preset, ...] = (
    SD15,
    SD15_LCM,
    SD15_HYPER,
    SD15_INPAINT,
    PIX2PIX,
    SD21,
    SD21_BASE,
    SD_TURBO,
    SD2_INPAINT,
    SD2_DEPTH,
    UPSCALER,
    LDM_TEXT,
    LDM_CLASS,
    LDM_FACES,
    MINI,
)
