"""The fields of a request that say how to guide, from the flag to the picture."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.cond import Cond
from sfumato.diffusion.named import DDIMScheduler, DPMSolverMultistepScheduler
from sfumato.diffusion.named_flow import FlowMatchEulerDiscreteScheduler
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.pipelines.pipeline import Pipeline
from sfumato.pipelines.request import Request, parse

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
PROMPT, NEGATIVE = "a red apple on a blue background", "two green frogs"
STEPS = 10
Make = Callable[[str], Pipeline]
FIELDS: dict[str, dict[str, Any]] = {
    "rescale": {"guidance_rescale": 0.7},
    "interval": {"guidance_interval": (0.2, 0.7)},
    "cfg++": {"cfg_pp": 0.6},
    "apg": {"apg": (0.0, 2.5, -0.5)},
    "pag": {"pag_scale": 3.0},
    "threshold": {"dynamic_threshold": (0.9, 1.0)},
    "zero snr": {"rescale_betas_zero_snr": True, "spacing": "trailing"},
}


def latents(pipe: Pipeline, **fields: Any) -> torch.Tensor:
    given = {"negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "guidance_scale": 5.0, "seed": 3} | fields
    images = pipe(PROMPT, output_type="latent", **given).images
    assert isinstance(images, torch.Tensor)
    return images


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


# diffusers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peers(tiny_folder: Path) -> Callable[..., Any]:
    import diffusers

    def load(name: str, scheduler: Any, prediction: str, **options: Any) -> Any:
        kind = getattr(diffusers, type(scheduler).__name__)
        options["scheduler"] = kind.from_config({**scheduler.config}, prediction_type=prediction)
        pipe = getattr(diffusers, name).from_pretrained(str(tiny_folder), local_files_only=True, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


def both(
    pipe: Pipeline, peers: Callable[..., Any], name: str, ours: dict[str, Any], theirs: dict[str, Any], prediction: str
) -> float:
    """The largest difference of the two programs' pictures, of 255 levels."""
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(7))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)
    shared = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS}
    mine = pipe.generate(Request(**shared, **ours), noise=noise, output_type="pt").images
    assert isinstance(mine, torch.Tensor)
    options = {k: theirs.pop(k) for k in ("pag_applied_layers",) if k in theirs}
    peer = peers(name, pipe.scheduler, prediction, **options)
    reference = peer(**shared, **theirs, latents=noise.clone(), output_type="np", height=32, width=32).images
    return float(np.abs(mine.permute(0, 2, 3, 1).numpy() - reference).max()) * 255


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("amount", [0.7, 1.0])
def test_rescaled_pictures_are_diffusers(
    tiny_pipe: Pipeline, peers: Callable[..., Any], prediction: str, amount: float
) -> None:
    fields = {"guidance_scale": 7.5, "guidance_rescale": amount}
    difference = both(tiny_pipe, peers, "StableDiffusionPipeline", {**fields}, {**fields}, prediction)
    print(f"{prediction}, {amount}: {difference:.4f} of 255")
    assert difference <= 2


@pytest.mark.parametrize(
    ("scale", "layers", "rescale"), [(5.0, ["mid"], 0.0), (1.0, ["mid"], 0.0), (4.0, ["up_blocks.0", "down"], 0.5)]
)
def test_perturbed_pictures_are_diffusers(
    tiny_pipe: Pipeline, peers: Callable[..., Any], scale: float, layers: list[str], rescale: float
) -> None:
    fields = {"guidance_scale": scale, "pag_scale": 3.0, "guidance_rescale": rescale}
    ours, theirs = {**fields, "pag_layers": layers}, {**fields, "pag_applied_layers": layers}
    difference = both(tiny_pipe, peers, "StableDiffusionPAGPipeline", ours, theirs, "v_prediction")
    print(f"guidance {scale}, {layers}, rescale {rescale}: {difference:.4f} of 255")
    assert difference <= 2


