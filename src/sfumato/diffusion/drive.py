"""The only denoising loop: advances many samplers' coroutines with shared network calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..cond import Cond
from .guidance import Guidance, Query, anchor_of, needs_gradients
from .path import Point
from .prediction import Prediction, get_prediction
from .samplers import Noise, Sampler, Steps, evaluations

KEPT = 4  # joined conditions that a driver remembers: a network may keep what it made of them


class Net(Protocol):
    """A network as the driver calls it: x (B, C, H, W), t (B,), cond of B rows -> output like x.

    A guidance that perturbs the network needs one that also takes a fourth argument, the perturbation's name.
    """

    def __call__(self, x: Tensor, t: Tensor, cond: Cond, /) -> Tensor:
        """Evaluate."""
        ...


class PerturbedNet(Protocol):
    """A network that can be asked with its insides changed."""

    def __call__(self, x: Tensor, t: Tensor, cond: Cond, perturb: str, /) -> Tensor:
        """Evaluate."""
        ...


@dataclass(eq=False)
class Run:
    """One picture (or one batch of equals) on its way through a sampler.

    steps:      the sampler's coroutine, not yet started.
    guidance:   what to ask at each point; its conditions have as many rows as x.
    prediction: how to read the network's output; a row of the table or its name.
    total:      evaluations to come, for progress; 0 when unknown.

    While it runs: x is what will be evaluated next (a callback may replace it), point where, x0 the latest
    predicted clean picture, done the number of evaluations so far. `result` is the final x, None before the
    end.
    """

    steps: Steps
    guidance: Guidance
    prediction: Prediction | str
    total: int = 0
    done: int = field(default=0, init=False)
    x: Tensor = field(init=False)
    point: Point = field(init=False)
    x0: Tensor | None = field(default=None, init=False)
    result: Tensor | None = field(default=None, init=False)
    rule: Prediction = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.rule = get_prediction(self.prediction) if isinstance(self.prediction, str) else self.prediction
        try:
            self.x, self.point = next(self.steps)
        except StopIteration as stop:  # a grid of one point leaves nothing to do
            self.x = self.result = stop.value

    @classmethod
    def begin(
        cls,
        sampler: Sampler,
        x: Tensor,
        grid: Sequence[Point],
        noise: Noise,
        guidance: Guidance,
        prediction: Prediction | str,
    ) -> Run:
        """A run from x (B, C, H, W) at grid[0], with its number of evaluations counted by a dry run."""
        return cls(sampler(x, grid, noise), guidance, prediction, len(evaluations(sampler, grid)))

    def advance(self, answers: Sequence[Tensor]) -> None:
        """Take the answers (as clean pictures) to this turn's questions and go on to the next point."""
        with torch.set_grad_enabled(needs_gradients(self.guidance)):
            self.x0 = self.guidance.combine(self.x, self.point, answers)
        self.x, self.x0 = self.x.detach(), self.x0.detach()
        anchor = anchor_of(self.guidance, self.x, self.point, answers)
        x = self.x if anchor is None else self.x + self.point.alpha * (self.x0 - anchor)
        self.done += 1
        try:
            self.x, self.point = self.steps.send((x, self.x0))
        except StopIteration as stop:
            self.x = self.result = stop.value


class Driver:
    """Runs that join and leave between turns and share network calls within one.

    net: the network; the only place where the package calls one to generate.
    """

    def __init__(self, net: Net | PerturbedNet) -> None:
        self.net = net
        self.active: list[Run] = []
        self.calls = 0
        self._joined: list[tuple[tuple[Cond, ...], Cond]] = []

    def add(self, run: Run) -> None:
        """Let a run take part from the next turn on; one that has already ended is ignored."""
        if run.result is None:
            self.active.append(run)

    def cancel(self, run: Run) -> None:
        """Drop a run; its result stays None. Does nothing when the run is not active."""
        if any(r is run for r in self.active):
            self.active = [r for r in self.active if r is not run]
            run.steps.close()

    @torch.no_grad()
    def turn(self) -> list[Run]:
        """Evaluate what every active run wants, once; returns the runs advanced, ended ones included."""
        runs = list(self.active)
        alone = [run for run in runs if needs_gradients(run.guidance)]
        shared = [run for run in runs if run not in alone]
        queries = [(run, query) for run in shared for query in run.guidance.ask(run.x, run.point)]
        groups: dict[object, list[int]] = {}
        for i, (_, query) in enumerate(queries):
            x = query.x
            key = (tuple(x.shape[1:]), x.dtype, x.device, query.cond.signature(), query.perturb)
            groups.setdefault(key, []).append(i)
        clean: dict[int, Tensor] = {}
        for members in groups.values():
            outs = self._call([queries[i] for i in members])
            for i, out in zip(members, outs, strict=True):
                run, query = queries[i]
                clean[i] = run.rule.x0(query.x, out, query.point)
        for run in shared:
            run.advance([clean[i] for i, (owner, _) in enumerate(queries) if owner is run])
        for run in alone:
            run.advance(self._traced(run))
        self.active = [run for run in self.active if run.result is None]
        return runs

    @torch.enable_grad()
    def _traced(self, run: Run) -> list[Tensor]:
        """The clean pictures that answer one run's questions, with the way back to its x for gradients."""
        run.x = run.x.detach().requires_grad_()
        queries = run.guidance.ask(run.x, run.point)
        return [run.rule.x0(query.x, self._call([(run, query)])[0], query.point) for query in queries]

    def _call(self, asked: Sequence[tuple[Run, Query]]) -> list[Tensor]:
        """One network call for questions of one shape; an output for each."""
        rows = [query.x.shape[0] for _, query in asked]
        x = torch.cat([query.x * run.rule.scale_in(query.point) for run, query in asked])  # (B, C, H, W)
        times = [query.point.t for (_, query), n in zip(asked, rows, strict=True) for _ in range(n)]
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        t = torch.tensor(times, dtype=exact, device=x.device)  # (B,)
        cond = self._told([query.cond for _, query in asked])
        perturb = asked[0][1].perturb
        extra = () if perturb is None else (perturb,)
        self.calls += 1
        out = self.net(x, t, cond, *extra)
        return list(out.to(x.dtype).split(rows))

    def _told(self, conds: Sequence[Cond]) -> Cond:
        """Conditions of one shape in one; the same object as long as the same ones are asked about."""
        for parts, joined in self._joined:
            if len(parts) == len(conds) and all(a is b for a, b in zip(parts, conds, strict=True)):
                return joined
        joined = Cond.cat(conds)
        self._joined = [*self._joined[1 - KEPT :], (tuple(conds), joined)]
        return joined


def drive(
    runs: Iterable[Run], net: Net | PerturbedNet, on_step: Callable[[Run], bool | None] | None = None
) -> list[Tensor]:
    """Advance all runs to their ends and return their final x, in order.

    on_step: called after each evaluation of each run with the run (its x0 preview, done and total); it may
    replace run.x, and cancels the run by returning False. Cancelled runs are left out of what is returned.
    """
    everyone = list(runs)
    driver = Driver(net)
    for run in everyone:
        driver.add(run)
    while driver.active:
        for run in driver.turn():
            if on_step is not None and on_step(run) is False:
                driver.cancel(run)
    return [run.result for run in everyone if run.result is not None]
