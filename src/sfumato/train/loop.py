"""The training loop that every recipe stage shares: optimiser, rate, EMA, log, atomic checkpoints, exact resume.

A stage gives a model and a function `losses(step)`. The function draws its batch from a generator seeded with
(seed, step), so the state on disk needs no generator or data position: a run that is stopped and resumed makes
the same numbers as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from sfumato.files import replacing
from sfumato.train import parallel
from sfumato.train.curve import keep_curve

Module = TypeVar("Module", bound=nn.Module)
Losses = Callable[[int], dict[str, Tensor]]
Progress = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class LoopConfig:
    """How a stage is optimised.

    steps:        optimiser steps in all.
    batch_size:   samples a step, over all processes.
    lr:           the plateau of the learning rate, reached after `warmup` steps.
    cooldown:     steps at the end over which the rate falls to zero along a half cosine.
    weight_decay: AdamW's, on matrices and convolutions only.
    grad_clip:    largest norm of the gradient.
    ema:          decay of the averaged weights; shorter while the run is young. 0 averages nothing.
    save_every:   steps between checkpoints.
    seed:         of weights and batches.
    """

    steps: int
    batch_size: int
    lr: float
    warmup: int = 200
    cooldown: int = 1000
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema: float = 0.999
    save_every: int = 500
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step counted from 0."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        left = min(1.0, max(0, self.steps - step) / max(1, self.cooldown))
        return self.lr * rise * 0.5 * (1 - math.cos(math.pi * left))


def atomic_save(state: dict[str, Any], path: Path) -> None:
    """Write with torch.save beside `path`, then move into place: a reader never sees half a file."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def make_optimizer(model: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves biases and norms alone."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=True)


class Loop(Generic[Module]):
    """One stage's training run; `run()` carries it to the end, from wherever the folder says it was.

    model:   what is trained; `averaged` is its EMA copy (the model itself without EMA).
    losses:  step -> named scalars; "loss" is minimised, the others are logged.
    folder:  holds state.pt, log.jsonl and, where TensorBoard is installed, its event files.
    """

    def __init__(self, model: Module, losses: Losses, config: LoopConfig, folder: Path, name: str):
        self.model, self.losses, self.config, self.folder, self.name = model, losses, config, folder, name
        self.optimizer = make_optimizer(model, config)
        self.averaged = deepcopy(model).requires_grad_(False).eval() if config.ema else model
        self.step = 0
        self.whole = True  # False while a step is changing the weights
        self.resume()
        self.saved = self.step

    @property
    def state_file(self) -> Path:
        """The checkpoint's path."""
        return self.folder / "state.pt"

    def resume(self) -> None:
        """Take up the checkpoint of the folder when there is one; ValueError when it is of another network."""
        if not self.state_file.exists():
            return
        state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        try:
            self.model.load_state_dict(state["model"])
            if self.config.ema:
                self.averaged.load_state_dict(state["averaged"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError):
            raise ValueError(
                f"{self.state_file} is the state of another network or one trained without averages; "
                "restore the configuration that it was made with, or delete it"
            ) from None
        fresh = make_optimizer(self.model, self.config)
        for group, now in zip(self.optimizer.param_groups, fresh.param_groups, strict=True):
            group["weight_decay"] = now["weight_decay"]  # the configuration's, not the checkpoint's
        self.step = state["step"]

    def save(self) -> None:
        """Write the checkpoint, and draw the loss so far; of several processes, the first does."""
        if parallel.rank():
            return
        state = {"step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.config.ema:
            state["averaged"] = self.averaged.state_dict()
        atomic_save(state, self.state_file)
        keep_curve(self.folder / "log.jsonl", self.folder / "loss.png", f"{self.name}: loss by step")
        self.saved = self.step

    def run(self, progress: Progress | None = None, every: Callable[[int, Module], None] | None = None) -> Module:
        """Train to the last step and return the averaged model.

        progress(stage, step, steps, numbers) is called every 20 steps; every(step, averaged model) after each
        checkpoint, for sample grids. An error or KeyboardInterrupt saves a checkpoint first, of the last whole
        step; one that comes while weights are being changed leaves the checkpoint before.
        """
        self.model.train()
        with log_writer(self.folder) as write:
            since, first = time.perf_counter(), self.step
            sums: dict[str, float] = {}
            try:
                while self.step < self.config.steps:
                    numbers = self.advance()
                    for key, value in numbers.items():
                        sums[key] = sums.get(key, 0.0) + value
                    if self.step % 20 == 0:
                        done = self.step - first
                        means = {key: value / min(20, done) for key, value in sums.items()}
                        means["rate"] = self.config.rate(self.step)
                        means["samples_per_s"] = done * self.config.batch_size / (time.perf_counter() - since)
                        write(self.step, means)
                        if progress and parallel.rank() == 0:
                            progress(self.name, self.step, self.config.steps, means)
                        since, first, sums = time.perf_counter(), self.step, {}
                    if self.step % self.config.save_every == 0:
                        self.save()
                        if every and parallel.rank() == 0:
                            every(self.step, self.averaged)
                            self.model.train()
            finally:
                if self.whole and self.step > self.saved:
                    self.save()
        return self.averaged.eval()

    def advance(self) -> dict[str, float]:
        """One optimiser step; returns the losses as numbers. A loss that is not finite raises RuntimeError."""
        rate = self.config.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self.losses(self.step)
        losses["loss"].backward()
        parallel.average_gradients(self.model)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        if not torch.isfinite(norm):
            raise RuntimeError(f"{self.name}: the gradient is not finite at step {self.step}; lower lr")
        self.whole = False
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.step += 1
        if self.config.ema:
            self._average()
        self.whole = True
        return {key: float(value.detach()) for key, value in losses.items()}

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1 - decay)


@contextmanager
def log_writer(folder: Path) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A function that appends numbers to log.jsonl and, where it is installed, TensorBoard.

    Of several processes, the first writes.
    """
    if parallel.rank():
        yield lambda step, numbers: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(folder))
    except ImportError:
        board = None
    with (folder / "log.jsonl").open("a", buffering=1) as lines:

        def write(step: int, numbers: dict[str, float]) -> None:
            lines.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in numbers.items()}}) + "\n")
            if board is not None:
                for key, value in numbers.items():
                    board.add_scalar(key, value, step)

        try:
            yield write
        finally:
            if board is not None:
                board.close()
