"""Each task gives the picture that diffusers' pipeline for it gives, from the same folder, seed and pictures."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.models.classes import ClassEmbedder
from sfumato.pipelines.pipeline import Pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPT, NEGATIVE = "a red apple on a blue background", "two green frogs"
STEPS = 10
Make = Callable[[str], Pipeline]
Pair = Callable[..., tuple[Pipeline, Any]]
TEXTS: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS}


def drawn(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    """A picture of coarse random patches."""
    patches = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST)


def masked(width: int = 32, height: int = 32) -> Image.Image:
    """A mask whose right half is white, with a grey edge."""
    levels = np.zeros((height, width), dtype=np.uint8)
    levels[:, width // 2 :] = 255
    levels[:, width // 2 - 1] = 120
    return Image.fromarray(levels)


@pytest.fixture(scope="module")
def pair(pipe_for: Make, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Makes our pipeline for a task and diffusers' on the folder that ours has saved, with the named scheduler."""
    import diffusers

    known: dict[str, tuple[Pipeline, Any]] = {}

    def make(task: str, name: str, scheduler: str = "DDIMScheduler", **parts: Any) -> tuple[Pipeline, Any]:
        if name not in known:
            folder = tmp_path_factory.mktemp("peer") / task
            pipe = pipe_for(task)
            pipe.save_pretrained(folder)
            theirs = getattr(diffusers, name).from_pretrained(str(folder), local_files_only=True, **parts)
            theirs.set_progress_bar_config(disable=True)
            known[name] = pipe, theirs
        pipe, theirs = known[name]
        theirs.scheduler = getattr(diffusers, scheduler).from_config(dict(pipe.scheduler.config))
        return pipe, theirs

    return make


def compare(label: str, ours: Any, theirs: Any) -> None:
    """Fail above a tenth of one level of 255; print the difference."""
    images = ours.images.permute(0, 2, 3, 1).numpy()
    assert images.shape == theirs.images.shape, label
    difference = float(np.abs(images - theirs.images).max()) * 255
    print(f"{label}: largest difference {difference:.4f} of 255")
    assert difference <= 0.1, f"{label}: {difference} of 255"
    assert float(images.std()) > 0.01, "an empty picture proves nothing"


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize(("sampler", "scheduler"), [("ddim", "DDIMScheduler"), ("euler", "EulerDiscreteScheduler")])
def test_text(pair: Pair, scale: float, sampler: str, scheduler: str) -> None:
    pipe, theirs = pair("text", "StableDiffusionPipeline", scheduler)
    both = TEXTS | {"guidance_scale": scale}
    compare(
        f"text {sampler}",
        pipe(**both, seed=7, sampler=sampler, output_type="pt"),
        theirs(**both, generator=seeded(), output_type="np"),
    )


@pytest.mark.parametrize(
    ("sampler", "scheduler", "strength"),
    [
        ("ddim", "DDIMScheduler", 0.3),
        ("ddim", "DDIMScheduler", 1.0),
        ("heun", "HeunDiscreteScheduler", 0.55),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", 0.8),
    ],
)
def test_image_to_image(pair: Pair, sampler: str, scheduler: str, strength: float) -> None:
    pipe, theirs = pair("text", "StableDiffusionImg2ImgPipeline", scheduler)
    both = TEXTS | {"guidance_scale": 4.0, "image": drawn(0), "strength": strength}
    compare(
        f"image to image {sampler} {strength}",
        pipe(**both, seed=7, sampler=sampler, output_type="pt"),
        theirs(**both, generator=seeded(), output_type="np"),
    )


@pytest.mark.parametrize(("strength", "scale", "size"), [(1.0, 5.0, 32), (0.6, 5.0, 32), (1.0, 1.0, 40)])
def test_inpaint(pair: Pair, strength: float, scale: float, size: int) -> None:
    pipe, theirs = pair("inpaint", "StableDiffusionInpaintPipeline")
    both = TEXTS | {"guidance_scale": scale, "image": drawn(0, 32, 48), "strength": strength}
    both |= {"width": size, "height": 32}
    compare(
        f"inpaint {strength}",
        pipe(**both, mask=masked(32, 48), seed=7, sampler="ddim", paste=False, output_type="pt"),
        theirs(**both, mask_image=masked(32, 48), generator=seeded(), output_type="np"),
    )


