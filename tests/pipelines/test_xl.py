"""Stable Diffusion XL: pictures beside diffusers', what the model is told, the refiner, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sfumato.pipelines.pipeline import Pipeline
from sfumato.pipelines.request import parse
from sfumato.runtime import choose
from sfumato.weights.folder import load_folder

from ..tiny_xl import TINY_XL
from .conftest import Folders, Peer
from .test_tasks_parity import NEGATIVE, PROMPT, compare, drawn, masked, seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
BASE, REFINER, INPAINT = TINY_XL
STEPS = 5
TEXTS: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def opened(folders: Folders) -> Callable[[str], Pipeline]:
    """Our pipeline on the folder of a class."""
    known = {f: Pipeline(load_folder(p), choose("cpu", "float32"), model=str(p)) for f, p in folders.items()}
    return known.__getitem__


SIZES: dict[str, Any] = {
    "original_size": (48, 64),
    "crops_coords_top_left": (4, 8),
    "target_size": (40, 32),
    "negative_original_size": (24, 16),
    "negative_crops_coords_top_left": (2, 0),
    "negative_target_size": (16, 24),
}


@pytest.mark.parametrize(("scale", "negative", "sizes"), [(1.0, "", {}), (5.0, "", {}), (5.0, NEGATIVE, SIZES)])
def test_text_to_image(opened: Any, peer: Peer, scale: float, negative: str, sizes: dict[str, Any]) -> None:
    both = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": scale, **sizes}
    ours = opened(BASE)(**both, negative_prompt=negative, seed=7, sampler="euler", output_type="pt")
    theirs = peer(BASE, BASE)(
        **both, negative_prompt=negative or None, height=32, width=32, generator=seeded(), output_type="np"
    )
    compare(f"scale {scale}, negative {negative!r}, {len(sizes)} sizes", ours, theirs)


def test_what_the_model_is_told_matters(opened: Any) -> None:
    """Otherwise the comparisons above say nothing of it."""
    plain = {**TEXTS, "num_inference_steps": 2, "seed": 7, "output_type": "pt"}
    first = opened(BASE)(**plain).images
    for changes in (
        *({name: value} for name, value in SIZES.items()),
        {"negative_prompt": ""},
        {"clip_skip": 1},
        {"prompt": "a (red:1.5) apple on a blue background"},
        {"prompt": PROMPT + " apple" * 20},
    ):
        other = opened(BASE)(**{**plain, **changes}).images
        assert float((other - first).abs().max()) > 1 / 255, changes


def test_layers_are_counted_from_the_one_that_is_read(opened: Any, peer: Peer) -> None:
    """Without guidance: diffusers leaves no layers out for the negative prompt."""
    both = {**TEXTS, "guidance_scale": 1.0, "clip_skip": 1}
    ours = opened(BASE)(**both, seed=7, sampler="euler", output_type="pt")
    theirs = peer(BASE, BASE)(**both, height=32, width=32, generator=seeded(), output_type="np")
    compare("clip_skip 1", ours, theirs)


SCORES = {"aesthetic_score": 7.0, "negative_aesthetic_score": 1.0}


@pytest.mark.parametrize(
    ("family", "strength", "scores"), [(BASE, 0.4, {}), (REFINER, 0.6, {}), (REFINER, 0.6, SCORES)]
)
def test_image_to_image(opened: Any, peer: Peer, family: str, strength: float, scores: dict[str, float]) -> None:
    both = {**TEXTS, **scores, "guidance_scale": 4.0, "image": drawn(0), "strength": strength}
    compare(
        f"{family} {strength} {scores}",
        opened(family)(**both, seed=7, sampler="euler", output_type="pt"),
        peer(REFINER, family)(**both, generator=seeded(), output_type="np"),
    )


@pytest.mark.parametrize(("family", "strength"), [(BASE, 0.6), (BASE, 1.0), (INPAINT, 0.6)])
def test_inpaint(opened: Any, peer: Peer, family: str, strength: float) -> None:
    both = {**TEXTS, "guidance_scale": 4.0, "image": drawn(0), "strength": strength, "height": 32, "width": 32}
    compare(
        f"{family} {strength}",
        opened(family)(**both, mask=masked(), paste=False, seed=7, sampler="euler", output_type="pt"),
        peer(INPAINT, family)(**both, mask_image=masked(), generator=seeded(), output_type="np"),
    )


@pytest.mark.parametrize(
    ("sampler", "scheduler", "share"),
    [
        ("euler", "EulerDiscreteScheduler", 0.35),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", 0.35),
        ("unipc", "UniPCMultistepScheduler", 0.8),
    ],
)
def test_hand_over(opened: Any, peer: Peer, folders: Folders, sampler: str, scheduler: str, share: float) -> None:
    both = {**TEXTS, "guidance_scale": 4.0}
    ours = opened(BASE)(
        **both, seed=7, sampler=sampler, output_type="pt", refiner=str(folders[REFINER]), refiner_start=share
    )
    first, second = peer(BASE, BASE, scheduler), peer(REFINER, REFINER, scheduler)
    latents = first(**both, height=32, width=32, generator=seeded(), denoising_end=share, output_type="latent").images
    theirs = second(**both, image=latents, denoising_start=share, generator=seeded(), output_type="np")
    compare(f"hand-over {sampler} {share}", ours, theirs)


@pytest.mark.parametrize(("sampler", "share"), [("euler", 0.3), ("heun", 0.3), ("heun", 0.8), ("dpm2", 0.3)])
def test_a_hand_over_to_the_same_model_changes_nothing(
    opened: Any, folders: Folders, sampler: str, share: float
) -> None:
    """Also where a step asks twice; diffusers stops between Heun's prediction and its correction."""
    fields = {**TEXTS, "seed": 7, "sampler": sampler, "output_type": "pt"}
    plain = opened(BASE)(**fields).images
    other = opened(BASE)(**fields, refiner=str(folders[BASE]), refiner_start=share).images
    difference = float((other - plain).abs().max())
    print(f"{sampler} {share}: largest difference {difference:.1e}")
    assert difference < 1e-5


