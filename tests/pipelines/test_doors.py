"""The front doors: the same call gives the picture that it gives in diffusers, from the same folder and generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.models.depth import DepthEstimator, DPTProcessorConfig
from sfumato.pipelines import call
from sfumato.weights.folder import Components, save_folder
from sfumato.weights.model import save_model
from tests.weights.tiny_models import TINY_DEPTH

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPT, NEGATIVE = "a red apple", "two green frogs"
ONE: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": 5}
TWO = ONE | {"prompt": [PROMPT, "a cat left of a red car"], "negative_prompt": [NEGATIVE, "a blue background"]}
TEXT, IMAGE = "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"
INPAINT, DEPTH = "StableDiffusionInpaintPipeline", "StableDiffusionDepth2ImgPipeline"
INSTRUCT, UPSCALE = "StableDiffusionInstructPix2PixPipeline", "StableDiffusionUpscalePipeline"
NOTHING = {"depth_estimator": None, "feature_extractor": None}
SKIP = {"skip_prk_steps": True, "timestep_spacing": "leading"}
Folders = Callable[[str], Path]


def drawn(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    """A picture of coarse random patches."""
    patches = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST)


def seeds(count: int | None) -> Any:
    """One generator, or a list of so many."""
    if count is None:
        return torch.Generator().manual_seed(7)
    return [torch.Generator().manual_seed(i) for i in range(count)]


@pytest.fixture(scope="module")
def folders(parts_for: Callable[[str], Components], tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of tiny parts for a task."""
    root = tmp_path_factory.mktemp("doors")

    def folder(task: str) -> Path:
        if not (root / task).exists():
            save_folder(parts_for(task), root / task)
        return root / task

    return folder


@pytest.fixture(scope="module")
def pair(folders: Folders) -> Callable[..., tuple[Any, Any]]:
    """Our door and diffusers' on one folder, with a scheduler that is made of the folder's."""
    import diffusers

    known: dict[tuple[str, str], tuple[Any, Any]] = {}

    def make(task: str, name: str, scheduler: str | None = None, **options: Any) -> tuple[Any, Any]:
        if (task, name) not in known:
            ours = getattr(sfumato, name).from_pretrained(str(folders(task)))
            parts = NOTHING if name == DEPTH else {}
            theirs = getattr(diffusers, name).from_pretrained(str(folders(task)), local_files_only=True, **parts)
            theirs.set_progress_bar_config(disable=True)
            known[task, name] = ours, theirs
        ours, theirs = known[task, name]
        for library, pipe in ((sfumato, ours), (diffusers, theirs)):
            own = library.DDIMScheduler.from_pretrained(str(folders(task)), subfolder="scheduler")
            pipe.scheduler = (
                own if scheduler is None else getattr(library, scheduler).from_config(own.config, **options)
            )
        return ours, theirs

    return make


def compare(pipes: tuple[Any, Any], call: dict[str, Any], generators: int | None = None) -> None:
    """Fail above a hundredth of one level of 255; print the difference."""
    ours, theirs = (pipe(**call, generator=seeds(generators), output_type="np").images for pipe in pipes)
    assert ours.shape == theirs.shape
    difference = float(np.abs(ours - theirs).max()) * 255
    print(f"{type(pipes[0]).__name__}, {type(pipes[0].scheduler).__name__}: {difference:.5f} of 255")
    assert difference <= 0.01
    assert float(ours.std()) > 0.05, "an empty picture proves nothing"