@pytest.mark.parametrize(
    "kind, options",
    [
        (DDIMScheduler, {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0}),
        (DDIMScheduler, {"clip_sample": True}),
        (DDIMScheduler, {"rescale_betas_zero_snr": True}),
        (DPMSolverMultistepScheduler, {"thresholding": True, "sample_max_value": 1.5}),
    ],
)
def test_what_schedulers_limit_is_diffusers(
    tiny_pipe: Pipeline, peers: Callable[..., Any], kind: Any, options: dict[str, Any]
) -> None:
    """StableDiffusionPipeline takes clip_sample for a slip, and so do we; thresholding it applies."""
    tiny_pipe.scheduler = kind.from_config(tiny_pipe.scheduler.config, **options)
    fields = {"guidance_scale": 7.5}
    difference = both(tiny_pipe, peers, "StableDiffusionPipeline", {**fields}, {**fields}, "v_prediction")
    print(f"{kind.__name__}, {options}: {difference:.4f} of 255")
    assert difference <= 2


@pytest.mark.parametrize("options", [{"clip_sample": True, "clip_sample_range": 0.6}, {"thresholding": True}])
def test_clipping_in_a_latent_diffusion_is_diffusers(
    pipe_for: Make, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """LDMPipeline, which does what the scheduler says."""
    import diffusers

    pipe = pipe_for("unconditional")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **options)
    pipe.save_pretrained(tmp_path)
    theirs = diffusers.LDMPipeline.from_pretrained(str(tmp_path), local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    reference = theirs(generator=torch.Generator().manual_seed(7), num_inference_steps=STEPS, output_type="np").images
    mine = pipe(seed=7, sampler="ddim", num_inference_steps=STEPS, output_type="pt").images
    assert isinstance(mine, torch.Tensor)
    difference = float(np.abs(mine.permute(0, 2, 3, 1).numpy() - reference).max()) * 255
    print(f"{options}: {difference:.4f} of 255")
    assert difference <= 2
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, thresholding=False)
    free = pipe(seed=7, sampler="ddim", num_inference_steps=STEPS, output_type="pt").images
    assert isinstance(free, torch.Tensor) and apart(free, mine) > 1e-3
    assert "clip_sample" not in caplog.text