def test_a_hand_over_is_a_picture_of_its_own_and_is_made_again(opened: Any, folders: Folders) -> None:
    """Stochastic, among others and alone; the callback counts both models' evaluations."""
    counts: list[tuple[int, int]] = []
    fields = {"prompt": PROMPT, "sampler": "euler_a", "num_inference_steps": 6, "refiner": str(folders[REFINER])}
    pipe = opened(BASE)
    made = pipe.generate(parse(**fields, seed=1), output_type="pt", callback=lambda p: counts.append((p.done, p.total)))
    assert counts == [(i, 6) for i in range(1, 7)]
    again = pipe.generate([parse(prompt="two frogs", seed=5), made.requests[0]], output_type="pt")
    assert torch.equal(again.images[1], made.images[0])
    assert made.requests[0].refiner_start == 0.8
    alone = pipe.generate(parse(**{**fields, "refiner": None}, seed=1), output_type="pt").images
    assert not torch.equal(alone, made.images)


def test_what_does_not_fit_is_refused_in_a_line(opened: Any, folders: Folders, tiny_pipe: Pipeline) -> None:
    base, refiner = opened(BASE), str(folders[REFINER])
    for pipe, fields, message in (
        (tiny_pipe, {"original_size": "64,64"}, "has no use for original_size"),
        (base, {"aesthetic_score": 6}, "has no use for aesthetic_score"),
        (opened(REFINER), {"target_size": (8, 8)}, "has no use for target_size.*aesthetic_score"),
        (base, {"original_size": "64"}, "original_size = 64; give two numbers of pixels from 0 to 16384, height"),
        (base, {"target_size": "a,b"}, "target_size = no numbers; give two numbers"),
        (base, {"refiner_start": 0.5}, "refiner_start = 0.5 is about a refiner; give refiner as well"),
        (
            base,
            {"refiner": refiner, "refiner_start": 0.01},
            "0.01 of 25 steps leaves none to the model",
        ),
        (base, {"refiner": refiner, "refiner_start": 0.99}, "0.99 of 25 steps leaves none to the refiner"),
        (base, {"refiner": refiner, "hires_scale": 2}, "without hires_scale; leave one of them out"),
        (base, {"refiner": refiner, "sampler": "dpm_adaptive"}, "finds its own way between the points"),
        (base, {"refiner": tiny_pipe.model}, "does not go on with the latents"),
        (base, {"refiner": "no/such/folder"}, "no/such/folder"),
        (opened(INPAINT), {"image": drawn(0), "mask": masked(), "refiner": refiner}, "has no use for refiner"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            pipe.generate(parse(prompt=PROMPT, **fields))
        assert "\n" not in str(caught.value)


def test_the_autoencoder_is_kept_out_of_half_precision(folders: Folders) -> None:
    pipe = Pipeline(load_folder(folders[BASE], torch.float16), choose("cpu", "float16"), model="tiny")
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.float16, torch.float32)
    assert pipe.to(dtype=torch.bfloat16).vae.dtype == torch.bfloat16
    assert pipe.to(dtype=torch.float16).vae.dtype == torch.float32
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="autoencoder"):
        pipe(PROMPT, num_inference_steps=1, seed=1)
