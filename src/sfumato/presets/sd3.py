"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): https://github.com/Stability-AI/sd3.5 and the published folders."""

from __future__ import annotations

from dataclasses import replace

from sfumato.models.mmdit import MMDiTConfig
from sfumato.models.t5 import T5Config
from sfumato.presets.base import Preset, frozen
from sfumato.presets.classic import CLIP_L, SD_VAE
from sfumato.presets.xl import OPENCLIP_G

FLOW_SCHEDULE = frozen({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0})
SD3_VAE = replace(
    SD_VAE,
    latent_channels=16,
    sample_size=1024,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
    force_upcast=True,
)
MEDIUM = MMDiTConfig(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192)
LARGE = replace(MEDIUM, num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm")
SD3_MEDIUM = Preset(
    name="sd3-medium",
    title="Stable Diffusion 3 medium",
    pipeline="StableDiffusion3Pipeline",
    task="text",
    denoiser=MEDIUM,
    vae=SD3_VAE,
    text=replace(CLIP_L, projected=True),
    text_2=OPENCLIP_G,
    text_3=T5Config(),
    scheduler=FLOW_SCHEDULE,
    width=1024,
    height=1024,
    num_inference_steps=28,
    guidance_scale=7.0,
    sampler="euler",
)
SD35_MEDIUM = replace(
    SD3_MEDIUM,
    name="sd35-medium",
    title="Stable Diffusion 3.5 medium",
    denoiser=replace(MEDIUM, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
    num_inference_steps=40,
    guidance_scale=4.5,
)
SD35_LARGE = replace(
    SD3_MEDIUM,
    name="sd35-large",
    title="Stable Diffusion 3.5 large",
    denoiser=LARGE,
    num_inference_steps=28,
    guidance_scale=3.5,
)
# Adversarial distillation (Sauer et al. 2024): the shapes of the large model, four steps without guidance.
SD35_LARGE_TURBO = replace(
    SD35_LARGE,
    name="sd35-large-turbo",
    like="sd35-large",
    title="Stable Diffusion 3.5 large Turbo",
    num_inference_steps=4,
    guidance_scale=1.0,
)
# A transformer small enough to be trained on a processor, see recipes/mmdit.yaml: it reads one CLIP tower alone.
MMDIT_MINI = replace(
    SD3_MEDIUM,
    name="mmdit-mini",
    title="the small transformer",
    denoiser=MMDiTConfig(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        num_attention_heads=4,
        joint_attention_dim=256,
        caption_projection_dim=256,
        pooled_projection_dim=256,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    ),
    text_2=None,
    text_3=None,
    width=128,
    height=128,
    num_inference_steps=25,
    guidance_scale=4.0,
)
SD3 = (SD3_MEDIUM, SD35_MEDIUM, SD35_LARGE, SD35_LARGE_TURBO, MMDIT_MINI)
