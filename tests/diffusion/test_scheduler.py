"""The facade: the same numbers as the driver, the protocol, and the sample that the caller hands over."""

from __future__ import annotations

from pathlib import Path as FilePath

import pytest
import torch
from torch import Tensor

from sfumato.cond import Cond
from sfumato.diffusion import (
    SAMPLERS,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowPath,
    HeunDiscreteScheduler,
    Path,
    PictureNoise,
    Plain,
    PNDMScheduler,
    Run,
    Scheduler,
    VEPath,
    drive,
    make_grid,
)

from .oracle import VP

LISTED = [name for name, entry in SAMPLERS.items() if not entry.adaptive]  # those with a list of timesteps


def net(x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
    """An elementwise toy network."""
    t = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1)
    return torch.sin(3 * x) * 0.3 + x * (t / 1000)


def noise_of(seed: int) -> tuple[torch.Generator, PictureNoise]:
    """A generator, and a sampler's noise source that draws from it."""
    generator = torch.Generator().manual_seed(seed)
    return generator, PictureNoise(generator)


def loop(scheduler: Scheduler, x: Tensor, generator: torch.Generator | None, start: int = 0) -> Tensor:
    """The loop that everybody writes."""
    for t in scheduler.timesteps[start * scheduler.order :]:
        out = net(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("spacing", ["trailing", "karras"])
@pytest.mark.parametrize("path", [VP, VEPath(), FlowPath(3.0)], ids=["vp", "ve", "flow"])
@pytest.mark.parametrize("name", LISTED)
def test_facade_equals_driver_bit_for_bit(name: str, path: Path, spacing: str) -> None:
    """The same coroutine, driven from outside and from inside, in float32."""
    scheduler = Scheduler(path, name, "v_prediction", spacing)
    scheduler.set_timesteps(9)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    ours = loop(scheduler, x, noise_of(7)[0])
    grid = make_grid(path, spacing, 9)
    run = Run.begin(SAMPLERS[name], x, grid, noise_of(7)[1], Plain(Cond()), "v_prediction")
    (theirs,) = drive([run], net)
    apart = (ours - theirs).abs().max().item()
    print(f"{name}: largest difference {apart}")
    assert torch.isfinite(ours).all()
    assert apart == 0


def test_named_facade_equals_driver_with_its_plan() -> None:
    """A named facade's plan, driven, gives its loop's result: bit for bit where samples are x, and to float32
    rounding where they are x / alpha."""
    noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    for name in sorted(Scheduler.makers()):
        scheduler = Scheduler.makers()[name]()
        options = {"clip_sample": False} if "clip_sample" in scheduler.option_names() else {}
        scheduler = type(scheduler).from_config(scheduler.config, **options)
        scheduler.set_timesteps(8)
        ours = loop(scheduler, noise * scheduler.init_noise_sigma, noise_of(7)[0])
        plan = scheduler.plan(8)
        x = noise * plan.init_scale
        run = Run.begin(plan.sampler, x, plan.grid, noise_of(7)[1], Plain(Cond()), scheduler.rule)
        (theirs,) = drive([run], net)
        scale = theirs.abs().max().item()
        apart = (ours - theirs).abs().max().item() / scale
        print(f"{name}: largest difference {apart:.1e} of the range")
        straight = scheduler.scale(plan.grid[0]) != 1
        assert apart < 2e-5 if straight else apart == 0


def test_where_sampling_ends() -> None:
    """With set_alpha_to_one false, as Stable Diffusion's folders have it: DDIM and PLMS stop at the first row of the
    table, and what takes only a grid's ends; samplers that no class stands for go on to the data."""
    options = {"set_alpha_to_one": False}
    for scheduler in (DDIMScheduler(**options), PNDMScheduler(skip_prk_steps=True, **options)):
        stop = {name for name in SAMPLERS if scheduler.grid(10, None, name)[-1].sigma > 0}
        assert stop == {"ddim", "plms", "tcd", "deis", "dpm_fast", "dpm_adaptive"}


@pytest.mark.parametrize("name", LISTED)
def test_step_honours_the_sample_it_is_handed(name: str) -> None:
    """Pasting known pixels over the sample between steps changes what follows, as in a driver's callback."""
    scheduler = Scheduler(VP, name, "v_prediction")
    scheduler.set_timesteps(6)
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    generator, _ = noise_of(7)
    y = x
    for i, t in enumerate(scheduler.timesteps):
        y = scheduler.step(net(y, t), t, y, generator=generator).prev_sample
        if i == 2:
            y = y.clone()
            y[:, :, :2] = 0.5

    def paste(run: Run) -> None:
        if run.done == 3:
            run.x = run.x.clone()
            run.x[:, :, :2] = 0.5

    grid = make_grid(VP, "trailing", 6)
    run = Run.begin(SAMPLERS[name], x, grid, noise_of(7)[1], Plain(Cond()), "v_prediction")
    (theirs,) = drive([run], net, paste)
    plain = loop(scheduler, x, noise_of(7)[0])
    if name == "lcm":  # forgets its sample at every step
        plain = torch.zeros_like(y)
    print(f"{name}: driver {(y - theirs).abs().max().item()}, unedited {(y - plain).abs().max().item():.3f}")
    assert torch.equal(y, theirs)
    assert (y - plain).abs().max() > 1e-3


def test_starting_in_the_middle_continues_the_grid() -> None:
    """Entering at a later timestep equals driving the rest of the grid, also where timesteps repeat."""
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    for scheduler in (
        DDIMScheduler(clip_sample=False),
        HeunDiscreteScheduler(),
        PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        EulerDiscreteScheduler(),
    ):
        scheduler.set_timesteps(10)
        plan = scheduler.plan(10)
        start = 6 if isinstance(scheduler, PNDMScheduler) else 5  # PLMS lists its second time twice
        y = loop(scheduler, x / scheduler.scale(plan.grid[5]), noise_of(0)[0], start)
        rest = (scheduler.entered(plan, 5), x, plan.grid[5:])
        (theirs,) = drive([Run.begin(*rest, noise_of(0)[1], Plain(Cond()), "epsilon")], net)
        apart = (y - theirs).abs().max().item() / theirs.abs().max().item()
        print(f"{type(scheduler).__name__}: {apart:.1e}")
        assert apart < 1e-5


def test_repeating_a_run_needs_no_new_set_timesteps() -> None:
    """After the last step the next call begins anew."""
    for name in ("heun", "plms", "dpmpp_2m"):
        scheduler = Scheduler(VP, name, "v_prediction")
        scheduler.set_timesteps(5)
        x = torch.ones(1, 3, 4, 4)
        assert torch.equal(loop(scheduler, x, noise_of(0)[0]), loop(scheduler, x, noise_of(0)[0]))


def test_steps_out_of_turn_begin_anew() -> None:
    """One-step samplers can be called at any of the timesteps; others than these are refused."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    x = torch.ones(1, 3, 4, 4)
    first = scheduler.step(net(x, 500), 500, x).prev_sample
    scheduler.step(net(x, 900), 900, x)
    assert torch.equal(scheduler.step(net(x, 500), 500, x).prev_sample, first)
    with pytest.raises(ValueError, match="timestep 501"):
        scheduler.step(x, 501, x)


def test_eta_and_noise_arguments() -> None:
    """eta and variance_noise work on DDIM, one generator an image makes images independent, others refuse eta."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    x = torch.ones(2, 3, 4, 4)
    quiet = scheduler.step(x, 500, x).prev_sample
    noisy = scheduler.step(x, 500, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
    assert (quiet - noisy).abs().max() > 1e-4  # the deterministic part goes lower, no noise is added
    both = [torch.Generator().manual_seed(s) for s in (1, 2)]
    pair = scheduler.step(x, 500, x, eta=1.0, generator=both).prev_sample
    second = torch.Generator().manual_seed(2)
    alone = scheduler.step(x[1:], 500, x[1:], eta=1.0, generator=second).prev_sample
    assert torch.equal(pair[1:], alone)
    euler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="eta is an option of DDIM"):
        euler.step(x, euler.timesteps[0], x, eta=0.5)


def test_protocol_surface() -> None:
    """Attributes that notebooks read, and both shapes of step's answer."""
    scheduler = HeunDiscreteScheduler(steps_offset=1)
    scheduler.set_timesteps(10, device="cpu")
    assert scheduler.order == 2 and len(scheduler.timesteps) == 19 and len(scheduler.sigmas) == 20
    assert scheduler.num_inference_steps == 10 and len(scheduler) == scheduler.num_train_timesteps == 1000
    assert scheduler.timesteps.dtype == torch.float32 and DDPMScheduler().timesteps.dtype == torch.int64
    assert scheduler.alphas_cumprod.shape == (1000,)
    assert scheduler.init_noise_sigma == pytest.approx(scheduler.sigmas.max().item())
    x = torch.ones(1, 3, 4, 4)
    t = scheduler.timesteps[0]
    named = scheduler.step(x, t, x)
    pair = scheduler.step(x, t, x, return_dict=False)
    assert torch.equal(named.prev_sample, pair[0]) and torch.equal(named[1], pair[1])
    assert named.pred_original_sample.shape == x.shape
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(AttributeError, match="alphas_cumprod"):
        _ = flow.alphas_cumprod
    half = x.half()
    assert scheduler.step(half, t, half).prev_sample.dtype == torch.float16


def test_a_curve_that_is_asked_for_replaces_the_configured_one() -> None:
    """karras and exponential are two options of a configuration; a plan has one of them."""
    grids = {
        (configured, asked): DPMSolverMultistepScheduler(**{f"use_{configured}_sigmas": True}).plan(6, None, asked).grid
        for configured in ("karras", "exponential")
        for asked in ("karras", "exponential")
    }
    assert grids["karras", "exponential"] == grids["exponential", "exponential"]
    assert grids["exponential", "karras"] == grids["karras", "karras"] != grids["karras", "exponential"]


def test_wrong_numbers_of_steps_are_refused() -> None:
    """With the range."""
    for scheduler in (DDIMScheduler(), EulerDiscreteScheduler(), Scheduler(VP)):
        for steps in (0, 1001):
            with pytest.raises(ValueError, match="between 1 and 1000"):
                scheduler.set_timesteps(steps)


def test_timesteps_may_change_their_dtype_only() -> None:
    """Well-known notebooks assign `scheduler.timesteps.to(torch.float32)`."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    scheduler.timesteps = scheduler.timesteps.to(torch.float32)
    assert scheduler.timesteps.dtype == torch.float32
    x = torch.ones(1, 1, 2, 2)
    assert torch.equal(scheduler.step(x, scheduler.timesteps[0], x).prev_sample, scheduler.step(x, 900, x).prev_sample)
    with pytest.raises(ValueError, match="timesteps follow from set_timesteps"):
        scheduler.timesteps = scheduler.timesteps + 1
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.dtype == torch.int64


def test_input_scaling_without_a_timestep() -> None:
    x = torch.ones(1, 1, 2, 2)
    assert DDIMScheduler().scale_model_input(x) is x
    with pytest.raises(TypeError, match=r"EulerDiscreteScheduler\.scale_model_input needs the timestep"):
        EulerDiscreteScheduler().scale_model_input(x)


def test_a_sampler_without_timesteps_is_refused() -> None:
    """dpm_adaptive finds its points on the way: there is no list to loop over."""
    with pytest.raises(ValueError, match="dpm_adaptive finds its points while it runs"):
        Scheduler(VP, "dpm_adaptive").set_timesteps(10)


def test_noise_inside_a_step_belongs_to_the_picture() -> None:
    """One of two pictures with a generator each gets what it gets alone, from a solver on a Brownian path, too."""
    scheduler = Scheduler(VP, "dpmpp_sde", "v_prediction")
    scheduler.set_timesteps(6)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))

    def draw(rows: Tensor, seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for t in scheduler.timesteps:
            rows = scheduler.step(net(rows, t), t, rows, generator=generators).prev_sample
        return rows

    assert torch.equal(draw(x, [1, 2])[1:], draw(x[1:], [2]))
    torch.manual_seed(4)
    first = loop(scheduler, x, None)
    second = loop(scheduler, x, None)
    torch.manual_seed(4)
    assert torch.equal(first, loop(scheduler, x, None)) and not torch.equal(first, second)


def test_plain_schedulers_cannot_be_saved(tmp_path: FilePath) -> None:
    """They have no configuration that could be loaded again, and say so."""
    with pytest.raises(ValueError, match="has no configuration to save"):
        Scheduler(VP, "heun").save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
