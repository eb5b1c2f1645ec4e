"""Guidances against their papers' formulas, against diffusers' guiders, and with every sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.cond import Cond
from sfumato.diffusion import CFG, SAMPLERS, Plain, Point, Run, drive, edm, get_prediction, get_sampler, make_grid
from sfumato.diffusion.around import PAG, Limited, Rescale, Within, levels_of, thresholded
from sfumato.diffusion.guidance import APG, CFGPP, Guidance, anchor_of
from sfumato.diffusion.path import VPPath, betas

from .oracle import DEVIATION, FLOW, VE, VP

MEANS = {"cond": 0.9, "uncond": 0.2, "perturbed": -0.1}
HERE = VP.point(400)
X = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NAMES = ("v_prediction", "epsilon", "sample", "flow_prediction")


def told(value: float) -> Cond:
    """A condition that says where the mean of the data lies."""
    return Cond(context=torch.full((1, 1, 1), value, dtype=torch.float64))


COND, UNCOND = told(MEANS["cond"]), told(MEANS["uncond"])


def oracle(x: Tensor, t: Tensor, cond: Cond, perturb: str | None = None) -> Tensor:
    """The ideal denoiser for data N(mean, DEVIATION²), the mean as the condition says; a perturbed one has its own."""
    assert cond.context is not None
    rows = zip(x, t.tolist(), cond.context.flatten().tolist(), strict=True)
    answers = []
    for row, time, mean in rows:
        mean = mean if perturb is None else MEANS["perturbed"]
        a = VP.point(min(max(time, 0.0), 999.0))
        gain = a.alpha * DEVIATION**2 / (a.alpha**2 * DEVIATION**2 + a.sigma**2)
        answers.append(mean + gain * (row - a.alpha * mean))
    return torch.stack(answers)


def seeded(seed: int) -> tuple[Tensor, partial[Tensor]]:
    """A first x in float64 and a noise source of its own."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    return draw(1, 2, 4, 4), partial(lambda draw, x: draw(x.shape), draw)


def begun(name: str, guidance: Guidance, seed: int = 0, steps: int = 8) -> Run:
    """A run with a sampler of the registry."""
    x, noise = seeded(seed)
    return Run.begin(get_sampler(name), x, make_grid(VP, "trailing", steps), noise, guidance, "sample")


def made(name: str, guidance: Guidance, net: Callable[..., Tensor] = oracle) -> Tensor:
    """The end of such a run."""
    return drive([begun(name, guidance)], net)[0]


