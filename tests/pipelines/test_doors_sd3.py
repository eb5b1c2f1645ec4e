"""The front doors to Stable Diffusion 3 beside diffusers' pipelines, on the same tiny folders and generators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sfumato
from sfumato.pipelines import doors_sd3
from sfumato.weights.folder import save_folder

from ..models.parity import assert_close
from ..tiny_sd3 import tiny_sd3
from .test_sd3 import NEGATIVE, PROMPT, mask, peer, picture, seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TEXT, IMAGE, INPAINT = (f"StableDiffusion3{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))
STEPS = 5
TEXTS: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": STEPS}
SIZE = {"height": 32, "width": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("doors") / "sized"
    sized: dict[str, Any] = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 256}
    save_folder(tiny_sd3("sd3.5-medium", **sized), place)
    return place


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return peer(folder)


@pytest.fixture(scope="module")
def door(folder: Path) -> Callable[[str], Any]:
    base = sfumato.StableDiffusion3Pipeline.from_pretrained(folder)

    def of(name: str) -> Any:
        return getattr(doors_sd3, name).from_pipe(base)

    return of


def compare(label: str, ours: Any, theirs: Any) -> None:
    difference = float(np.abs(ours.images - theirs.images).max()) * 255
    print(f"{label}: largest difference {difference:.4f} of 255")
    assert ours.images.shape == theirs.images.shape
    assert difference <= 0.1 and float(ours.images.std()) > 0.02


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance_scale": 1.0, "skip_guidance_layers": [1]},
        {"prompt_2": "a cat left of", "prompt_3": "a red car", "negative_prompt": NEGATIVE, "negative_prompt_3": "car"},
        {"clip_skip": 1, "max_sequence_length": 40, "mu": 0.3, "num_images_per_prompt": 2},
        {"skip_guidance_layers": [1, 2], "skip_layer_guidance_stop": 0.7, "skip_layer_guidance_scale": 2.0},
        {"prompt": [PROMPT, "a red car"], "negative_prompt": ["", NEGATIVE], "sigmas": [1.0, 0.7, 0.3]},
    ],
)
def test_text_to_image(door: Any, theirs: Any, changes: dict[str, Any]) -> None:
    both = {**TEXTS, **SIZE, **changes, "output_type": "np"}
    compare(f"{sorted(changes)}", door(TEXT)(**both, generator=seeded()), theirs(**both, generator=seeded()))


def test_image_to_image(door: Any, theirs: Any) -> None:
    import diffusers

    both = {**TEXTS, **SIZE, "image": picture(), "negative_prompt": NEGATIVE, "output_type": "np"}
    other = diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(theirs)
    for strength in ({}, {"strength": 1.0}):
        results = (pipe(**both, **strength, generator=seeded()) for pipe in (door(IMAGE), other))
        compare(f"image to image {strength}", *results)


@pytest.mark.parametrize("strength", [{}, {"strength": 1.0}])
def test_inpaint(door: Any, theirs: Any, strength: dict[str, float]) -> None:
    """Latents are compared: diffusers' pipeline for this task decodes them without the autoencoder's shift."""
    import diffusers

    both = {**TEXTS, "height": 64, "width": 64, "image": picture(), "mask_image": mask(), "output_type": "latent"}
    other = diffusers.StableDiffusion3InpaintPipeline.from_pipe(theirs)
    ours, latents = (pipe(**both, **strength, generator=seeded()).images for pipe in (door(INPAINT), other))
    assert_close(f"inpaint {strength}", ours, latents)


def test_embeddings_stand_for_prompts_and_callbacks_change_them(door: Any, theirs: Any) -> None:
    pipe = door(TEXT)
    names = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
    found = pipe.encode_prompt(PROMPT, negative_prompt=NEGATIVE)
    known = theirs.encode_prompt(PROMPT, None, None, negative_prompt=NEGATIVE)
    for name, ours, other in zip(names, found, known, strict=True):
        assert_close(name, ours, other)
    latents = torch.randn(1, 16, 8, 12, generator=seeded())
    seen: list[tuple[int, list[str]]] = []

    def louder(of: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((i, sorted(tensors)))
        return {name: tensor * 1.1 for name, tensor in tensors.items() if name != "latents"}

    shown = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    told = {**SIZE, "num_inference_steps": STEPS, "latents": latents, "output_type": "np"}
    told |= {"callback_on_step_end": louder, "callback_on_step_end_tensor_inputs": shown}
    texts = dict(zip(names, found, strict=True))
    compare("embeddings and callback", pipe(**told, **texts), theirs(**told, **texts))
    assert seen[:STEPS] == [(i, sorted(shown)) for i in range(STEPS)]


def test_without_t5(folder: Path, theirs: Any) -> None:
    pipe = sfumato.DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    assert type(pipe) is sfumato.StableDiffusion3Pipeline
    assert pipe.text_encoder_3 is pipe.tokenizer_3 is None and "text_encoder_3" not in pipe.components
    kept = theirs.text_encoder_3
    theirs.text_encoder_3 = None
    try:
        both = {**TEXTS, **SIZE, "max_sequence_length": 64, "output_type": "np"}
        compare("without T5", pipe(**both, generator=seeded()), theirs(**both, generator=seeded()))
    finally:
        theirs.text_encoder_3 = kept


def test_doors_are_chosen_by_the_model(folder: Path, door: Any, tiny_folder: Path) -> None:
    for auto, name in (
        (sfumato.AutoPipelineForText2Image, TEXT),
        (sfumato.AutoPipelineForImage2Image, IMAGE),
        (sfumato.AutoPipelineForInpainting, INPAINT),
    ):
        assert type(auto.from_pipe(door(TEXT))).__name__ == name
    assert type(sfumato.AutoPipelineForImage2Image.from_pretrained(folder)).__name__ == IMAGE
    assert type(sfumato.AutoPipelineForText2Image.from_pretrained(tiny_folder)) is sfumato.StableDiffusionPipeline
    with pytest.raises(ValueError, match="is for Stable Diffusion 3; open this model with sfumato"):
        doors_sd3.StableDiffusion3Pipeline.from_pretrained(tiny_folder)


def test_parts_go_from_door_to_door(folder: Path, door: Any, tmp_path: Path) -> None:
    base = door(TEXT)
    other = sfumato.StableDiffusion3Img2ImgPipeline(**base.components)
    assert other.transformer is base.transformer and other.text_encoder_3 is base.text_encoder_3
    base.enable_attention_slicing()
    base.enable_vae_tiling()
    base.disable_vae_tiling()
    with pytest.raises(AttributeError, match="not with a U-Net"):
        _ = base.unet
    base.save_pretrained(tmp_path)
    for file in (p for p in folder.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json")):
        assert file.read_bytes() == (tmp_path / file.relative_to(folder)).read_bytes(), file


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"skip_guidance_layers": [9]}, r"skip_guidance_layers = \[9\]: no block '9' to skip; this network has 0 to 3"),
        ({"max_sequence_length": 700}, "max_sequence_length = 700; give 2 to 512 tokens"),
        ({"width": 44}, "width = 44 is not a multiple of 8; the nearest that is: 48"),
        ({"joint_attention_kwargs": {"gate": 1}}, "joint_attention_kwargs: 'gate' is not supported; known: 'scale'"),
        ({"negative_pooled_prompt_embeds": torch.zeros(1, 40)}, "belong together; give both, or neither"),
        ({"prompt_2": ["a", "b"]}, "1 and 2 prompts for the text encoders; give as many each"),
        ({"ip_adapter_image": 1}, "ip_adapter_image is not supported"),
    ],
)
def test_what_does_not_fit_is_said(door: Any, told: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        door(TEXT)(**{**TEXTS, **SIZE, **told})
    assert "\n" not in str(error.value)


def test_image_to_image_goes_on_with_latents(door: Any, theirs: Any) -> None:
    """Given latents are what the steps begin with, as in diffusers; the image is not looked at then."""
    import diffusers

    latents = torch.randn(1, 16, 16, 16, generator=seeded()) * 0.8
    both = {**TEXTS, "image": picture(), "strength": 0.6, "latents": latents, "output_type": "np"}
    other = diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(theirs)
    compare("latents", door(IMAGE)(**both, generator=seeded()), other(**both, height=64, width=64, generator=seeded()))
    with pytest.raises(ValueError, match=r"latents of shape \(1, 16, 8, 8\); this call needs \(1, 16, 16, 16\)"):
        door(IMAGE)(PROMPT, image=picture(), latents=torch.zeros(1, 16, 8, 8))


def test_learned_words_of_the_clip_towers(door: Any, tmp_path: Path) -> None:
    """A file for both towers changes what they say, and nothing of T5; forgotten, all is as before."""
    content = {name: torch.randn((2, width), generator=seeded()) for name, width in (("clip_l", 16), ("clip_g", 24))}
    save_file(content, tmp_path / "mood.safetensors")
    pipe = door(TEXT)
    before, _, pooled, _ = pipe.encode_prompt("a mood cat", do_classifier_free_guidance=False)
    pipe.load_textual_inversion(tmp_path / "mood.safetensors")
    after, _, other, _ = pipe.encode_prompt("a mood cat", do_classifier_free_guidance=False)
    clip = pipe.tokenizer.max_length
    assert not torch.equal(after[:, :clip], before[:, :clip]) and not torch.equal(other, pooled)
    assert torch.equal(after[:, clip:], before[:, clip:])
    pipe.unload_textual_inversion()
    assert torch.equal(pipe.encode_prompt("a mood cat", do_classifier_free_guidance=False)[0], before)
