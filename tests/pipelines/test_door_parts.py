"""What stands around a door's call: loops of one's own, callbacks, adapters, switches, opening, and what is refused."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.allocator import KEEPER, policy
from sfumato.models.layers import Attention
from sfumato.pipelines.pipeline import Pipeline
from sfumato.weights.folder import Components, save_folder
from sfumato.weights.model import save_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPT, NEGATIVE = "a red apple", "two green frogs"
CALL: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": 4, "output_type": "np"}
PARTS = """
from {library} import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from {library} import {scheduler} as Scheduler
from {words} import CLIPTextModel, CLIPTokenizer
"""
# A loop as notebooks have it, written for diffusers and transformers.
LOOP = """
vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", use_safetensors=True)
tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", use_safetensors=True)
unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
scheduler = Scheduler.from_pretrained(folder, subfolder="scheduler")
torch_device = "cpu"
vae.to(torch_device)
text_encoder.to(torch_device)
unet.to(torch_device)

prompt = ["a red apple"]
height = 40
width = 24
num_inference_steps = 5
guidance_scale = 6.0
generator = torch.manual_seed(0)
batch_size = len(prompt)

text_input = tokenizer(
    prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
)
with torch.no_grad():
    text_embeddings = text_encoder(text_input.input_ids.to(torch_device))[0]
max_length = text_input.input_ids.shape[-1]
uncond_input = tokenizer([""] * batch_size, padding="max_length", max_length=max_length, return_tensors="pt")
with torch.no_grad():
    uncond_embeddings = text_encoder(uncond_input.input_ids.to(torch_device))[0]
text_embeddings = torch.cat([uncond_embeddings, text_embeddings])

factor = 2 ** (len(vae.config.block_out_channels) - 1)
latents = torch.randn(
    (batch_size, unet.config.in_channels, height // factor, width // factor), generator=generator, device=torch_device
)
scheduler.set_timesteps(num_inference_steps)
latents = latents * scheduler.init_noise_sigma
for t in scheduler.timesteps:
    latent_model_input = torch.cat([latents] * 2)
    latent_model_input = scheduler.scale_model_input(latent_model_input, timestep=t)
    with torch.no_grad():
        noise_pred = unet(latent_model_input, t, encoder_hidden_states=text_embeddings).sample
    noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
    noise_pred = noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond)
    latents = scheduler.step(noise_pred, t, latents).prev_sample
latents = 1 / vae.config.scaling_factor * latents
with torch.no_grad():
    image = vae.decode(latents).sample
image = (image / 2 + 0.5).clamp(0, 1)
array = image.detach().cpu().permute(0, 2, 3, 1).numpy()
images = (array * 255).round().astype("uint8")
pil_images = [Image.fromarray(image) for image in images]

pipe = StableDiffusionPipeline.from_pretrained(folder, scheduler=scheduler, safety_checker=None)
pipe.set_progress_bar_config(disable=True)
whole = pipe(
    prompt, height=height, width=width, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
    generator=torch.manual_seed(0), output_type="np",
).images
"""

# From a picture, with the parts of a pipeline, older spellings, and the scheduler entered midway.
FROM_IMAGE = """
pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
vae, unet = pipe.vae, pipe.unet
scheduler = Scheduler.from_config(pipe.scheduler.config, **options)
generator = torch.manual_seed(5)
with torch.no_grad():
    init_latents = vae.encode(picture).latent_dist.sample(generator) * vae.config.scaling_factor
text_embeddings = pipe._encode_prompt("a red apple", "cpu", 1, True, "two green frogs")
scheduler.set_timesteps(10)
timesteps = scheduler.timesteps[4 * scheduler.order :]
noise = torch.randn(init_latents.shape, generator=generator)
latents = scheduler.add_noise(init_latents, noise, timesteps[:1])
for t in timesteps:
    latent_model_input = scheduler.scale_model_input(torch.cat([latents] * 2), t)
    with torch.no_grad():
        noise_pred = unet(latent_model_input, t, text_embeddings)["sample"]
    uncond, cond = noise_pred.chunk(2)
    latents = scheduler.step(uncond + 5 * (cond - uncond), t, latents, **extra(generator))["prev_sample"]
