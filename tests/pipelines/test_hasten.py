"""`fast` stands for settings of its own, which the recipe names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sfumato.cli import main
from sfumato.pipelines.pipeline import Pipeline
from sfumato.pipelines.request import parse
from sfumato.recipes.recipe import read
from sfumato.runtime import choose

from ..tiny_sd3 import tiny_sd3

ASKED = {"prompt": "a red apple", "seed": 3, "num_inference_steps": 12, "guidance_scale": 3.0}
NAMES = ("deep_cache", "block_cache", "guidance_interval", "int8", "fast")


def settings(pipe: Pipeline, **fields: object) -> tuple[object, ...]:
    (single,) = pipe.resolve(parse(**{**ASKED, **fields}))
    return tuple(getattr(single, name) for name in NAMES)


def test_what_it_stands_for(tiny_pipe: Pipeline) -> None:
    sd3 = Pipeline(tiny_sd3(), choose("cpu", "float32"), model="tiny-sd3")
    assert settings(tiny_pipe) == (None, None, None, False, False)
    assert settings(tiny_pipe, fast=True) == (2, None, (0.1, 1.0), False, False)
    assert settings(sd3, fast=True) == (None, 0.1, None, False, False)
    # What is said stays; nothing is shared between few steps; without guidance there is none to leave out.
    assert settings(tiny_pipe, fast=True, deep_cache=4)[0] == 4
    assert settings(tiny_pipe, fast=True, num_inference_steps=6) == settings(tiny_pipe)
    assert settings(tiny_pipe, fast=True, guidance_scale=1.0) == (2, None, None, False, False)


def test_it_is_its_settings(tiny_pipe: Pipeline) -> None:
    def made(**fields: object) -> torch.Tensor:
        found = tiny_pipe.generate(parse(**{**ASKED, **fields}), output_type="latent").images
        assert isinstance(found, torch.Tensor)
        return found

    assert torch.equal(made(fast=True), made(deep_cache=2, guidance_interval=(0.1, 1.0)))
    assert not torch.equal(made(fast=True), made())


def test_on_the_command_line(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["txt2img", "a red apple", "-m", str(tiny_folder), "--steps", "10", "--seed", "1"]
    assert main([*line, "--fast", "-o", "a.png"]) == 0
    fields = read(tmp_path / "a.png").fields
    assert (fields["deep_cache"], fields["guidance_interval"], fields["fast"]) == (2, [0.1, 1.0], False)
    assert main(["replay", "a.png", "-o", "b.png"]) == 0
    assert read(tmp_path / "b.png").fields == fields
    for wrong, said in (
        (["--deep-cache", "0"], "deep_cache = '0': input should be greater than or equal to 1"),
        (["--deep-cache", "two"], "deep_cache = 'two'"),
        (["--block-cache", "0.1"], "block_cache is for transformers"),
        (["--int8"], "int8 is not for"),
    ):
        capsys.readouterr()
        assert main([*line, *wrong, "-o", "c.png"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error, error
    assert not (tmp_path / "c.png").exists()
