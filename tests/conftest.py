"""Fixtures for every test: a complete model folder with random weights, so small that it runs at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato.diffusion import named
from sfumato.models.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.models.bert import LDMBertConfig, LDMBertModel
from sfumato.models.classes import ClassEmbedder, ClassEmbedderConfig
from sfumato.models.clip import CLIPTextModel
from sfumato.models.unet import UNet, UNetConfig
from sfumato.models.vq import VQConfig, VQModel
from sfumato.pipelines.pipeline import Pipeline
from sfumato.runtime import choose
from sfumato.text.bert import BertTokenizer
from sfumato.text.tokenizer import train_vocabulary
from sfumato.weights.folder import Components, load_folder, save_folder

from .tiny_clip import tiny_clip

os.environ["HF_HUB_OFFLINE"] = "1"
TINY_TEXTS = ("a red apple on a blue background, 3d style", "two green frogs", "a cat left of a red car") * 3
TINY_LENGTH = 16


def tiny_components(seed: int = 0) -> Components:
    """Random parts in the shape of Stable Diffusion for 32x32 pictures, with a v-prediction DDIM schedule."""
    torch.manual_seed(seed)
    tokenizer = train_vocabulary(TINY_TEXTS, size=540, max_length=TINY_LENGTH)
    text = tiny_clip(tokenizer, 32, layers=2)
    unet = UNetConfig(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        use_linear_projection=True,
    )
    vae = AutoencoderConfig(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
    )
    scheduler = named.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=True,
    )
    return Components(
        denoiser=UNet(unet).eval(),
        vae=AutoencoderKL(vae).eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        scheduler=scheduler,
    )


# Where a task's network differs: the class that its folder names, and its input channels.
TINY_TASKS = {
    "inpaint": ("StableDiffusionInpaintPipeline", 9),
    "depth": ("StableDiffusionDepth2ImgPipeline", 5),
    "instruct": ("StableDiffusionInstructPix2PixPipeline", 8),
    "upscale": ("StableDiffusionUpscalePipeline", 7),
    "ldm-text": ("LDMTextToImagePipeline", 4),
    "class": ("LDMClassToImagePipeline", 3),
    "unconditional": ("LDMPipeline", 3),
}


def tiny_task(task: str, seed: int = 0) -> Components:
    """`tiny_components` for another task: a name of TINY_TASKS, or "text" for the same ones."""
    parts = tiny_components(seed)
    if task == "text":
        return parts
    name, channels = TINY_TASKS[task]
    unet = replace(parts.unet.config, in_channels=channels)
    eps = named.DDIMScheduler.from_config(parts.scheduler.config, prediction_type="epsilon")
    parts = replace(parts, pipeline=name, scheduler=eps)
    if task == "upscale":
        low_res = named.DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear")
        vae = AutoencoderConfig(**{**vars(parts.vae.config), "scaling_factor": 0.08333})  # diffusers insists on it
        network = UNet(replace(unet, num_class_embeds=40)).eval()
        return replace(parts, denoiser=network, vae=AutoencoderKL(vae).eval(), low_res_scheduler=low_res)
    if task == "ldm-text":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({w for t in TINY_TEXTS for w in t.split()})]
        bert = LDMBertConfig(
            vocab_size=len(words),
            encoder_layers=2,
            encoder_ffn_dim=64,
            encoder_attention_heads=2,
            head_dim=16,
            d_model=32,
        )
        tokenizer = BertTokenizer({word: i for i, word in enumerate(words)})
        return replace(parts, text_encoder=LDMBertModel(bert).eval(), tokenizer=tokenizer)
    if task in ("class", "unconditional"):
        unet = replace(unet, out_channels=3)
        vq = VQConfig(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 16, 16),
            norm_num_groups=4,
            num_vq_embeddings=64,
            sample_size=32,
        )
        parts = replace(parts, vae=VQModel(vq).eval(), text_encoder=None, tokenizer=None)
    if task == "class":
        parts = replace(parts, text_encoder=ClassEmbedder(ClassEmbedderConfig(num_classes=11, embed_dim=32)).eval())
    if task == "unconditional":
        unet = UNetConfig.from_dict(
            {
                "_class_name": "UNet2DModel",
                "sample_size": 8,
                "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
                "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
                "block_out_channels": [16, 32],
                "layers_per_block": 1,
                "norm_num_groups": 8,
            }
        )
    return replace(parts, denoiser=UNet(unet).eval())


@pytest.fixture(scope="session")
def parts_for() -> Callable[[str], Components]:
    """Makes tiny parts for a task."""
    return tiny_task


@pytest.fixture(scope="session")
def pipe_for() -> Callable[[str], Pipeline]:
    """Makes a pipeline for a task, on the CPU in float32."""
    return lambda task: Pipeline(tiny_task(task), choose("cpu", "float32"), model=f"tiny-{task}")


@pytest.fixture
def tiny_parts() -> Components:
    """What `tiny_folder` holds, not yet saved."""
    return tiny_components()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model folder with tiny random parts; do not write into it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_folder(tiny_components(), folder)
    return folder


@pytest.fixture
def tiny_pipe(tiny_folder: Path) -> Pipeline:
    """A pipeline on the tiny folder, on the CPU in float32."""
    return Pipeline(load_folder(tiny_folder), choose("cpu", "float32"), model=str(tiny_folder))