with torch.no_grad():
    out = vae.decode(latents / vae.config.scaling_factor)["sample"]
"""


def largest(a: Any, b: Any) -> float:
    """The largest difference, in levels of 255."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max()) * 255


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe(tiny_folder: Path) -> sfumato.StableDiffusionPipeline:
    """The door for text, on the tiny folder."""
    return sfumato.StableDiffusionPipeline.from_pretrained(str(tiny_folder))


@pytest.fixture
def peer(tiny_folder: Path) -> Any:
    """Diffusers' door for text, on the tiny folder."""
    import diffusers

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(str(tiny_folder), local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    return theirs


@pytest.mark.parametrize(
    "scheduler", ["EulerDiscreteScheduler", "DDIMScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"]
)
def test_a_loop_written_for_diffusers_runs_unchanged_but_for_the_import(tiny_folder: Path, scheduler: str) -> None:
    made = []
    for library, words in (("sfumato", "sfumato"), ("diffusers", "transformers")):
        names: dict[str, Any] = {"torch": torch, "Image": Image, "folder": str(tiny_folder)}
        exec(PARTS.format(library=library, words=words, scheduler=scheduler) + LOOP, names)
        made.append(names)
    ours, theirs = made
    loop, itself = largest(ours["array"], theirs["array"]), largest(ours["array"], ours["whole"])
    print(f"{scheduler}: loop beside diffusers' {loop:.5f}, beside the door {itself:.5f} of 255")
    assert loop <= 0.01 and itself <= 0.01
    assert ours["array"].shape == (1, 40, 24, 3) and float(ours["array"].std()) > 0.05
    assert [picture.size for picture in ours["pil_images"]] == [(24, 40)]


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("DDIMScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("LMSDiscreteScheduler", {}),
        ("PNDMScheduler", {"skip_prk_steps": True, "timestep_spacing": "leading"}),
    ],
)
def test_a_loop_from_a_picture(tiny_folder: Path, scheduler: str, options: dict[str, Any]) -> None:
    picture = torch.rand((1, 3, 32, 32), generator=seeded()) * 2 - 1
    made = []
    for library, words in (("sfumato", "sfumato"), ("diffusers", "transformers")):
        names: dict[str, Any] = {"torch": torch, "folder": str(tiny_folder), "options": options, "picture": picture}
        names["extra"] = lambda generator: {"generator": generator} if "Ancestral" in scheduler else {}
        exec(PARTS.format(library=library, words=words, scheduler=scheduler) + FROM_IMAGE, names)
        made.append(names["out"])
    difference = largest(*made) / 2  # of pictures in [-1, 1]
    print(f"{scheduler}: {difference:.5f} of 255")
    assert difference <= 0.01 and float(made[0].std()) > 0.05


