"""The front doors to Stable Diffusion XL beside diffusers' pipelines, on the same tiny folders and generators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sfumato
from sfumato.pipelines import doors_xl
from sfumato.pipelines.doors import StableDiffusionPipeline
from sfumato.weights.folder import load_folder
from sfumato.weights.model import save_model

from ..weights.adapters_made import kohya, written
from .conftest import Folders, Peer
from .test_tasks_parity import NEGATIVE, PROMPT, drawn, masked, seeded
from .test_xl import BASE, INPAINT, REFINER, SCORES, SIZES, STEPS

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TEXTS: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": STEPS}
SIZE = {"height": 32, "width": 32}


def door(name: str, folder: Path) -> Any:
    pipe = getattr(doors_xl, name).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compare(label: str, ours: Any, theirs: Any) -> None:
    difference = float(np.abs(ours.images - theirs.images).max()) * 255
    print(f"{label}: largest difference {difference:.4f} of 255")
    assert difference <= 0.01 and float(ours.images.std()) > 0.01


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 1.0},
        {"negative_prompt": NEGATIVE, "prompt_2": "a cat left of a red car", "negative_prompt_2": "a red car"},
        {"negative_prompt": "", "clip_skip": 1, **SIZES},
        {"num_images_per_prompt": 2, "guidance_rescale": 0.5},
    ],
)
def test_text_to_image(folders: Folders, peer: Peer, changes: dict[str, Any]) -> None:
    both = {**TEXTS, **SIZE, **changes, "output_type": "np"}
    ours, theirs = door(BASE, folders[BASE]), peer(BASE, BASE)
    compare(f"{sorted(changes)}", ours(**both, generator=seeded()), theirs(**both, generator=seeded()))


@pytest.mark.parametrize("family", [BASE, REFINER])
def test_image_to_image(folders: Folders, peer: Peer, family: str) -> None:
    scores = SCORES if family == REFINER else {}
    both = {**TEXTS, "image": drawn(0), "strength": 0.5, "negative_prompt": NEGATIVE, "output_type": "np", **scores}
    ours, theirs = door(REFINER, folders[family]), peer(REFINER, family)
    compare(family, ours(**both, generator=seeded()), theirs(**both, generator=seeded()))


@pytest.mark.parametrize(("family", "strength"), [(BASE, {}), (INPAINT, {}), (INPAINT, {"strength": 0.6})])
def test_inpaint(folders: Folders, peer: Peer, family: str, strength: dict[str, float]) -> None:
    both = {**TEXTS, **SIZE, **strength, "image": drawn(0), "mask_image": masked(), "output_type": "np"}
    ours, theirs = door(INPAINT, folders[family]), peer(INPAINT, family)
    compare(f"{family} {strength}", ours(**both, generator=seeded()), theirs(**both, generator=seeded()))


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler"])
def test_hand_over(folders: Folders, peer: Peer, scheduler: str) -> None:
    results = []
    ours = door(BASE, folders[BASE]), door(REFINER, folders[REFINER])
    theirs = peer(BASE, BASE, scheduler), peer(REFINER, REFINER, scheduler)
    for first, second in (ours, theirs):
        first.scheduler, second.scheduler = theirs[0].scheduler, theirs[1].scheduler
        latents = first(**TEXTS, **SIZE, denoising_end=0.7, output_type="latent", generator=seeded()).images
        results.append(second(**TEXTS, image=latents, denoising_start=0.7, output_type="np", generator=seeded()))
    compare(scheduler, *results)


def test_doors_are_for_their_kind_and_say_so(folders: Folders, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="is for Stable Diffusion XL; open this model with sfumato"):
        doors_xl.StableDiffusionXLPipeline.from_pretrained(tiny_folder)
    with pytest.raises(ValueError, match="for models with a CLIP text encoder, and only one"):
        StableDiffusionPipeline.from_pretrained(folders[BASE])
    pipe = door(BASE, folders[BASE])
    with pytest.raises(ValueError, match=r"denoising_end = 1\.5; give a share between 0 and 1"):
        pipe(PROMPT, denoising_end=1.5)
    with pytest.raises(ValueError, match=rf"denoising_end = 0\.01 of {STEPS} steps leaves none"):
        pipe(**TEXTS, denoising_end=0.01)
    with pytest.raises(ValueError, match="prompt_embeds and pooled_prompt_embeds belong together"):
        pipe(prompt_embeds=torch.zeros(1, 16, 40))
    with pytest.raises(ValueError, match="aesthetic_score = 11"):
        pipe(PROMPT, aesthetic_score=11)


def test_parts_go_from_door_to_door(folders: Folders) -> None:
    base = sfumato.DiffusionPipeline.from_pretrained(folders[BASE], add_watermarker=False)
    refiner = sfumato.DiffusionPipeline.from_pretrained(
        folders[REFINER], vae=base.vae, text_encoder_2=base.text_encoder_2
    )
    assert type(base) is sfumato.StableDiffusionXLPipeline
    assert type(refiner) is sfumato.StableDiffusionXLImg2ImgPipeline
    assert refiner.text_encoder is refiner.tokenizer is None and refiner.text_encoder_2 is base.text_encoder_2
    other = sfumato.StableDiffusionXLImg2ImgPipeline(**{k: v for k, v in base.components.items() if v is not None})
    assert other.unet is base.unet and other.tokenizer_2 is base.tokenizer_2
    assert sfumato.StableDiffusionXLInpaintPipeline.from_pipe(base).vae is base.vae
    with pytest.raises(AttributeError, match="not a transformer"):
        _ = base._pipe.transformer


def test_learned_words_of_two_towers(folders: Folders, peer: Peer, tmp_path: Path) -> None:
    """As notebooks load them: vectors for each text encoder; and a file with both. Then they are forgotten."""
    content = {name: torch.randn((2, width), generator=seeded()) for name, width in (("clip_l", 16), ("clip_g", 24))}
    save_file(content, tmp_path / "mood.safetensors")
    call = {**TEXTS, **SIZE, "prompt": "a mood cat", "output_type": "np"}
    ours, whole, theirs = door(BASE, folders[BASE]), door(BASE, folders[BASE]), peer(BASE, BASE)
    plain = ours(**call, generator=seeded()).images
    for pipe in (ours, theirs):
        first = {"text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}
        second = {"text_encoder": pipe.text_encoder_2, "tokenizer": pipe.tokenizer_2}
        pipe.load_textual_inversion(content["clip_l"], token="mood", **first)
        pipe.load_textual_inversion(content["clip_g"], token="mood", **second)
    whole.load_textual_inversion(str(tmp_path / "mood.safetensors"))
    expected = theirs(**call, generator=seeded())
    for pipe in (ours, whole):
        compare("learned words", pipe(**call, generator=seeded()), expected)
        assert np.abs(pipe(**call, generator=seeded()).images - plain).max() > 0.001
        pipe.unload_textual_inversion("mood")
        assert np.array_equal(pipe(**call, generator=seeded()).images, plain)
    with pytest.raises(ValueError, match="embedding is an embedding for one text tower; this model reads with two"):
        ours.load_textual_inversion(content["clip_l"], token="mood")
    with pytest.raises(ValueError, match="give this door's text_encoder or text_encoder_2"):
        ours.load_textual_inversion(content["clip_l"], token="mood", text_encoder=theirs.text_encoder)
    with pytest.raises(ValueError, match="come without its name; give token"):
        ours.load_textual_inversion(content["clip_l"], text_encoder=ours.text_encoder)
    with pytest.raises(ValueError, match="vectors of 24 numbers; this text encoder reads 16"):
        ours.load_textual_inversion(content["clip_g"], token="mood", text_encoder=ours.text_encoder)
    refiner = door(REFINER, folders[REFINER])
    refiner.load_textual_inversion(tmp_path / "mood.safetensors", token="moods")
    assert refiner.tokenizer is None and "moods" in refiner.tokenizer_2.expansions


def test_the_autoencoder_in_more_bits(folders: Folders) -> None:
    pipe = door(BASE, folders[BASE])
    expected = pipe(**TEXTS, **SIZE, output_type="np", generator=seeded()).images
    pipe.vae.to(dtype=torch.bfloat16)
    pipe.upcast_vae()
    assert pipe.vae.dtype == torch.float32 and pipe.unet.dtype == torch.float32
    difference = np.abs(pipe(**TEXTS, **SIZE, output_type="np", generator=seeded()).images - expected).max()
    print(f"after bfloat16: largest difference {difference:.4f}")
    assert 0 < difference < 0.2


def test_what_a_door_saves_opens_again(folders: Folders, tmp_path: Path) -> None:
    for family in (BASE, REFINER, INPAINT):
        pipe = door(REFINER if family == REFINER else family, folders[family])
        pipe.save_pretrained(tmp_path / family)
        for file in (p for p in folders[family].rglob("*") if p.is_file()):
            again = tmp_path / family / file.relative_to(folders[family])
            assert file.read_bytes() == again.read_bytes(), file


def test_an_adapter_on_both_text_encoders(folders: Folders, tmp_path: Path) -> None:
    """The same file in kohya's spelling, from a folder and from the model in one file."""
    import diffusers

    ours, theirs = door(BASE, folders[BASE]), diffusers.StableDiffusionXLPipeline.from_pretrained(folders[BASE])
    theirs.set_progress_bar_config(disable=True)
    one, two = ours.text_encoder, ours.text_encoder_2
    ends = ("q_proj", "out_proj", "fc1")
    tensors = kohya("lora_unet_", ours.unet, "to_q", "ff.net.2") | kohya("lora_te1_", one, *ends)
    path = written(tmp_path / "ink.safetensors", tensors | kohya("lora_te2_", two, *ends))
    both = {**TEXTS, **SIZE, "output_type": "np"}
    bare = ours(**both, generator=seeded())
    save_model(load_folder(folders[BASE]), tmp_path / "one.safetensors")
    single = doors_xl.StableDiffusionXLPipeline.from_single_file(tmp_path / "one.safetensors")
    theirs.load_lora_weights(str(path))
    expected = theirs(**both, generator=seeded())
    for label, pipe in (("folder", ours), ("file", single)):
        pipe.load_lora_weights(path)
        made = pipe(**both, generator=seeded())
        assert float(np.abs(made.images - bare.images).max()) > 0.01
        compare(label, made, expected)
