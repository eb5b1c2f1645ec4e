"""Features used again: exact where nothing is to be kept, and what is kept belongs to one picture."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sfumato.approximate import able, reuse
from sfumato.cond import Cond
from sfumato.diffusion.drive import Run, drive
from sfumato.diffusion.guidance import CFG
from sfumato.diffusion.recall import Recalling
from sfumato.diffusion.samplers import get_sampler
from sfumato.models.unet import UNet, UNetConfig
from sfumato.pipelines.memory import RowByRow
from sfumato.pipelines.pipeline import Pipeline
from sfumato.pipelines.request import Request, parse
from sfumato.runtime import choose

from ..tiny_sd3 import tiny_sd3

PROMPT = "a red apple"


def latents(pipe: Pipeline, **fields: object) -> Tensor:
    """The final latents of one picture of 6 steps."""
    options = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 6, "guidance_scale": 3.0, **fields}
    found = pipe.generate(parse(**options), output_type="latent").images
    assert isinstance(found, Tensor)
    return found


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def deep_runs(pipe: Pipeline, **fields: object) -> int:
    """How often the deepest part of a U-Net is run for a picture."""
    calls: list[int] = []
    handle = pipe.unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    latents(pipe, **fields)
    handle.remove()
    return len(calls)


def driven(pipe: Pipeline, sampler: str, every: int | None = None) -> Tensor:
    """The end of a run with guidance, in a wrapper of its own where `every` is given."""
    grid = pipe.plan(pipe.resolve(Request(prompt=PROMPT, seed=0, num_inference_steps=6))[0]).grid
    generator = torch.Generator().manual_seed(1)
    x, a, b = (torch.randn(size, generator=generator) for size in ((1, 4, 8, 8), (1, 16, 32), (1, 16, 32)))
    noise = torch.Generator().manual_seed(2)

    def fresh(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=noise)

    plain = CFG(Cond(a), Cond(b), 3.0)
    guidance = plain if every is None else Recalling(plain, grid, every)
    steps = get_sampler(sampler).run(x, grid, fresh)
    return drive([Run(steps, guidance, pipe.scheduler.prediction)], pipe.net)[0]


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "dpm2", "restart", "euler_a"])
def test_nothing_kept_is_exact(tiny_pipe: Pipeline, sampler: str) -> None:
    exact = driven(tiny_pipe, sampler)
    undo = reuse(tiny_pipe.unet)
    assert torch.equal(driven(tiny_pipe, sampler), exact)
    assert torch.equal(driven(tiny_pipe, sampler, 1), exact)
    assert not torch.equal(driven(tiny_pipe, sampler, 3), exact)
    undo()
    assert "forward" not in tiny_pipe.unet.__dict__
    assert torch.equal(driven(tiny_pipe, sampler, 3), exact)


@pytest.mark.parametrize(
    ("sampler", "every", "runs"),
    [
        ("dpmpp_2m", 1, 6),
        ("dpmpp_2m", 2, 3),
        ("dpmpp_2m", 4, 2),
        ("dpmpp_2m", 20, 1),
        # Two evaluations in a step, the last step has one; Heun's second is at the next step's level.
        ("heun", 1, 11),
        ("heun", 2, 1 + 2 + 2),
        ("dpm2", 2, 2 + 2 + 2),
    ],
)
def test_steps_are_counted_whatever_the_sampler_asks(tiny_pipe: Pipeline, sampler: str, every: int, runs: int) -> None:
    assert deep_runs(tiny_pipe, sampler=sampler, deep_cache=every) == runs


def test_each_picture_begins_anew(tiny_pipe: Pipeline) -> None:
    exact = latents(tiny_pipe)
    kept = latents(tiny_pipe, deep_cache=3)
    assert 0 < difference(kept, exact) < 1
    latents(tiny_pipe, deep_cache=2, prompt="two green frogs", seed=9)
    assert torch.equal(latents(tiny_pipe, deep_cache=3), kept)
    assert torch.equal(latents(tiny_pipe), exact)
    assert torch.equal(latents(tiny_pipe, deep_cache=1), exact)


def test_company_changes_nothing(tiny_pipe: Pipeline) -> None:
    """Among pictures with other settings, steps and samplers, in shared network calls."""
    wishes = [
        {"deep_cache": 2},
        {"deep_cache": 3, "num_inference_steps": 5, "seed": 4},
        {"sampler": "heun", "deep_cache": 2},
        {"seed": 8},
        {"deep_cache": 2, "pag_scale": 2.0, "pag_layers": "mid"},
        {"deep_cache": 2, "guidance_interval": "0.3,0.7"},
        {"deep_cache": 2, "prompt": "[a red apple:two green frogs:3]"},
    ]
    alone = [latents(tiny_pipe, **wish) for wish in wishes]
    tiny_pipe.batch = len(wishes)
    base = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 6, "guidance_scale": 3.0}
    together = tiny_pipe.generate([parse(**{**base, **wish}) for wish in wishes], output_type="latent").images
    for wish, one, row in zip(wishes, alone, together, strict=True):
        found = difference(one[0], row)
        print(f"{wish}: {found:.1e}")
        assert found < 1e-4


def test_a_condition_that_changes_is_read(tiny_pipe: Pipeline) -> None:
    """Kept features of the first prompt are not taken for the second one's."""
    turned = {"prompt": "[a red apple:two green frogs:3]"}
    assert deep_runs(tiny_pipe, deep_cache=20, **turned) == 2