@torch.no_grad()
def test_prompts_and_latents_step_by_step(pipe: Any, peer: Any) -> None:
    call = ([PROMPT, "a cat"], "cpu", 2, True, [NEGATIVE, ""])
    for name in ("encode_prompt", "_encode_prompt"):
        ours, theirs = getattr(pipe, name)(*call), getattr(peer, name)(*call)
        pairs = [(ours, theirs)] if isinstance(ours, torch.Tensor) else list(zip(ours, theirs, strict=True))
        for a, b in pairs:
            assert a.shape == b.shape and float((a - b).abs().max()) < 1e-5
    z = torch.randn((2, 4, 8, 8), generator=seeded())
    with torch.no_grad():
        ours, theirs = pipe.decode_latents(z), peer.decode_latents(z)
    assert largest(ours, theirs) < 0.01
    assert [np.asarray(a).tolist() for a in pipe.numpy_to_pil(ours)] == [
        np.asarray(b).tolist() for b in peer.numpy_to_pil(ours)
    ]
    with torch.no_grad():
        a, b = (p.vae.encode(torch.full((1, 3, 32, 32), 0.3)).latent_dist for p in (pipe, peer))
    for name in ("mean", "std"):
        assert float((getattr(a, name) - getattr(b, name)).abs().max()) < 1e-5
    assert float((a.sample(seeded()) - b.sample(seeded())).abs().max()) < 1e-5 and a.mode() is a.mean
    assert pipe.unet.config.in_channels == 4 and pipe.vae.config.scaling_factor == peer.vae.config.scaling_factor
    assert (pipe.device.type, pipe.dtype, pipe.unet.device.type, pipe.vae.dtype) == (
        "cpu",
        torch.float32,
        "cpu",
        torch.float32,
    )
    x = torch.randn((2, 4, 8, 8), generator=seeded())
    states = pipe.encode_prompt([PROMPT, "a"], "cpu", 1, False)[0]
    with torch.no_grad():
        a, b = (p.unet(x, torch.tensor(300), states) for p in (pipe, peer))
        assert float((a.sample - b.sample).abs().max()) < 1e-4
        assert torch.equal(pipe.unet(x, 300, encoder_hidden_states=states, return_dict=False)[0], a["sample"])
    with pytest.raises(ValueError, match="added_cond_kwargs"):
        pipe.unet(x, 300, states, added_cond_kwargs={"image_embeds": states})


def test_given_states_take_the_place_of_prompts(pipe: Any) -> None:
    states, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    words = pipe(**CALL, generator=seeded()).images
    given = CALL | {"prompt": None, "negative_prompt": None}
    both = {"prompt_embeds": states, "negative_prompt_embeds": negative}
    assert largest(words, pipe(**given, **both, generator=seeded()).images) == 0
    with pytest.raises(ValueError, match="both prompt and prompt_embeds"):
        pipe(**CALL, prompt_embeds=states)
    with pytest.raises(ValueError, match="neither prompt nor prompt_embeds"):
        pipe()


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_callbacks_see_and_change_what_diffusers_shows(pipe: Any, peer: Any, scheduler: str) -> None:
    import diffusers

    seen: list[list[Any]] = []
    pictures = []
    for library, door in ((sfumato, pipe), (diffusers, peer)):
        door.scheduler = getattr(library, scheduler).from_config(door.scheduler.config)
        steps: list[Any] = []

        def end(p: Any, i: int, t: Any, tensors: Any, steps: list[Any] = steps) -> dict[str, Any]:
            steps.append((i, float(t), tensors["latents"].clone(), tuple(tensors["prompt_embeds"].shape)))
            if i == 2:  # no guidance from here on, as diffusers' guide to callbacks does it
                p._guidance_scale = 0.0
                tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            tensors["latents"] = tensors["latents"] * 0.9
            return dict(tensors)

        names = ["latents", "prompt_embeds"]
        more = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": names}
        pictures.append(door(**CALL, **more, generator=seeded()).images)
        seen.append(steps)
    for (i, t, x, shape), (j, u, y, other) in zip(*seen, strict=True):
        assert (i, shape) == (j, other) and abs(t - u) < 1e-3 and float((x - y).abs().max()) < 1e-4 * float(y.std())
    assert largest(*pictures) <= 0.01


def test_older_callbacks_and_stopping(pipe: Any, peer: Any) -> None:
    counts: list[list[tuple[int, float]]] = [[], []]
    for door, count in zip((pipe, peer), counts, strict=True):
        more = {"callback": lambda i, t, x, count=count: count.append((i, float(t))), "callback_steps": 2}
        door(**CALL, **more, generator=seeded())
    assert counts[0] == counts[1] and len(counts[0]) == 2

    def stop(p: Any, i: int, t: Any, tensors: Any) -> Any:
        p._interrupt = i == 1
        return tensors

    ours, theirs = (p(**CALL, callback_on_step_end=stop, generator=seeded()).images for p in (pipe, peer))
    assert largest(ours, theirs) <= 0.01
    with pytest.raises(ValueError, match="'image_embeds'; known: latents"):
        pipe(**CALL, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["image_embeds"])