SCHEDULERS = (
    ("DDIMScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("PNDMScheduler", SKIP),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("UniPCMultistepScheduler", {}),
    ("DDPMScheduler", {}),
    ("LCMScheduler", {}),
)


@pytest.mark.parametrize(("scheduler", "options"), SCHEDULERS)
def test_text_with_each_scheduler(pair: Any, scheduler: str, options: dict[str, Any]) -> None:
    compare(pair("text", TEXT, scheduler, **options), TWO | {"height": 40, "width": 24})


@pytest.mark.parametrize(
    ("more", "generators"),
    [
        ({"guidance_scale": 1.0}, None),
        ({"guidance_scale": 0.0}, None),
        ({"eta": 0.6}, None),
        ({"eta": 0.6, "num_images_per_prompt": 2}, 4),
        ({"guidance_rescale": 0.7, "num_images_per_prompt": 2}, None),
        ({"latents": torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1))}, None),
        ({"negative_prompt": None}, 2),
    ],
)
def test_text_with_each_argument(pair: Any, more: dict[str, Any], generators: int | None) -> None:
    compare(pair("text", TEXT), TWO | more, generators)


@pytest.mark.parametrize("own", [{"timesteps": [900, 600, 300, 100]}, {"sigmas": [10.0, 3.0, 1.0, 0.1, 0.0]}])
def test_timesteps_of_the_callers_own(pair: Any, own: dict[str, Any]) -> None:
    compare(pair("text", TEXT, "EulerDiscreteScheduler"), TWO | own)


@pytest.mark.parametrize(("scheduler", "options"), SCHEDULERS)
def test_image_to_image_with_each_scheduler(pair: Any, scheduler: str, options: dict[str, Any]) -> None:
    call = TWO | {"image": drawn(0, 44, 34), "strength": 0.7}
    compare(pair("text", IMAGE, scheduler, **options), call)


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("scheduler", ["LMSDiscreteScheduler", "PNDMScheduler"])
def test_multistep_schedulers_enter_midway(pair: Any, scheduler: str, strength: float) -> None:
    options = SKIP if scheduler == "PNDMScheduler" else {}
    call = TWO | {"num_inference_steps": 8, "image": drawn(0, 44, 34), "strength": strength}
    compare(pair("text", IMAGE, scheduler, **options), call)


def test_images_in_every_form(pair: Any) -> None:
    pipes = pair("text", IMAGE)
    pictures = [drawn(0, 40, 24), drawn(1, 40, 24)]
    arrays = np.stack([np.asarray(picture) for picture in pictures]).astype(np.float32) / 255
    tensor = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    for image in (pictures, arrays, list(arrays), tensor, 2 * tensor - 1, torch.randn(2, 4, 8, 8) * 0.3):
        compare(pipes, TWO | {"image": image, "num_images_per_prompt": 2})
    compare(pipes, TWO | {"image": pictures[0]}, 2)  # one picture for two generators


@pytest.mark.parametrize("generators", [None, 2])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("task", ["inpaint", "text"])
def test_inpainting(pair: Any, task: str, strength: float, generators: int | None) -> None:
    call = TWO | {"image": drawn(0, 40, 24), "mask_image": drawn(3, 40, 24), "strength": strength}
    compare(pair(task, INPAINT), call | {"height": 32, "width": 40}, generators)


@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"])
def test_inpainting_with_a_model_for_text(pair: Any, scheduler: str, strength: float) -> None:
    mask = np.zeros((32, 32), dtype=np.float32)
    mask[:, 13:] = 1
    call = ONE | {"image": drawn(0), "mask_image": mask, "strength": strength}
    options = SKIP if scheduler == "PNDMScheduler" else {}
    compare(pair("text", INPAINT, scheduler, **options), call)


def test_depth(pair: Any) -> None:
    far = torch.from_numpy(np.random.default_rng(1).random((1, 24, 20)).astype(np.float32)) * 30 + 4
    compare(pair("depth", DEPTH), TWO | {"image": drawn(0, 42, 26), "depth_map": far})


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
def test_depth_is_estimated_as_in_diffusers(parts_for: Callable[[str], Components], tmp_path: Path) -> None:
    """By the estimator of a folder, and by that of a single file, which moves along with the rest."""
    import diffusers

    torch.manual_seed(0)
    estimator = DepthEstimator(TINY_DEPTH, DPTProcessorConfig(size=(64, 64))).eval()
    torch.nn.init.constant_(estimator.head.get_parameter("head.4.bias"), 1)  # else all of it is cut off at 0
    parts = replace(parts_for("depth"), depth_estimator=estimator)
    save_folder(parts, tmp_path / "folder")
    save_model(parts, tmp_path / "one.safetensors")
    ours = sfumato.StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / "folder")
    theirs = diffusers.StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    call = ONE | {"image": drawn(0, 42, 26), "strength": 0.9}
    compare((ours, theirs), call)
    single = sfumato.StableDiffusionDepth2ImgPipeline.from_single_file(tmp_path / "one.safetensors")
    compare((single, ours), call)
    assert single.to(torch.float64).depth_estimator is single.components["depth_estimator"]
    assert {p.dtype for p in single.components["depth_estimator"].parameters()} == {torch.float64}


