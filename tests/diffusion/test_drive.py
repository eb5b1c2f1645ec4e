"""The one loop: batching, progress, joining, leaving."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from sfumato.cond import Cond
from sfumato.diffusion import (
    CFG,
    SAMPLERS,
    Driver,
    FlowPath,
    Plain,
    Point,
    Query,
    Run,
    VEPath,
    drive,
    edm,
    get_sampler,
    make_grid,
)

from .oracle import DEVIATION, MEAN, VP


class Net:
    """An elementwise toy network that depends on x, t and the condition, and counts calls and rows."""

    def __init__(self) -> None:
        self.calls = self.rows = 0

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.calls += 1
        self.rows += len(x)
        assert cond.context is not None and len(t) == len(x) == len(cond.context)
        push = cond.context[:, 0, 0].to(x.dtype).view(-1, 1, 1, 1)
        return torch.tanh(x) * (t / 1000).view(-1, 1, 1, 1) + 0.1 * push


def cond(value: float, length: int = 3) -> Cond:
    """A condition with one number in it."""
    return Cond(context=torch.full((1, length, 2), value, dtype=torch.float64))


def seeded(seed: int) -> tuple[Tensor, partial[Tensor]]:
    """A first x in float64 and a noise source of its own."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    return draw(1, 2, 4, 4), partial(lambda draw, x: draw(x.shape), draw)


def mixed() -> list[Run]:
    """Runs of every sampler, with different steps, spacings, scales, predictions and paths."""
    runs = []
    spacings = ("trailing", "karras", "leading", "exponential", "linspace")
    for i, name in enumerate(SAMPLERS):
        x, noise = seeded(i)
        grid = make_grid(VP, spacings[i % 5], 8 + i)
        guidance = CFG(cond(0.1 * i), cond(0.0), (1.0, 3.0, 7.5)[i % 3])
        prediction = ("v_prediction", "epsilon", "sample")[i % 3]
        runs.append(Run.begin(get_sampler(name), x, grid, noise, guidance, prediction))
    x, noise = seeded(99)
    flow = make_grid(FlowPath(3.0), "linspace", 9)
    runs.append(Run.begin(get_sampler("heun"), x, flow, noise, Plain(cond(0.5)), "flow_prediction"))
    return runs


def test_a_picture_does_not_depend_on_its_batch() -> None:
    """Mixed runs driven together equal the same runs driven alone, bit for bit, with far fewer calls."""
    together, alone = Net(), Net()
    batched = drive(mixed(), together)
    single = [drive([run], alone)[0] for run in mixed()]
    apart = max((a - b).abs().max().item() for a, b in zip(batched, single, strict=True))
    print(f"largest difference {apart}; {together.calls} calls instead of {alone.calls}, {together.rows} rows")
    assert apart == 0
    assert together.calls < alone.calls / 4
    assert together.rows == alone.rows


def test_shapes_and_conditions_are_grouped() -> None:
    """Pictures of two sizes and texts of two lengths: one call a group and turn."""
    net = Net()
    grid = make_grid(VP, "trailing", 5)

    def start(size: int, length: int) -> Run:
        x = torch.zeros(1, 2, size, size)
        guidance = Plain(Cond(context=torch.zeros(1, length, 2)))
        return Run.begin(get_sampler("euler"), x, grid, torch.randn_like, guidance, "v")

    results = drive([start(4, 3), start(6, 3), start(4, 3), start(4, 5)], net)
    assert [tuple(r.shape[2:]) for r in results] == [(4, 4), (6, 6), (4, 4), (4, 4)]
    assert net.calls == 3 * 5
    assert all(r.dtype == torch.float32 for r in results)


def test_progress_preview_and_total() -> None:
    """on_step sees done count up to the dry run's total, and the predicted picture each time."""
    seen: list[tuple[int, int]] = []
    (run,) = [Run.begin(get_sampler("heun"), *_heun_arguments())]

    def on_step(run: Run) -> None:
        assert run.x0 is not None and run.x0.shape == run.x.shape
        seen.append((run.done, run.total))

    (result,) = drive([run], Net(), on_step)
    assert seen == [(i, 11) for i in range(1, 12)]
    assert result is run.result


def _heun_arguments() -> tuple:
    x, noise = seeded(5)
    return x, make_grid(VP, "trailing", 6), noise, Plain(cond(0.2)), "v_prediction"