@pytest.mark.parametrize(
    ("sampler", "scheduler", "strength", "scale"),
    [
        ("ddim", "DDIMScheduler", 1.0, 5.0),
        ("ddim", "DDIMScheduler", 0.6, 1.0),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", 0.8, 5.0),
        ("heun", "HeunDiscreteScheduler", 1.0, 5.0),
    ],
)
def test_inpaint_with_any_model(pair: Pair, sampler: str, scheduler: str, strength: float, scale: float) -> None:
    pipe, theirs = pair("text", "StableDiffusionInpaintPipeline", scheduler)
    both = TEXTS | {"guidance_scale": scale, "image": drawn(0, 32, 32), "strength": strength, "height": 32, "width": 32}
    compare(
        f"inpaint, 4 channels, {sampler} {strength}",
        pipe(**both, mask=masked(), seed=7, sampler=sampler, paste=False, output_type="pt"),
        theirs(**both, mask_image=masked(), generator=seeded(), output_type="np"),
    )


@pytest.mark.parametrize("box", [(20, 24, 52, 56), (40, 8, 64, 16), (0, 40, 24, 64)])
def test_inpaint_of_a_part(pair: Pair, box: tuple[int, int, int, int]) -> None:
    """`padding_mask_crop`: cut out, repainted at another size, put back into the whole."""
    pipe, theirs = pair("text", "StableDiffusionInpaintPipeline")
    mask = Image.new("L", (64, 72))
    mask.paste(255, box)
    image = drawn(0, 64, 72)
    both = TEXTS | {"guidance_scale": 4.0, "image": image, "strength": 0.8, "height": 32, "width": 32}
    ours = pipe(**both, mask=mask, only_masked=True, mask_padding=4, mask_blur=0, seed=7, sampler="ddim").images[0]
    other = theirs(**both, mask_image=mask, padding_mask_crop=4, generator=seeded()).images[0]
    a, b = (np.asarray(picture).astype(int) for picture in (ours, other))
    assert a.shape == b.shape == (72, 64, 3)
    difference, changed = np.abs(a - b).max(), np.abs(a - np.asarray(image).astype(int)).max()
    print(f"inpaint of a part: largest difference {difference} of 255")
    assert difference <= 2 and changed > 20


@pytest.mark.parametrize("strength", [0.8, 1.0])
def test_depth(pair: Pair, strength: float) -> None:
    nothing = {"depth_estimator": None, "feature_extractor": None}
    pipe, theirs = pair("depth", "StableDiffusionDepth2ImgPipeline", "EulerDiscreteScheduler", **nothing)
    far = np.random.default_rng(1).random((24, 20)).astype(np.float32) * 30 + 4
    both = TEXTS | {"guidance_scale": 5.0, "image": drawn(0, 40, 24), "strength": strength}
    compare(
        f"depth {strength}",
        pipe(**both, depth=Image.fromarray(far), seed=7, sampler="euler", output_type="pt"),
        theirs(**both, depth_map=torch.from_numpy(far)[None], generator=seeded(), output_type="np"),
    )


def test_instruct(pair: Pair) -> None:
    pipe, theirs = pair("instruct", "StableDiffusionInstructPix2PixPipeline", "EulerAncestralDiscreteScheduler")
    both = TEXTS | {"guidance_scale": 5.0, "image_guidance_scale": 1.7, "image": drawn(0, 40, 24)}
    compare(
        "instruct",
        pipe(**both, seed=7, output_type="pt"),
        theirs(**both, generator=seeded(), output_type="np"),
    )


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_upscale(pair: Pair, scale: float) -> None:
    pipe, theirs = pair("upscale", "StableDiffusionUpscalePipeline")
    both = TEXTS | {"guidance_scale": scale, "noise_level": 30, "image": drawn(0, 16, 12)}
    ours = pipe(**both, seed=7, sampler="ddim", output_type="pt")
    assert ours.images[0].shape == (3, 48, 64)
    compare("upscale", ours, theirs(**both, generator=seeded(), output_type="np"))