@pytest.mark.parametrize("image_scale", [1.7, 0.5])
def test_instructions(pair: Any, image_scale: float) -> None:
    call = TWO | {"image": drawn(0, 42, 26), "image_guidance_scale": image_scale}
    compare(pair("instruct", INSTRUCT, "EulerAncestralDiscreteScheduler"), call)


@pytest.mark.parametrize("generators", [None, 2])
def test_upscaling(pair: Any, generators: int | None) -> None:
    call = TWO | {"image": [drawn(0, 18, 14), drawn(1, 18, 14)], "noise_level": 30}
    compare(pair("upscale", UPSCALE), call, generators)


def test_defaults_are_those_of_diffusers(folders: Folders) -> None:
    import inspect

    import diffusers

    for name in (TEXT, IMAGE, INPAINT, DEPTH, INSTRUCT, UPSCALE):
        ours, theirs = (inspect.signature(getattr(lib, name).__call__).parameters for lib in (sfumato, diffusers))
        common = inspect.signature(call.Call).parameters
        for argument, wanted in theirs.items():
            found = ours.get(argument) or common.get(argument)
            if argument in ("self", "kwargs") or argument in call.REFUSED:
                continue
            assert found is not None, f"{name} has no {argument}"
            if argument == "callback_steps":
                continue
            default = list(found.default) if isinstance(found.default, tuple) else found.default
            assert default == wanted.default, f"{name}: {argument}"


@pytest.mark.parametrize("task", ["text", "inpaint"])
def test_old_schedulers_are_set_right(folders: Folders, task: str) -> None:
    import diffusers

    name = {"text": TEXT, "inpaint": INPAINT}[task]
    parts = dict(beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear")
    kind = {"text": "DDIMScheduler", "inpaint": "PNDMScheduler"}[task]
    pipes = []
    for library in (sfumato, diffusers):
        scheduler = getattr(library, kind)(**parts)
        pipe = getattr(library, name).from_pretrained(str(folders(task)), scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        pipes.append(pipe)
    more = {"image": drawn(0), "mask_image": drawn(3)} if task == "inpaint" else {}
    compare((pipes[0], pipes[1]), ONE | more)
    assert pipes[0].scheduler.config.steps_offset == 1


@pytest.mark.parametrize("task", ["inpaint", "text"])
@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "DDPMScheduler"])
def test_inpainting_with_fresh_noise(pair: Any, task: str, scheduler: str) -> None:
    """Diffusers draws for the latents of the masked picture also where the model is not told of them."""
    call = ONE | {"image": drawn(0), "mask_image": drawn(3), "strength": 0.8}
    compare(pair(task, INPAINT, scheduler), call)


@pytest.mark.parametrize("generators", [None, 2])
@pytest.mark.parametrize("task", ["inpaint", "text"])
def test_inpainting_beside_latents_of_ones_own(pair: Any, task: str, generators: int | None) -> None:
    pipes = pair(task, INPAINT, "EulerAncestralDiscreteScheduler")
    call = TWO | {"image": drawn(0), "mask_image": drawn(3), "strength": 0.8}
    for count in (1, 2):
        latents = torch.randn((count, 4, 8, 8), generator=torch.Generator().manual_seed(1))
        compare(pipes, call | {"masked_image_latents": latents}, generators)
    with pytest.raises(ValueError, match=r"masked_image_latents of shape \(1, 4, 9, 9\).* needs \(n, 4, 8, 8\)"):
        pipes[0](**call, masked_image_latents=torch.zeros(1, 4, 9, 9))


