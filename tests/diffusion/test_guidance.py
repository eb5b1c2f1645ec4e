"""Ask and combine."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sfumato.cond import Cond
from sfumato.diffusion import CFG, Plain, Point, Run, drive, get_sampler, make_grid
from sfumato.diffusion.around import Within
from sfumato.diffusion.guidance import InstructCFG, Turns
from sfumato.diffusion.path import FlowPath, VPPath
from sfumato.diffusion.samplers import SAMPLERS

from .oracle import VP

X = torch.randn(1, 2, 3, 3)
COND, UNCOND = Cond(context=torch.ones(1, 4, 8)), Cond(context=torch.zeros(1, 4, 8))


def test_plain_asks_once() -> None:
    """And takes the answer as it is."""
    (query,) = Plain(COND).ask(X, VP.point(500))
    assert query.cond is COND and query.x is X and query.perturb is None
    assert torch.equal(Plain(COND).combine(X, query.point, [X]), X)


def test_cfg_extrapolates() -> None:
    """uncond + scale * (cond - uncond), cond asked first."""
    guidance = CFG(COND, UNCOND, 3.0)
    queries = guidance.ask(X, VP.point(500))
    assert [q.cond for q in queries] == [COND, UNCOND]
    combined = guidance.combine(X, VP.point(500), [X + 1, X])
    print(f"largest difference {(combined - X - 3).abs().max().item():.2e}")
    assert torch.allclose(combined, X + 3)


def test_scale_one_asks_once() -> None:
    """There is nothing to extrapolate; scale 0 needs both questions' order kept, so it asks twice."""
    assert len(CFG(COND, UNCOND, 1.0).ask(X, VP.point(500))) == 1
    assert len(CFG(COND, UNCOND, 0.0).ask(X, VP.point(500))) == 2


def test_interval_bounds_where_two_questions_are_asked() -> None:
    """Both ends belong to it; outside only cond is asked."""
    grid = make_grid(VP, "trailing", 10)[:-1]
    guidance = Within(CFG(COND, UNCOND, 5.0), Plain(COND), (grid[6].ratio, grid[3].ratio))
    assert [len(guidance.ask(X, p)) for p in grid] == [1, 1, 1, 2, 2, 2, 2, 1, 1, 1]
    assert [q.cond for q in guidance.ask(X, grid[0])] == [COND]
    assert torch.equal(guidance.combine(X, grid[0], [X]), X)
    assert torch.allclose(guidance.combine(X, grid[3], [X + 1, X]), X + 5)
    anywhere = Within(CFG(COND, UNCOND, 5.0), Plain(COND), (0.0, 100.0))
    assert len(anywhere.ask(X, Point(999.0, 0.0, 1.0))) == 1


def told(*values: float) -> list[Cond]:
    """Conditions that can be told apart."""
    return [Cond(context=torch.full((1, 1, 1), value)) for value in values]


def told_apart(query_cond: Cond) -> float:
    """Which of them it is."""
    assert query_cond.context is not None
    return query_cond.context.item()


@pytest.mark.parametrize("path", [VP, FlowPath()], ids=["vp", "flow"])
def test_turns_follow_the_steps_of_the_grid(path: VPPath | FlowPath) -> None:
    """A point of the grid counts to the step that begins there, a point between two to the step between them."""
    grid = make_grid(path, "trailing", 5)
    turns = Turns([(end, cond) for end, cond in zip((1, 4, 9), told(1, 4, 9), strict=True)], grid)
    expected = [1, 4, 4, 4, 9]
    assert [told_apart(turns.at(point)) for point in grid] == [*expected, 9]
    between = [path.at_level((path.level(a) + path.level(b)) / 2) for a, b in pairwise(grid[1:])]
    assert [told_apart(turns.at(point)) for point in between] == expected[1:]
    assert told_apart(turns.at(Point(999.0, 0.0, 1.0))) == 1  # noisier than the grid


