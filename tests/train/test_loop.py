"""The training loop: resuming is exact, the rate follows its plan, bad gradients stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sfumato.train.loop import Loop, LoopConfig


def problem(seed: int = 0) -> tuple[nn.Module, object]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def losses(step: int) -> dict[str, Tensor]:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    return model, losses


CONFIG = LoopConfig(steps=60, batch_size=16, lr=0.01, warmup=5, cooldown=30, ema=0.9, save_every=20)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    model, losses = problem()
    whole = Loop(model, losses, CONFIG, tmp_path / "whole", "test").run()  # type: ignore[arg-type]

    model, losses = problem()

    def interrupted(step: int) -> dict[str, Tensor]:
        if step == 33:
            raise KeyboardInterrupt
        return losses(step)  # type: ignore[operator]

    with pytest.raises(KeyboardInterrupt):
        Loop(model, interrupted, CONFIG, tmp_path / "parts", "test").run()
    model, losses = problem(seed=7)  # the new process starts from other weights, which the checkpoint replaces
    loop = Loop(model, losses, CONFIG, tmp_path / "parts", "test")  # type: ignore[arg-type]
    assert loop.step == 33
    parts = loop.run()
    pairs = zip(whole.parameters(), parts.parameters(), strict=True)
    difference = max(float((p - q).abs().max()) for p, q in pairs)
    print(f"largest difference of the averaged weights: {difference}")
    assert difference == 0.0


def test_a_step_that_was_cut_in_two_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, losses = problem()
    whole = Loop(model, losses, CONFIG, tmp_path / "whole", "test").run()  # type: ignore[arg-type]

    model, losses = problem()
    loop = Loop(model, losses, CONFIG, tmp_path / "parts", "test")  # type: ignore[arg-type]
    average = loop._average

    def interrupted() -> None:
        if loop.step == 34:
            raise KeyboardInterrupt  # the weights are those of step 34, the averages those of step 33
        average()

    monkeypatch.setattr(loop, "_average", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    model, losses = problem()
    loop = Loop(model, losses, CONFIG, tmp_path / "parts", "test")  # type: ignore[arg-type]
    assert loop.step == 20
    parts = loop.run()
    difference = max(float((p - q).abs().max()) for p, q in zip(whole.parameters(), parts.parameters(), strict=True))
    print(f"largest difference of the averaged weights: {difference}")
    assert difference == 0.0


def test_a_run_that_failed_at_once_leaves_no_state(tmp_path: Path) -> None:
    def failing(step: int) -> dict[str, Tensor]:
        raise ValueError("a batch that cannot be shared")

    with pytest.raises(ValueError, match="cannot be shared"):
        Loop(problem()[0], failing, CONFIG, tmp_path, "test").run()
    assert not (tmp_path / "state.pt").exists()


def test_the_state_of_another_network_is_refused(tmp_path: Path) -> None:
    model, losses = problem()
    Loop(model, losses, CONFIG, tmp_path, "test").run()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"state\.pt is the state of another network"):
        Loop(nn.Linear(4, 2), losses, CONFIG, tmp_path, "test")  # type: ignore[arg-type]


def test_training_learns_and_logs(tmp_path: Path) -> None:
    model, losses = problem()
    Loop(model, losses, CONFIG, tmp_path, "test").run()  # type: ignore[arg-type]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    print([line["loss"] for line in lines])
    assert lines[-1]["step"] == 60 and lines[-1]["loss"] < 0.5 * lines[0]["loss"]


def test_rate_rises_stays_and_falls() -> None:
    rates = [CONFIG.rate(step) for step in range(61)]
    assert rates[0] == pytest.approx(0.002) and rates[4] == rates[29] == pytest.approx(0.01)
    assert rates[45] == pytest.approx(0.005) and rates[60] == 0.0


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model, _ = problem()

    def overflowing(step: int) -> dict[str, Tensor]:
        return {"loss": (model(torch.ones(1, 4)) * 1e30).square().sum()}

    with pytest.raises(RuntimeError, match="not finite at step 0; lower lr"):
        Loop(model, overflowing, CONFIG, tmp_path, "test").run()