def test_switches_switch(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    call = CALL | {"num_images_per_prompt": 3}
    plain = pipe(**call, generator=seeded()).images
    pipe.enable_attention_slicing("max")
    assert {m.sliced for m in pipe.unet.modules() if isinstance(m, Attention)} == {1}
    pipe.enable_vae_slicing()
    assert pipe.vae.slicing and largest(pipe(**call, generator=seeded()).images, plain) < 0.01
    pipe.enable_attention_slicing()
    assert {m.sliced for m in pipe.unet.modules() if isinstance(m, Attention)} == {2}
    pipe.disable_attention_slicing()
    pipe.disable_vae_slicing()
    assert {m.sliced for m in pipe.unet.modules() if isinstance(m, Attention)} == {None} and not pipe.vae.slicing
    pipe.enable_vae_tiling()
    assert pipe.vae.tile == 32
    pipe.disable_vae_tiling()
    assert pipe.vae.tile is None
    with caplog.at_level(logging.INFO):
        pipe.enable_model_cpu_offload()
        pipe.enable_sequential_cpu_offload()
        pipe.enable_xformers_memory_efficient_attention()
    assert pipe._pipe.memory == "low" and "memory balanced: weights are on cpu" in caplog.text
    assert "xformers is passed over" in caplog.text
    assert largest(pipe(**call, generator=seeded()).images, plain) < 0.01
    pipe.remove_all_hooks()
    assert pipe._pipe.memory == "fast" and largest(pipe(**call, generator=seeded()).images, plain) == 0
    with pytest.raises(ValueError, match="enable_freeu is not supported"):
        pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)


