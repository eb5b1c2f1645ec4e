"""Several processes train as one does, also when one of them is interrupted and all start again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import sys
from pathlib import Path
import torch
from sfumato.train import parallel
from sfumato.train.loop import Loop, LoopConfig

folder, stop = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

def losses(step):
    if step == stop and parallel.rank() == 0:
        raise KeyboardInterrupt
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    size = parallel.share(16)
    x = x[parallel.rank() * size :][:size]
    return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}

with parallel.group("cpu"):
    config = LoopConfig(steps=40, batch_size=16, lr=0.01, warmup=5, cooldown=20, ema=0.9, save_every=15)
    Loop(model, losses, config, folder, "test").run()
"""


def launch(folder: Path, processes: int, stop: int = -1) -> list[int]:
    """The exit codes of some processes that are started as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared = {**os.environ, **place, "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(stop)]
    started = [
        subprocess.Popen(command, env={**shared, "RANK": str(i)}, stderr=subprocess.DEVNULL) for i in range(processes)
    ]
    try:
        return [process.wait(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    assert launch(tmp_path / "one", 1) == [0]
    assert all(launch(tmp_path / "two", 2, stop=22)), "the other process must not wait for ever"
    stopped = torch.load(tmp_path / "two" / "state.pt", weights_only=True)
    assert stopped["step"] == 22
    assert launch(tmp_path / "two", 2) == [0, 0]
    one, two = (torch.load(tmp_path / name / "state.pt", weights_only=True)["averaged"] for name in ("one", "two"))
    difference = max(float((one[name] - two[name]).abs().max()) for name in one)
    print(f"largest difference of the averaged weights: {difference:.1e}")
    assert difference < 1e-5
    lines = (tmp_path / "two" / "log.jsonl").read_text().splitlines()
    assert len(lines) == 2, "one process writes the log"