def test_latent_diffusion_with_text(pipe_for: Make) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, LDMTextToImagePipeline, UNet2DConditionModel
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
    from transformers import BertTokenizer

    pipe = pipe_for("ldm-text")
    assert pipe.tokenizer is not None and pipe.text_encoder is not None
    theirs = LDMTextToImagePipeline(
        vqvae=built(AutoencoderKL, pipe.vae),
        bert=filled(LDMBertModel(LDMBertConfig(**pipe.text_encoder.config.to_dict())), pipe.text_encoder),
        tokenizer=BertTokenizer(vocab=dict(pipe.tokenizer.vocabulary), model_max_length=77),
        unet=built(UNet2DConditionModel, pipe.unet),
        scheduler=DDIMScheduler.from_config(dict(pipe.scheduler.config)),
    )
    theirs.set_progress_bar_config(disable=True)
    both = {"guidance_scale": 5.0, "num_inference_steps": STEPS}
    # Diffusers takes every such autoencoder for one that shrinks eight times: it is asked for twice the size.
    compare(
        "latent diffusion, text",
        pipe(PROMPT, **both, seed=7, output_type="pt"),
        theirs([PROMPT], **both, height=64, width=64, generator=seeded(), output_type="np"),
    )


def built(kind: Any, ours: Any) -> Any:
    """A network of diffusers with the configuration and the weights of ours."""
    return filled(kind.from_config(ours.config.to_dict()), ours)


def filled(theirs: Any, ours: Any) -> Any:
    theirs.load_state_dict(ours.state_dict())
    return theirs.eval()


def test_unconditional_latent_diffusion(pipe_for: Make) -> None:
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

    pipe = pipe_for("unconditional")
    theirs = LDMPipeline(
        vqvae=built(VQModel, pipe.vae),
        unet=built(UNet2DModel, pipe.unet),
        scheduler=DDIMScheduler.from_config(dict(pipe.scheduler.config)),
    )
    theirs.set_progress_bar_config(disable=True)
    compare(
        "latent diffusion, unconditional",
        pipe(seed=7, num_inference_steps=STEPS, output_type="pt"),
        theirs(num_inference_steps=STEPS, generator=seeded(), output_type="np"),
    )


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_latent_diffusion_with_classes(pipe_for: Make, scale: float) -> None:
    """Diffusers has no pipeline for it: the loop is written out with its networks.

    From seed 7 a latent pixel ends half way between two codes, and rounding would decide which of them is drawn.
    """
    from diffusers import DDIMScheduler, UNet2DConditionModel, VQModel

    pipe = pipe_for("class")
    assert isinstance(pipe.text_encoder, ClassEmbedder)
    unet, vae = built(UNet2DConditionModel, pipe.unet), built(VQModel, pipe.vae)
    scheduler = DDIMScheduler.from_config(dict(pipe.scheduler.config))
    scheduler.set_timesteps(STEPS)
    context = pipe.text_encoder.embedding.weight[[10, 3]][:, None]  # (2, 1, D): no class, class 3
    x = torch.randn((1, 3, 8, 8), generator=seeded(8))
    with torch.no_grad():
        for t in scheduler.timesteps:
            uncond, cond = unet(torch.cat([x, x]), t, encoder_hidden_states=context).sample.chunk(2)
            x = scheduler.step(uncond + scale * (cond - uncond), t, x).prev_sample
        theirs = (vae.decode(x).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    ours = pipe("3", seed=8, guidance_scale=scale, num_inference_steps=STEPS, output_type="pt")
    compare("latent diffusion, classes", ours, SimpleNamespace(images=theirs))