def test_opening_and_saving(pipe: Any, peer: Any, tmp_path: Path, tiny_folder: Path) -> None:
    plain = pipe(**CALL, generator=seeded()).images
    pipe.save_pretrained(str(tmp_path / "saved"), safe_serialization=True)
    theirs = type(peer).from_pretrained(str(tmp_path / "saved"), local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    assert largest(theirs(**CALL, generator=seeded()).images, plain) <= 0.01
    save_model(pipe._pipe, tmp_path / "one.safetensors")
    others = [
        sfumato.StableDiffusionPipeline.from_single_file(str(tmp_path / "one.safetensors"), config="of/no/use"),
        sfumato.StableDiffusionPipeline.from_pretrained(
            tmp_path / "saved", safety_checker=None, requires_safety_checker=False, use_safetensors=True
        ),
        sfumato.StableDiffusionPipeline(**pipe.components),
        sfumato.StableDiffusionPipeline.from_pipe(pipe),
        sfumato.StableDiffusionPipeline.from_pipe(Pipeline.from_pretrained(tiny_folder, "float32", "cpu")),
    ]
    for other in others:
        assert largest(other(**CALL, generator=seeded()).images, plain) < 0.01
    again = sfumato.StableDiffusionImg2ImgPipeline(**pipe.components)
    assert again.unet is pipe.unet and again.vae is pipe.vae
    half = sfumato.StableDiffusionPipeline.from_pretrained(str(tiny_folder), torch_dtype=torch.bfloat16)
    assert half.dtype == half.unet.dtype == torch.bfloat16
    assert half.to("cpu", torch.float32) is half and half.vae.dtype == torch.float32
    pipe.to(torch.float64).to(device="cpu", dtype=torch.float32)
    vae = sfumato.AutoencoderKL.from_pretrained(tiny_folder / "vae")
    assert sfumato.StableDiffusionPipeline.from_pretrained(tiny_folder, vae=vae).vae is vae
    pipe.scheduler = peer.scheduler
    assert isinstance(pipe.scheduler, sfumato.DDIMScheduler)
    with pytest.raises(ValueError, match="PyTorch sees no CUDA device" if not torch.cuda.is_available() else "nothing"):
        pipe.to("cuda" if not torch.cuda.is_available() else "nothing")


def test_the_door_that_a_model_was_made_for(
    tiny_folder: Path, parts_for: Callable[[str], Components], tmp_path: Path
) -> None:
    save_folder(parts_for("upscale"), tmp_path / "upscale")
    assert type(sfumato.DiffusionPipeline.from_pretrained(tiny_folder)) is sfumato.StableDiffusionPipeline
    other = sfumato.DiffusionPipeline.from_pretrained(str(tmp_path / "upscale"), torch_dtype=torch.bfloat16)
    assert type(other) is sfumato.StableDiffusionUpscalePipeline and other.dtype == torch.bfloat16
    text = sfumato.AutoPipelineForText2Image.from_pretrained(tiny_folder)
    assert sfumato.AutoPipelineForImage2Image.from_pipe(text).unet is text.unet


def test_a_scheduler_by_hub_id(tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    (cache / "snapshots" / "abc" / "scheduler").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    sfumato.PNDMScheduler(skip_prk_steps=True).save_pretrained(cache / "snapshots" / "abc" / "scheduler")
    found = sfumato.EulerDiscreteScheduler.from_pretrained("owner/name", subfolder="scheduler", cache_dir=tmp_path)
    assert isinstance(found, sfumato.EulerDiscreteScheduler) and found.extras["skip_prk_steps"] is True
    with pytest.raises(FileNotFoundError, match=r"no scheduler/scheduler_config.json of owner/other"):
        sfumato.DDIMScheduler.from_pretrained("owner/other", cache_dir=tmp_path, local_files_only=True)


def test_pictures_are_prepared_as_in_diffusers(pipe: Any, peer: Any) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (26, 42, 3), dtype=np.uint8))
    array = rng.random((2, 26, 42, 3)).astype(np.float32)
    for image in (picture, [picture, picture], array, list(array), torch.from_numpy(array).permute(0, 3, 1, 2)):
        for size in ({}, {"height": 20, "width": 32}):
            a, b = (p.image_processor.preprocess(image, **size) for p in (pipe, peer))
            assert a.shape == b.shape and float((a - b).abs().max()) < 1e-6
    x = torch.randn(2, 3, 8, 8, generator=seeded())
    for form in ("np", "pt", "latent"):
        assert largest(*(p.image_processor.postprocess(x, output_type=form) for p in (pipe, peer))) < 1e-4
    ours, theirs = (p.image_processor.postprocess(x, do_denormalize=[True, False]) for p in (pipe, peer))
    assert np.array_equal(np.asarray(ours[0]), np.asarray(theirs[0]))
    pipe.scheduler.set_timesteps(4)
    peer.scheduler.set_timesteps(4)
    for generators in ([seeded], [seeded, lambda: seeded(8)]):
        made = []
        for door in (pipe, peer):
            some = [make() for make in generators]
            generator = some if len(some) > 1 else some[0]
            made.append(door.prepare_latents(2, 4, 32, 32, torch.float32, "cpu", generator))
        assert torch.equal(*made)


def test_forms_of_the_answer(pipe: Any) -> None:
    call = {k: v for k, v in CALL.items() if k != "output_type"}
    pil = pipe(**call, generator=seeded())
    assert isinstance(pil.images[0], Image.Image) and pil.nsfw_content_detected is None
    array = pipe(**call, generator=seeded(), output_type="np", return_dict=False)[0]
    tensor = pipe(**call, generator=seeded(), output_type="pt")["images"]
    latent = pipe(**call, generator=seeded(), output_type="latent")[0]
    assert array.shape == (1, 32, 32, 3) and tensor.shape == (1, 3, 32, 32) and latent.shape == (1, 4, 8, 8)
    assert np.array_equal((array[0] * 255).round().astype(np.uint8), np.asarray(pil.images[0]))
    assert largest(pipe.decode_latents(latent), array) == 0
    assert [t for t in pipe.progress_bar(range(3))] == [0, 1, 2]