def test_clipping_of_stable_diffusion_is_said(tiny_pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    plain = latents(tiny_pipe, sampler="ddim")
    tiny_pipe.scheduler = DDIMScheduler.from_config(tiny_pipe.scheduler.config, clip_sample=True)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(latents(tiny_pipe), plain)
    assert "clip_sample = true in the scheduler is for pixels" in caplog.text


# Requests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_changes_the_picture_and_is_kept(tiny_pipe: Pipeline, name: str) -> None:
    plain = latents(tiny_pipe)
    output = tiny_pipe(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=5.0, seed=3,
        output_type="latent", **FIELDS[name],
    )  # fmt: skip
    assert isinstance(output.images, torch.Tensor) and bool(output.images.isfinite().all())
    assert apart(output.images, plain) > 1e-3, name
    kept = Request.model_validate_json(output.requests[0].model_dump_json())
    again = tiny_pipe.generate(kept, output_type="latent").images
    assert isinstance(again, torch.Tensor) and torch.equal(again, output.images)


def test_what_asks_for_nothing_changes_nothing(tiny_pipe: Pipeline) -> None:
    plain = latents(tiny_pipe)
    nothing: list[dict[str, Any]] = [
        {"guidance_rescale": 0.0},
        {"pag_scale": 0.0},
        {"guidance_interval": (0, 1)},
        {"rescale_betas_zero_snr": False},
        {"dynamic_threshold": (1.0, 1e6)},
    ]
    for fields in nothing:
        assert apart(latents(tiny_pipe, **fields), plain) < 1e-5, fields
    assert apart(latents(tiny_pipe, apg=1), plain) < 1e-4


@pytest.mark.parametrize(
    ("fields", "each"),
    [
        ({"guidance_scale": 1.0}, [1] * STEPS),
        ({"guidance_scale": 1.0, "apg": 0, "guidance_rescale": 0.5, "guidance_interval": (0, 0.5)}, [1] * STEPS),
        ({"guidance_scale": 1.0, "pag_scale": 2.0}, [1, 1] * STEPS),
        ({"guidance_scale": 3.0}, [2] * STEPS),
        ({"guidance_scale": 3.0, "guidance_interval": (0.2, 0.7)}, [1, 1, 2, 2, 2, 2, 2, 1, 1, 1]),
        ({"guidance_scale": 3.0, "pag_scale": 2.0, "guidance_interval": (0.5, 1)}, [1] * 5 + [2, 1] * 5),
        ({"guidance_scale": 1.0, "cfg_pp": 0.6}, [2] * STEPS),
    ],
)
def test_rows_that_the_network_is_shown(
    tiny_pipe: Pipeline, rows: list[int], fields: dict[str, Any], each: list[int]
) -> None:
    """Guidance scale 1 never computes the unconditional half."""
    latents(tiny_pipe, **fields)
    assert rows == each


def test_different_guidances_share_calls(tiny_parts: Any, rows: list[int]) -> None:
    """Together as alone but for the rounding of matrix products, in far fewer calls."""
    requests = [
        parse(prompt=PROMPT, negative_prompt=NEGATIVE, seed=i, guidance_scale=4.0, num_inference_steps=5, **fields)
        for i, fields in enumerate([{}, *FIELDS.values()])
    ]
    alone = Pipeline(tiny_parts).generate(requests, output_type="latent").images
    count = len(rows)
    rows.clear()
    together = Pipeline(tiny_parts, batch=len(requests)).generate(requests, output_type="latent").images
    assert isinstance(alone, torch.Tensor) and isinstance(together, torch.Tensor)
    print(f"{len(rows)} calls instead of {count}, largest difference {apart(alone, together):.1e}")
    assert apart(alone, together) < 1e-4
    assert len(rows) == 10  # one a step, and one for the perturbed


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_field_with_every_sampler(tiny_pipe: Pipeline, sampler: str) -> None:
    """All at once as far as they go together, in the pipeline."""
    names = ("rescale", "interval", "pag", "threshold", "zero snr")
    together = {field: value for name in names for field, value in FIELDS[name].items()}
    for rule in ("cfg++", "apg"):
        z = latents(tiny_pipe, sampler=sampler, num_inference_steps=4, **together, **FIELDS[rule])
        assert bool(z.isfinite().all()), (sampler, rule)


def test_perturbation_guides_a_model_without_a_prompt(pipe_for: Make) -> None:
    pipe = pipe_for("unconditional")
    fields: dict[str, Any] = {"seed": 1, "num_inference_steps": 3, "output_type": "latent"}
    assert apart(pipe(pag_scale=3.0, **fields).images, pipe(**fields).images) > 1e-4


def test_instructions_take_what_is_around_guidance(pipe_for: Make) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    pipe = pipe_for("instruct")
    plain = latents(pipe, image=image)
    for name in ("rescale", "interval", "pag", "threshold"):
        assert apart(latents(pipe, image=image, **FIELDS[name]), plain) > 1e-4, name


def test_zero_snr_begins_at_pure_noise(tiny_pipe: Pipeline) -> None:
    """With every sampler, also where the folder's scheduler has no such option; trailing unless told otherwise."""
    request = tiny_pipe.resolve(parse(prompt=PROMPT, rescale_betas_zero_snr=True))[0]
    assert request.spacing == "trailing"
    told = parse(prompt=PROMPT, rescale_betas_zero_snr=True, spacing="leading")
    assert tiny_pipe.resolve(told)[0].spacing == "leading"
    for sampler in SAMPLERS:
        plan = tiny_pipe.plan(tiny_pipe.resolve(parse(prompt=PROMPT, rescale_betas_zero_snr=True, sampler=sampler))[0])
        assert plan.grid[0].alpha < 1e-3, (sampler, plan.grid[0])
        plain = tiny_pipe.plan(tiny_pipe.resolve(parse(prompt=PROMPT, sampler=sampler))[0])
        assert plain.grid[0].alpha > 1e-3


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        ("text", {"guidance_interval": "0.5,0.52"}, "guidance_interval = 0.5,0.52 holds none of 3 steps; give a wider"),
        ("text", {"guidance_interval": "0.5"}, "guidance_interval = 0.5; give two rising shares"),
        ("text", {"guidance_interval": (0.8, 0.2)}, "guidance_interval = 0.8,0.2; give two rising shares"),
        ("text", {"guidance_rescale": 1.5}, "guidance_rescale = 1.5: .*less than or equal to 1"),
        ("text", {"cfg_pp": -1}, "cfg_pp = -1: .*greater than or equal to 0"),
        ("text", {"cfg_pp": 0.6, "apg": 0}, "cfg_pp = 0.6 and apg = 0 each say what is made"),
        ("text", {"apg": "0,-1"}, "apg = 0,-1; give a share from 0 to 1"),
        ("text", {"apg": "0,1,1"}, "apg = 0,1,1; .* a momentum between -1 and 1"),
        ("text", {"apg": "half"}, "apg = 'half'; give a number"),
        ("text", {"pag_scale": 3, "pag_layers": "top"}, "no self-attention has 'top' .* down_blocks.1, mid_block"),
        ("text", {"pag_layers": ""}, "pag_layers = '': .*at least 1"),
        ("text", {"dynamic_threshold": 0.3}, "dynamic_threshold = 0.3; give a quantile from 0.5 to 1"),
        ("text", {"dynamic_threshold": 0.99}, "dynamic_threshold = 0.99 is for pixels .* makes latents; .* 0.99,4"),
        ("inpaint", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = true, but this network predicts 'eps"),
        ("instruct", {"cfg_pp": 0.6}, "cfg_pp leads from .* is guided by an image as well; leave it out"),
        ("unconditional", {"apg": 0.0, "prompt": ""}, "apg leads from .* has no prompt; leave it out"),
        ("instruct", {"guidance_scale": 0, "pag_scale": 1}, "pag_scale needs what the network says to the prompt"),
    ],
)
def test_what_does_not_fit_is_said(pipe_for: Make, task: str, fields: dict[str, Any], message: str) -> None:
    pictures = {"image": Image.new("RGB", (32, 32)), "mask": Image.new("L", (32, 32), 255)}
    needs = {"inpaint": ("image", "mask"), "instruct": ("image",)}.get(task, ())
    given: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3} | {n: pictures[n] for n in needs} | fields
    with pytest.raises(ValueError, match=message) as caught:
        pipe_for(task)(**given)
    assert "\n" not in str(caught.value)


def test_zero_snr_needs_betas(tiny_pipe: Pipeline) -> None:
    tiny_pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="is for schedulers with betas; FlowMatchEulerDiscreteScheduler has none"):
        tiny_pipe(PROMPT, rescale_betas_zero_snr=True, sampler="euler", spacing="linspace")


def test_the_network_is_whole_after_an_error(tiny_pipe: Pipeline) -> None:
    """What a perturbed call changes is undone whatever happens in it."""
    x, cond = torch.randn(1, 4, 8, 8), Cond(context=torch.randn(1, 16, 32))
    with torch.no_grad():
        before = tiny_pipe.net(x, torch.tensor([5.0]), cond)
        with pytest.raises(ValueError, match="channels"):
            tiny_pipe.net(torch.randn(1, 3, 8, 8), torch.tensor([5.0]), cond, "identity_attention:mid")
        assert torch.equal(tiny_pipe.net(x, torch.tensor([5.0]), cond), before)