@pytest.mark.parametrize("box", [(20, 24, 52, 56), (40, 8, 64, 16), (0, 40, 24, 72)])
@pytest.mark.parametrize("task", ["inpaint", "text"])
def test_inpainting_of_a_part(pair: Any, task: str, box: tuple[int, int, int, int]) -> None:
    """`padding_mask_crop`, with a mask of three levels; the rest of the picture comes back."""
    pipes, image, mask = pair(task, INPAINT), drawn(0, 64, 72), Image.new("L", (64, 72))
    mask.paste(90, box)
    mask.paste(255, (box[0] + 4, box[1] + 2, box[2] - 4, box[3] - 2))
    call = {k: v for k, v in ONE.items() if k != "num_inference_steps"} | {"num_inference_steps": 4, "strength": 0.8}
    call |= {"image": image, "mask_image": mask, "padding_mask_crop": 4, "num_images_per_prompt": 2}
    ours, theirs = (
        [np.asarray(picture).astype(int) for picture in pipe(**call, generator=seeds(2)).images] for pipe in pipes
    )
    for a, b in zip(ours, theirs, strict=True):
        print(f"a part, {task}: largest difference {np.abs(a - b).max()} of 255")
        assert a.shape == b.shape == (72, 64, 3) and np.abs(a - b).max() <= 2
        black = np.asarray(mask) == 0
        assert np.array_equal(a[black], np.asarray(image)[black]) and np.abs(a - np.asarray(image)).max() > 20
    array = pipes[0](**call, generator=seeds(2), output_type="np").images
    assert np.array_equal((array * 255).round(), np.stack(ours))


def test_a_part_that_cannot_be_cut_out(pair: Any) -> None:
    door, good = pair("text", INPAINT)[0], {"image": drawn(0), "mask_image": drawn(3), "padding_mask_crop": 4}
    for wrong, message in (
        ({"padding_mask_crop": -1}, "padding_mask_crop = -1; give 0 or more pixels"),
        ({"image": np.zeros((32, 32, 3))}, "image and mask_image of ndarray and Image; give one PIL picture each"),
        ({"image": None}, "needs an image; give a picture"),
        ({"mask_image": drawn(3, 16, 24)}, "the mask has 16x24 pixels and the image 32x32; give a mask of the image's"),
        ({"mask_image": Image.new("L", (32, 32))}, "the mask is black everywhere; paint white what"),
        ({"output_type": "latent"}, "output_type = 'latent'; give 'pil', 'np' or 'pt'"),
    ):
        with pytest.raises(ValueError, match=message):
            door(**ONE | good | wrong)


IMAGES: dict[str, dict[str, Any]] = {
    TEXT: {},
    IMAGE: {"image": drawn(0), "strength": 0.7},
    INPAINT: {"image": drawn(0), "mask_image": drawn(3)},
    DEPTH: {"image": drawn(0), "depth_map": torch.arange(64.0).reshape(1, 8, 8)},
    UPSCALE: {"image": drawn(0, 8, 8)},
}


@pytest.mark.parametrize("name", IMAGES)
def test_layers_of_the_text_tower_are_left_out(pair: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = {TEXT: "text", IMAGE: "text", INPAINT: "inpaint", DEPTH: "depth", UPSCALE: "upscale"}[name]
    pipes = pair(task, name)
    # Diffusers reads the last norm there; towers of transformers 5 have it themselves.
    monkeypatch.setattr(type(pipes[1].text_encoder), "text_model", property(lambda tower: tower), raising=False)
    plain, skipped = (
        pipes[0](**ONE, **IMAGES[name], clip_skip=skip, generator=seeds(None), output_type="np").images
        for skip in (None, 1)
    )
    assert float(np.abs(plain - skipped).max()) * 255 > 0.5
    compare(pipes, ONE | IMAGES[name] | {"clip_skip": 1})