def test_what_cannot_be_honoured_is_refused_by_name(pipe: Any, tiny_folder: Path, parts_for: Any) -> None:
    door = sfumato.StableDiffusionPipeline
    for wrong, message in (
        ({"ip_adapter_image": Image.new("RGB", (8, 8))}, "ip_adapter_image is not supported"),
        ({"cross_attention_kwargs": {"gligen": 1}}, "cross_attention_kwargs: 'gligen'"),
        ({"output_type": "jpg"}, "unknown output_type 'jpg'; known: pil, np, pt, latent"),
        ({"height": 33}, "height = 33 is not a multiple of 4; the nearest that is: 32"),
        ({"num_inference_steps": 0}, "num_inference_steps = 0"),
        ({"generator": [seeded(), seeded()]}, "2 generators for 1 pictures"),
        ({"latents": torch.zeros(1, 4, 9, 9)}, r"latents of shape \(1, 4, 9, 9\); this call needs \(1, 4, 8, 8\)"),
        ({"prompt": []}, r"prompt = \[\] with 1 pictures each makes none"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**CALL | wrong)
    with pytest.raises(TypeError, match="no argument 'negativ_prompt'"):
        pipe(PROMPT, negativ_prompt="x")
    for wrong, message in (
        ({"custom_pipeline": "lpw"}, "custom_pipeline = 'lpw' is not supported"),
        ({"safety_checker": object()}, "give safety_checker=None"),
        ({"variant": "fp8"}, "variant 'fp8'"),
    ):
        with pytest.raises(ValueError, match=message):
            door.from_pretrained(tiny_folder, **wrong)
    with pytest.raises(FileNotFoundError, match="not whole in the hub's cache"):
        door.from_pretrained("nobody/nothing", local_files_only=True)
    with pytest.raises(ValueError, match="StableDiffusionInpaintPipeline is for another kind of model"):
        sfumato.StableDiffusionInpaintPipeline.from_pipe(Pipeline(parts_for("depth")))
    with pytest.raises(ValueError, match="models with a CLIP text encoder"):
        door.from_pipe(Pipeline(parts_for("ldm-text")))
    for name, more, message in (
        ("Img2Img", {}, "needs an image"),
        ("Img2Img", {"image": Image.new("RGB", (32, 32)), "strength": 1.5}, "strength = 1.5"),
        ("Img2Img", {"image": np.zeros((32, 32))}, "image has 1 channels; a picture has 3"),
        ("Img2Img", {"image": "a path"}, "image is str; give PIL pictures, arrays or tensors"),
        ("Inpaint", {"image": Image.new("RGB", (32, 32))}, "needs a mask_image"),
        ("Inpaint", {"image": [Image.new("RGB", (8, 8))] * 3, "mask_image": Image.new("L", (8, 8))}, "3 pictures"),
    ):
        other = getattr(sfumato, f"StableDiffusion{name}Pipeline").from_pipe(pipe)
        with pytest.raises(ValueError, match=message):
            other(**CALL, **more)


def test_depth_is_estimated_where_none_is_given(parts_for: Callable[[str], Components], tmp_path: Path) -> None:
    save_folder(parts_for("depth"), tmp_path)
    door = sfumato.StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no depth_estimator; give a depth_map"):
        door(PROMPT, Image.new("RGB", (32, 32)))


@pytest.mark.parametrize("name", ["AutoencoderKL", "UNet2DConditionModel", "CLIPTextModel", "CLIPTokenizer"])
def test_a_part_that_may_not_be_fetched_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(FileNotFoundError, match="leave out local_files_only to fetch it"):
        getattr(sfumato, name).from_pretrained("nobody/nothing", subfolder="vae", local_files_only=True)


def test_a_call_prepares_networks_and_keeps_buffers(pipe: Any) -> None:
    found: list[tuple[bool, int]] = []

    def step(door: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        attention = next(m for m in door.unet.modules() if type(m) is Attention)
        found.append(("forward" in attention.__dict__, KEEPER._inside))
        return {}

    before = KEEPER._inside
    pipe(**{**CALL, "num_inference_steps": 1}, callback_on_step_end=step)
    assert found == [(True, before + (policy()[0] == "keep"))] and KEEPER._inside == before