@pytest.mark.parametrize(
    "name, expected",
    [
        ("euler", [1, 1, 2, 3]),
        # Heun's second evaluation stands at the end of its step, and so counts to the next one.
        ("heun", [1, 1, 1, 2, 2, 3, 3]),
        ("dpmpp_2m", [1, 1, 2, 3]),
    ],
)
def test_samplers_are_told_the_turns(name: str, expected: list[float]) -> None:
    """In the driver, with the unconditional side changing at other steps than the conditional one."""
    grid = make_grid(VP, "trailing", 4)
    cond = Turns(list(zip((2, 3, 4), told(1, 2, 3), strict=True)), grid)
    uncond = Turns(list(zip((1, 4), told(-1, -2), strict=True)), grid)
    heard: list[tuple[float, ...]] = []

    def net(x: Tensor, t: Tensor, told: Cond) -> Tensor:
        assert told.context is not None
        heard.append(tuple(told.context.flatten().tolist()))
        return x

    x = torch.randn(1, 1, 2, 2)
    sampler = get_sampler(name)
    drive([Run.begin(sampler, x, grid, torch.randn_like, CFG(cond, uncond, 2.0), "v")], net)
    assert [value for value, _ in heard] == expected
    assert [value for _, value in heard] == [-1 if i == 0 else -2 for i in range(len(expected))]
    heard.clear()
    drive([Run.begin(sampler, x, grid, torch.randn_like, Plain(cond), "v")], net)
    assert [value for (value,) in heard] == expected


def test_a_runge_kutta_midpoint_counts_to_its_own_step() -> None:
    grid = make_grid(VP, "trailing", 4)
    middle = [VP.at_level((VP.level(a) * VP.level(b)) ** 0.5) for a, b in pairwise(grid[:3])]
    turns = Turns(list(zip((1, 2, 3, 4), told(1, 2, 3, 4), strict=True)), grid)
    asked: list[float] = []

    class Listening(Plain):
        def combine(self, x: Tensor, point: Point, answers: list[Tensor]) -> Tensor:  # type: ignore[override]
            asked.append(told_apart(turns.at(point)))
            return answers[0]

    steps = SAMPLERS["plms"].run(X, grid, torch.randn_like, warmup="runge_kutta", middle=middle)
    drive([Run(steps, Listening(turns), "v")], lambda x, t, cond: x)
    assert asked == [1, 1, 1, 2, 2, 2, 2, 3, 3, 4]


def test_conditions_of_two_lengths_are_two_calls() -> None:
    """Nothing is padded."""
    grid = make_grid(VP, "trailing", 2)
    long = Turns([(1, COND), (2, Cond(context=torch.ones(1, 9, 8)))], grid)
    lengths: list[tuple[int, int]] = []

    def net(x: Tensor, t: Tensor, told: Cond) -> Tensor:
        assert told.context is not None
        lengths.append((told.context.shape[0], told.context.shape[1]))
        return x

    drive([Run.begin(get_sampler("euler"), X, grid, torch.randn_like, CFG(long, UNCOND, 2.0), "v")], net)
    assert lengths == [(2, 4), (1, 9), (1, 4)]


def test_turns_that_leave_steps_out_are_refused() -> None:
    grid = make_grid(VP, "trailing", 4)
    for ends in ([], [0, 4], [2, 2, 4], [3, 1, 4], [2]):
        with pytest.raises(
            ValueError, match=r"conditions up to the steps \[.*\]; give rising ones, the last at least 4"
        ):
            Turns([(end, COND) for end in ends], grid)


SCALES = [(7.5, 1.5), (7.5, 1.0), (4.0, 4.0), (1.0, 1.5), (0.0, 1.5), (1.0, 1.0), (0.0, 0.0), (0.0, 1.0), (-1.0, 0.5)]


@pytest.mark.parametrize("scale, image_scale", SCALES)
def test_instruct_is_equation_3(scale: float, image_scale: float) -> None:
    """Brooks et al. 2023, whatever is left unasked."""
    conds = told(1, 2, 3)
    answers = dict(zip(conds, torch.randn(3, 1, 2, 3, 3, dtype=torch.float64), strict=True))
    cond, image, neither = answers.values()
    expected = neither + scale * (cond - image) + image_scale * (image - neither)
    guidance = InstructCFG(*conds, scale, image_scale)
    queries = guidance.ask(X, VP.point(500))
    combined = guidance.combine(X, VP.point(500), [answers[query.cond] for query in queries])
    difference = (combined - expected).abs().max().item()
    print(f"{len(queries)} questions, largest difference {difference:.2e}")
    assert difference < 1e-12
    needed = sum(weight != 0 for weight in (scale, image_scale - scale, 1 - image_scale))
    assert len(queries) == needed
    same = guidance.combine(X, VP.point(500), [X] * needed)
    assert torch.equal(same, X)


def test_instruct_asks_along_the_turns() -> None:
    grid = make_grid(VP, "trailing", 2)
    first, second, image, neither = told(1, 2, 3, 4)
    guidance = InstructCFG(Turns([(1, first), (2, second)], grid), image, neither, 7.5, 1.5)
    assert [told_apart(query.cond) for query in guidance.ask(X, grid[0])] == [1, 3, 4]
    assert [told_apart(query.cond) for query in guidance.ask(X, grid[1])] == [2, 3, 4]