def test_threads_do_not_see_each_other(tiny_pipe: Pipeline) -> None:
    wishes = [{"deep_cache": 2}, {}, {"deep_cache": 3, "seed": 5}, {"seed": 6}]
    alone = [latents(tiny_pipe, **wish) for wish in wishes]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda wish: latents(tiny_pipe, **wish), wishes))
    assert [difference(a, b) for a, b in zip(alone, found, strict=True)] == [0.0] * 4


def test_masks_windows_and_single_rows(tiny_pipe: Pipeline) -> None:
    image = Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 20).convert("RGB")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    asked = parse(prompt=PROMPT, image=image, mask=mask, mask_blur=0, seed=1, num_inference_steps=4, deep_cache=2)
    (picture,) = tiny_pipe.generate(asked).images
    assert picture.crop((16, 0, 32, 32)).tobytes() == image.crop((16, 0, 32, 32)).tobytes()
    large = {"width": 64, "height": 32, "tile": 32}
    assert deep_runs(tiny_pipe, **large, deep_cache=3) * 3 == deep_runs(tiny_pipe, **large)
    whole = latents(tiny_pipe, deep_cache=3)
    apart = RowByRow(tiny_pipe.net)
    apart.single = True
    tiny_pipe.net = apart  # type: ignore[method-assign, assignment]
    found = difference(latents(tiny_pipe, deep_cache=3), whole)
    print(f"row by row {found:.1e}")
    assert found < 1e-4


def test_a_transformer_looks_at_its_first_block() -> None:
    pipe = Pipeline(tiny_sd3(), choose("cpu", "float32"), model="tiny-sd3")
    blocks = pipe.transformer.transformer_blocks
    torch.manual_seed(0)
    nn.init.normal_(pipe.transformer.proj_out.weight, std=0.1)
    calls: list[int] = []
    blocks[1].register_forward_hook(lambda module, args, out: calls.append(len(args[0])))

    def runs(**fields: object) -> tuple[Tensor, list[int]]:
        calls.clear()
        z = latents(pipe, **fields)
        return z, list(calls)

    exact, every = runs()
    assert every == [2] * 6
    for limit in (0.0, 1e-9):
        same, count = runs(block_cache=limit)
        assert count == every and difference(same, exact) < 1e-5
    kept, count = runs(block_cache=1.0)
    assert count == [2]
    again, _ = runs(block_cache=1.0)
    assert torch.equal(again, kept) and not torch.equal(kept, exact)
    assert torch.equal(runs()[0], exact)


def test_rows_of_a_run_decide_together() -> None:
    """A picture at another step does not make its neighbours compute."""
    pipe = Pipeline(tiny_sd3(), choose("cpu", "float32"), model="tiny-sd3")
    wishes = [{"block_cache": 0.02}, {"block_cache": 0.02, "seed": 7, "num_inference_steps": 4}]
    alone = [latents(pipe, **wish) for wish in wishes]
    pipe.batch = 2
    base = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 6, "guidance_scale": 3.0}
    together = pipe.generate([parse(**{**base, **wish}) for wish in wishes], output_type="latent").images
    assert max(difference(one[0], row) for one, row in zip(alone, together, strict=True)) < 1e-4


def test_gradients_see_the_plain_network(tiny_pipe: Pipeline) -> None:
    net = tiny_pipe.unet
    reuse(net)
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    noted = Recalling(CFG(Cond(torch.randn(1, 16, 32)), Cond(), 1.0), (), 2)
    (query,) = noted.ask(x, tiny_pipe.plan(tiny_pipe.resolve(Request(prompt=PROMPT, seed=0))[0]).grid[0])
    net(x, torch.tensor([5.0]), query.cond).square().mean().backward()
    assert x.grad is not None and query.cond.memo is not None and query.cond.memo[0].kept is None


def test_what_cannot_says_so(tiny_pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"^block_cache is for transformers, and .* denoises with a U-Net; take deep_"):
        latents(tiny_pipe, block_cache=0.1)
    sd3 = Pipeline(tiny_sd3(), choose("cpu", "float32"), model="tiny-sd3")
    with pytest.raises(ValueError, match=r"^deep_cache is for U-Nets, and .* denoises with a transformer; take block_"):
        latents(sd3, deep_cache=2)
    flat = UNet(
        UNetConfig(
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            mid_block_type="UNetMidBlock2D",
            block_out_channels=(32,),
        )
    )
    assert able(flat) == "this U-Net has one level only"
    for net, why in ((flat, "one level only"), (nn.Linear(1, 1), "Linear is neither a U-Net nor")):
        with pytest.raises(ValueError, match=why):
            reuse(net)
    for wrong, message in (
        ({"deep_cache": 0}, "deep_cache = 0: input should be greater than or equal to 1"),
        ({"block_cache": 2}, "block_cache = 2: input should be less than or equal to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(**wrong)