def test_callback_may_edit_x() -> None:
    """What on_step writes to run.x is what is evaluated next."""
    arguments = _heun_arguments()
    plain = drive([Run.begin(get_sampler("euler"), *arguments)], Net())[0]
    edited = Run.begin(get_sampler("euler"), *arguments)

    def nudge(run: Run) -> None:
        if run.done == 3:
            run.x = run.x + 1

    apart = (drive([edited], Net(), nudge)[0] - plain).abs().max().item()
    print(f"the edit moved the result by {apart:.3f}")
    assert apart > 0.01


def test_cancelling_one_leaves_the_others() -> None:
    """A cancelled run stops at once, has no result and changes nobody else's."""
    reference = drive(mixed(), Net())
    runs = mixed()

    def on_step(run: Run) -> bool:
        return not (run is runs[1] and run.done == 4)

    results = drive(runs, Net(), on_step)
    assert runs[1].result is None and runs[1].done == 4
    left = [r for i, r in enumerate(reference) if i != 1]
    apart = max((a - b).abs().max().item() for a, b in zip(results, left, strict=True))
    print(f"largest difference {apart}")
    assert apart == 0


def test_joining_and_leaving_between_turns() -> None:
    """A run that joins late shares calls from then on and ends as it would alone."""
    first, late = mixed()[:2]
    driver = Driver(Net())
    driver.add(first)
    for _ in range(3):
        assert driver.turn() == [first]
    driver.add(late)
    assert driver.turn() == [first, late]
    calls = driver.calls
    driver.cancel(first)
    while driver.active:
        driver.turn()
    alone = drive([mixed()[1]], Net())[0]
    assert calls == 4 and first.result is None and late.result is not None
    apart = (late.result - alone).abs().max().item()
    print(f"largest difference {apart}")
    assert apart == 0
    driver.cancel(first)
    driver.add(late)
    assert driver.active == []


def test_perturbed_queries_reach_the_network_apart() -> None:
    """A guidance that asks with a perturbation gets calls of its own that name it."""

    class Perturbed:
        """Twice the answer less the perturbed one."""

        def ask(self, x: Tensor, point: Point) -> list[Query]:
            return [Query(x, point, cond(0.3)), Query(x, point, cond(0.3), "identity_attention")]

        def combine(self, x: Tensor, point: Point, answers: list[Tensor]) -> Tensor:
            return 2 * answers[0] - answers[1]

    asked: list[str | None] = []

    def net(x: Tensor, t: Tensor, cond: Cond, perturb: str | None = None) -> Tensor:
        asked.append(perturb)
        return x * 0

    x, noise = seeded(0)
    grid = make_grid(VP, "trailing", 2)
    drive([Run.begin(get_sampler("ddim"), x, grid, noise, Perturbed(), "v")], net)
    assert asked == [None, "identity_attention"] * 2


def test_edm_preconditioning_end_to_end() -> None:
    """A perfect EDM network for Gaussian data on the VE path makes samples of its mean and deviation."""
    row = edm(DEVIATION)

    def net(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        sigma = (4 * t).exp().view(-1, 1, 1, 1)  # the network is told c_noise = ln(sigma) / 4
        noisy = x * (sigma**2 + DEVIATION**2).sqrt()  # and shown c_in * x
        x0 = MEAN + DEVIATION**2 / (DEVIATION**2 + sigma**2) * (noisy - MEAN)
        points = VEPath().at(t)
        c_skip = DEVIATION**2 / (points.sigma**2 + DEVIATION**2)
        c_out = points.sigma * DEVIATION / (points.sigma**2 + DEVIATION**2).sqrt()
        return (x0 - c_skip * noisy) / c_out

    grid = make_grid(VEPath(), "karras", 30)
    noise = torch.randn(1, 1, 100, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    run = Run.begin(get_sampler("heun"), 80 * noise, grid, torch.randn_like, Plain(Cond()), row)
    (x,) = drive([run], net)
    print(f"mean {x.mean().item():.4f} ({MEAN}), deviation {x.std().item():.4f} ({DEVIATION})")
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(DEVIATION, rel=0.03)


def test_a_grid_without_steps_returns_x() -> None:
    """The run is over before it begins."""
    x, noise = seeded(0)
    run = Run.begin(get_sampler("euler"), x, [VP.point(5)], noise, Plain(cond(0)), "v")
    assert drive([run], Net())[0] is x


def test_eps_at_pure_noise_is_refused_in_the_loop() -> None:
    """The driver passes on the prediction's error."""
    x, noise = seeded(0)
    grid = make_grid(FlowPath(), "linspace", 3)
    with pytest.raises(ValueError, match=r"'epsilon'.*alpha = 0"):
        drive([Run.begin(get_sampler("euler"), x, grid, noise, Plain(cond(0)), "eps")], Net())