def answers(seed: int, count: int) -> list[Tensor]:
    """Clean pictures in float64."""
    return list(torch.randn(count, 2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    return (a - b).abs().max().item()


# Closed forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "edm"])
@pytest.mark.parametrize("amount", [0.3, 0.7, 1.0])
def test_rescale_is_section_3_4(name: str, amount: float) -> None:
    """Lin et al. 2023, eq. 15 and 16, on the network's outputs."""
    rule = edm(0.5) if name == "edm" else get_prediction(name)
    outs = answers(1, 2)
    clean = [rule.x0(X, out, HERE) for out in outs]
    cfg = outs[1] + 7.5 * (outs[0] - outs[1])
    rescaled = cfg * (outs[0].std((1, 2, 3)) / cfg.std((1, 2, 3))).view(2, 1, 1, 1)
    expected = rule.x0(X, amount * rescaled + (1 - amount) * cfg, HERE)
    difference = apart(Rescale(CFG(COND, UNCOND, 7.5), amount, rule).combine(X, HERE, clean), expected)
    print(f"{name}, {amount}: {difference:.1e}")
    assert difference < 1e-10


def test_rescale_keeps_what_needs_no_guidance() -> None:
    """One answer, and amount 0."""
    (only,) = answers(2, 1)
    rule = get_prediction("v")
    assert torch.equal(Rescale(CFG(COND, UNCOND, 1.0), 0.7, rule).combine(X, HERE, [only]), only)
    cond, uncond = answers(2, 2)
    cfg = CFG(COND, UNCOND, 3.0)
    assert torch.equal(Rescale(cfg, 0.0, rule).combine(X, HERE, [cond, uncond]), cfg.combine(X, HERE, [cond, uncond]))


def test_pag_is_equation_15() -> None:
    """With and without the unconditional answer (Ahn et al. 2024)."""
    cond, uncond, changed = answers(3, 3)
    both = PAG(CFG(COND, UNCOND, 5.0), COND, 3.0)
    difference = apart(
        both.combine(X, HERE, [cond, uncond, changed]), uncond + 5 * (cond - uncond) + 3 * (cond - changed)
    )
    alone = PAG(Plain(COND), COND, 2.0)
    difference = max(difference, apart(alone.combine(X, HERE, [cond, changed]), 3 * cond - 2 * changed))
    print(f"largest difference {difference:.1e}")
    assert difference < 1e-12
    asked = both.ask(X, HERE)
    assert [(q.cond, q.perturb) for q in asked] == [(COND, None), (UNCOND, None), (COND, "identity_attention:mid")]
    assert [q.perturb for q in alone.ask(X, HERE)] == [None, "identity_attention:mid"]
    assert len(PAG(Plain(COND), COND, 0.0).ask(X, HERE)) == 1


@pytest.mark.parametrize("parallel", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 2.5, 1000.0])
@pytest.mark.parametrize("momentum", [0.0, -0.75])
def test_apg_is_algorithm_1(parallel: float, threshold: float, momentum: float) -> None:
    """Sadat et al. 2024, picture by picture over three steps."""
    guidance = APG(COND, UNCOND, 8.0, parallel, threshold, momentum)
    before: list[Tensor | float] = [0.0, 0.0]
    worst = 0.0
    for step in range(3):
        cond, uncond = answers(10 + step, 2)
        combined = guidance.combine(X, HERE, [cond, uncond])
        for i in range(2):
            update = cond[i] - uncond[i] + momentum * before[i]
            before[i] = update
            norm = math.sqrt(float((update * update).sum()))
            if threshold:
                update = update * min(1.0, threshold / norm)
            share = float((update * cond[i]).sum() / (cond[i] * cond[i]).sum())
            orthogonal = update - share * cond[i]
            expected = cond[i] + (8.0 - 1) * (orthogonal + parallel * share * cond[i])
            worst = max(worst, apart(combined[i], expected))
    print(f"largest difference {worst:.1e}")
    assert worst < 1e-11


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_cfgpp_is_algorithm_1(name: str, scale: float) -> None:
    """Chung et al. 2024: the clean picture guided, the noise of the next step unconditional."""
    grid = make_grid(VP, "trailing", 8)
    x = seeded(0)[0]
    for a, b in pairwise(grid):
        c, u = (oracle(x, torch.tensor([a.t]), cond) for cond in (COND, UNCOND))
        eps = (x - a.alpha * u) / a.sigma
        x = b.alpha * (u + scale * (c - u)) + b.sigma * eps
    difference = apart(made(name, CFGPP(COND, UNCOND, scale)), x)
    print(f"{name}, {scale}: {difference:.1e}")
    assert difference < 1e-6  # the driver tells times in float32, and the oracle looks points up by time


def test_cfgpp_in_the_euler_of_k_diffusion() -> None:
    """The step that programs on k-diffusion's coordinates write, x / alpha over sigma / alpha, with ancestral noise."""
    grid = make_grid(VP, "karras", 6)
    x0, noise = seeded(4)
    runs = Run.begin(get_sampler("euler_a"), x0, grid, noise, CFGPP(COND, UNCOND, 0.8), "sample")
    (ours,) = drive([runs], oracle)
    x, noise = seeded(4)
    y = x / grid[0].alpha
    for a, b in pairwise(grid):
        c, u = (oracle(a.alpha * y, torch.tensor([a.t]), cond) for cond in (COND, UNCOND))
        up = min(b.ratio, math.sqrt(b.ratio**2 * (a.ratio**2 - b.ratio**2) / a.ratio**2))
        down = math.sqrt(b.ratio**2 - up**2)
        y = u + 0.8 * (c - u) + down * (y - u) / a.ratio
        y = y + up * noise(y) if b.ratio > 0 else y
    print(f"largest difference {apart(ours, y):.1e}")
    assert apart(ours, y) < 1e-5


@pytest.mark.parametrize("limit", [1.0, 3.0])
def test_dynamic_thresholding_is_section_2_3(limit: float) -> None:
    """Saharia et al. 2022; a limit of 1 is the paper's, others are in units of it."""
    x0 = 3 * answers(5, 1)[0]
    out = thresholded(x0, 0.9, limit)
    for i in range(2):
        magnitudes = sorted(x0[i].abs().flatten().tolist())
        place = 0.9 * (len(magnitudes) - 1)
        low = int(place)
        s = max(limit, magnitudes[low] + (place - low) * (magnitudes[low + 1] - magnitudes[low]))
        assert apart(out[i], x0[i].clamp(-s, s) / s * limit) < 1e-12
    assert out.abs().max().item() <= limit + 1e-12
    small = 0.1 * x0
    assert torch.equal(thresholded(small, 0.9, 3.0), small)


def test_limits_keep_the_noise_or_not() -> None:
    """DDIM's next step beside its clipped picture holds the noise seen before clipping."""
    grid = make_grid(VP, "trailing", 5)
    for keeps in (True, False):
        guidance = Limited(CFG(COND, UNCOND, 4.0), lambda x0: x0.clamp(-0.5, 0.5), keeps)
        x = seeded(0)[0]
        for a, b in pairwise(grid):
            c, u = (oracle(x, torch.tensor([a.t]), cond) for cond in (COND, UNCOND))
            free = u + 4.0 * (c - u)
            clipped = free.clamp(-0.5, 0.5)
            eps = (x - a.alpha * (free if keeps else clipped)) / a.sigma
            x = b.alpha * clipped + b.sigma * eps
        run = Run.begin(get_sampler("ddim"), seeded(0)[0], grid, torch.randn_like, guidance, "sample")
        difference = apart(drive([run], oracle)[0], x)
        print(f"keeps {keeps}: {difference:.1e}")
        assert difference < 1e-6


# diffusers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, -0.5])
def test_apg_beside_diffusers(momentum: float) -> None:
    """AdaptiveProjectedGuidance in the paper's formulation, whose scale counts from 0."""
    import diffusers

    theirs: Any = diffusers.AdaptiveProjectedGuidance(
        guidance_scale=6.5,
        adaptive_projected_guidance_momentum=momentum or None,
        adaptive_projected_guidance_rescale=5.0,
        eta=0.25,
        use_original_formulation=True,
    )
    ours = APG(COND, UNCOND, 7.5, 0.25, 5.0, momentum)
    for step in range(3):
        cond, uncond = answers(20 + step, 2)
        theirs.set_state(step=step, num_inference_steps=3, timestep=torch.tensor(900 - step))
        theirs.prepare_inputs({"x": (cond, uncond)})
        difference = apart(ours.combine(X, HERE, [cond, uncond]), theirs.forward(cond, uncond).pred)
        print(f"step {step}: {difference:.1e}")
        assert difference < 1e-10


def test_pag_and_rescale_beside_diffusers() -> None:
    """PerturbedAttentionGuidance's combination with guidance_rescale, on outputs that say x0."""
    import diffusers

    theirs: Any = diffusers.PerturbedAttentionGuidance(
        guidance_scale=4.0,
        perturbed_guidance_scale=2.5,
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
        perturbed_guidance_layers=[0],
        guidance_rescale=0.6,
        start=0.0,
    )
    theirs.set_state(step=1, num_inference_steps=3, timestep=torch.tensor(500))
    cond, uncond, changed = answers(30, 3)
    pred = theirs.forward(cond, uncond, changed).pred
    inner = PAG(CFG(COND, UNCOND, 4.0), COND, 2.5)
    ours = Rescale(inner, 0.6, get_prediction("sample")).combine(X, HERE, [cond, uncond, changed])
    print(f"largest difference {apart(ours, pred):.1e}")
    assert apart(ours, pred) < 1e-10


# Every sampler -----------------------------------------------------------------------------------


def every() -> dict[str, Guidance]:
    """One of each guidance, and some in others; new ones, as some remember."""
    cfg = CFG(COND, UNCOND, 4.0)
    v = get_prediction("sample")
    pag = PAG(APG(COND, UNCOND, 4.0, 0.0, 3.0, -0.5), COND, 1.5)
    nested = Rescale(PAG(CFGPP(COND, UNCOND, 0.6), COND, 0.5), 0.5, v)
    return {
        "plain": Plain(COND),
        "cfg": cfg,
        "cfg++": CFGPP(COND, UNCOND, 0.6),
        "apg": APG(COND, UNCOND, 4.0, 0.0, 3.0, -0.5),
        "pag": PAG(Plain(COND), COND, 2.0),
        "rescale": Rescale(cfg, 0.7, v),
        "interval": Within(cfg, Plain(COND), levels_of(make_grid(VP, "trailing", 8), (0.25, 0.75))),
        "limited": Limited(cfg, partial(thresholded, quantile=0.9), keeps_eps=True),
        "all of apg": Limited(Within(Rescale(pag, 0.5, v), Plain(COND), (0.0, 5.0)), lambda x0: x0.clamp(-2, 2), True),
        "all of cfg++": Limited(Within(nested, Plain(COND), (0.1, 1e9)), partial(thresholded, quantile=0.9, limit=2.0)),
    }


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_guidance_with_every_sampler(sampler: str) -> None:
    """They all end near the data, and sharing network calls changes nothing at all."""
    alone = {name: made(sampler, guidance) for name, guidance in every().items()}
    runs = [begun(sampler, guidance) for guidance in every().values()]
    together = dict(zip(alone, drive(runs, oracle), strict=True))
    worst = max(apart(alone[name], together[name]) for name in alone)
    largest = max(x.abs().max().item() for x in alone.values())
    print(f"{sampler}: alone and together differ by {worst}; largest value {largest:.1f}")
    assert worst == 0
    assert largest < 15, {name: x.abs().max().item() for name, x in alone.items()}
    assert apart(alone["cfg"], alone["cfg++"]) > 1e-3 and apart(alone["cfg"], alone["apg"]) > 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_plain_guidance_in_disguise(sampler: str) -> None:
    """With every sampler: the edges at which one guidance is another."""
    cfg = made(sampler, CFG(COND, UNCOND, 4.0))
    wide = Limited(CFG(COND, UNCOND, 4.0), lambda x0: x0.clamp(-99, 99), True)
    scale = 4.0 - 1  # a perturbed answer in the place of the unconditional one
    changed = told(MEANS["perturbed"])
    same = {
        "apg that keeps all": (made(sampler, APG(COND, UNCOND, 4.0, 1.0)), cfg),
        "rescale by nothing": (made(sampler, Rescale(CFG(COND, UNCOND, 4.0), 0.0, get_prediction("sample"))), cfg),
        "interval that holds all": (made(sampler, Within(CFG(COND, UNCOND, 4.0), Plain(COND), (0.0, math.inf))), cfg),
        "cfg++ at 0": (made(sampler, CFGPP(COND, UNCOND, 0.0)), made(sampler, Plain(UNCOND))),
        "cfg++ towards itself": (made(sampler, CFGPP(COND, COND, 0.7)), made(sampler, Plain(COND))),
        "pag": (made(sampler, PAG(Plain(COND), COND, scale)), made(sampler, CFG(COND, changed, 4.0))),
        "limits never reached": (made(sampler, wide), cfg),
    }
    differences = {name: apart(*pair) for name, pair in same.items()}
    print(sampler, {name: f"{value:.0e}" for name, value in differences.items()})
    assert max(differences.values()) < 1e-9


def test_scale_one_never_asks_for_the_unconditional_half() -> None:
    """Rows counted over a whole run."""
    rows = []

    def net(x: Tensor, t: Tensor, cond: Cond, perturb: str | None = None) -> Tensor:
        rows.append(len(x))
        assert cond.context is not None and UNCOND.context is not None
        assert not (cond.context == UNCOND.context).any()
        return oracle(x, t, cond, perturb)

    for guidance, count in (
        (CFG(COND, UNCOND, 1.0), 8),
        (APG(COND, UNCOND, 1.0, 0.0, 3.0, -0.5), 8),
        (Rescale(CFG(COND, UNCOND, 1.0), 0.7, get_prediction("sample")), 8),
        (PAG(CFG(COND, UNCOND, 1.0), COND, 2.0), 16),
        (Limited(CFG(COND, UNCOND, 1.0), lambda x0: x0, True), 8),
    ):
        rows.clear()
        drive([begun("euler", guidance)], net)
        assert sum(rows) == count, guidance


def test_a_step_that_is_tried_again_is_not_moved_twice() -> None:
    """dpm_adaptive goes back to where it was, not to what was made of it there."""
    x, noise = seeded(0)
    steps = get_sampler("dpm_adaptive").run(x, make_grid(VP, "trailing", 4), noise, h_init=3.0)
    asked: list[tuple[Point, Tensor]] = []
    moved, point = next(steps)
    for _ in range(30):
        asked.append((point, moved))
        x0 = oracle(moved, torch.tensor([point.t]), COND)
        try:
            moved, point = steps.send((moved + point.alpha * 0.3, x0))
        except StopIteration:
            break
    again = [(a, b) for i, (p, a) in enumerate(asked) for q, b in asked[i + 1 :] if p == q]
    assert again and all(torch.equal(a, b) for a, b in again)


# Shares of the steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", [VP, VE, FLOW, VPPath(betas("scaled_linear", 1000, 0.00085, 0.012), zero_snr=True)])
@pytest.mark.parametrize(
    ("shares", "steps"),
    [((0.0, 1.0), range(10)), ((0.2, 0.8), range(2, 8)), ((0.0, 0.5), range(5)), ((0.95, 1.0), range(9, 10))],
)
def test_shares_pick_steps(path: Any, shares: tuple[float, float], steps: range) -> None:
    """Of any path, from pure noise on."""
    grid = make_grid(path, "linspace", 10)
    inside = Within(CFG(COND, UNCOND, 2.0), Plain(COND), levels_of(grid, shares))
    assert [i for i, point in enumerate(grid[:-1]) if len(inside.ask(X, point)) == 2] == list(steps)


def test_evaluations_in_between_belong_to_their_step() -> None:
    """Heun's second one stands where the next step begins; the midpoint of dpm2 lies in its own."""
    grid = make_grid(VP, "trailing", 4)
    for sampler, expected in (("heun", [1, 1, 1, 2, 2, 2, 2]), ("dpm2", [1, 1, 1, 1, 2, 2, 2])):
        asked: list[int] = []
        guidance = Within(CFG(COND, UNCOND, 2.0), Plain(COND), levels_of(grid, (0.5, 1.0)))

        def net(x: Tensor, t: Tensor, cond: Cond, asked: list[int] = asked) -> Tensor:
            asked.append(len(x))
            return oracle(x, t, cond)

        drive([begun(sampler, guidance, steps=4)], net)
        assert asked == expected, sampler


def test_an_interval_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"guidance_interval = 0.5,0.52 holds none of 10 steps; give a wider one"):
        levels_of(make_grid(VP, "trailing", 10), (0.5, 0.52))


def test_anchors_pass_through() -> None:
    """Of what is inside, whatever is around it."""
    cond, uncond, changed = answers(40, 3)
    inner = CFGPP(COND, UNCOND, 0.6)
    v = get_prediction("v")
    for guidance, given in (
        (inner, [cond, uncond]),
        (Rescale(inner, 0.5, v), [cond, uncond]),
        (PAG(inner, COND, 2.0), [cond, uncond, changed]),
        (PAG(inner, COND, 0.0), [cond, uncond]),
        (Within(inner, Plain(COND), (0.0, math.inf)), [cond, uncond]),
        (Limited(inner, lambda x0: x0 / 2, True), [cond, uncond]),
    ):
        guidance.combine(X, HERE, given)
        assert anchor_of(guidance, X, HERE, given) is uncond
    outside = Within(inner, Plain(COND), (0.0, 1e-6))
    assert anchor_of(outside, X, HERE, [cond]) is None
    assert anchor_of(CFG(COND, UNCOND, 3.0), X, HERE, [cond, uncond]) is None
