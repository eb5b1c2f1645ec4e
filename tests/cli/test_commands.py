from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from sfumato.cli.app import make_app, with_command
from sfumato.cli.line import Line
from sfumato.diffusion.grid import SPACINGS
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.images import read_recipe
from sfumato.pipelines.request import Request

from .command import pixels, sfumato

PROMPT = "a red apple on a blue background"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_bare_prompt_makes_numbered_pictures(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("outputs/00000.png", "outputs/00001.png"):
        code, out, err = sfumato(capsys, PROMPT, "--model", tiny_folder, "--steps", 2)
        assert (code, out) == (0, [name]), err
        assert "2 steps of dpmpp_2m" in err and "float32" in err
        assert read_recipe(name).prompt == PROMPT


def test_pictures_grid_and_replay(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--steps", 3, "--guidance-scale", 5, "--seed", 40, "--sampler", "euler_a", "--spacing", "karras")
    code, out, err = sfumato(capsys, "txt2img", PROMPT, *flags, "-n", 3, "--grid", "-o", "frogs.png", "-m", tiny_folder)
    assert (code, out) == (0, ["frogs-0.png", "frogs-1.png", "frogs-2.png", "frogs.png"]), err
    with Image.open("frogs.png") as sheet:
        assert sheet.size == (68, 68)
    made = read_recipe("frogs-1.png")
    assert (made.seed, made.num_images, made.spacing, made.eta) == (41, 1, "karras", None)
    assert read_recipe("frogs.png").num_images == 3

    code, out, _ = sfumato(capsys, "--recipe", "frogs-1.png", "-q")
    assert (code, out) == (0, ["outputs/00000.png"])
    assert pixels("frogs-1.png") == pixels("outputs/00000.png")
    assert read_recipe("outputs/00000.png") == made
    sfumato(capsys, "--recipe", "frogs-1.png", "--seed", 42, "-o", "changed.png")
    assert pixels("frogs-2.png") == pixels("changed.png")


def test_a_folder_may_be_named(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = sfumato(capsys, PROMPT, "-m", tiny_folder, "--steps", 1, "-n", 2, "--grid", "-o", "some/where/")
    names = [str(Path("some/where") / name) for name in ("00000.png", "00001.png", "00000-grid.png")]
    assert (code, out) == (0, names), err


def test_a_picture_from_a_picture(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.effect_noise((41, 26), 90).save("in.png")
    flags = ("-i", "in.png", "--strength", 0.5, "--steps", 4, "--seed", 3, "--clip-skip", 1, "--prompt-rule", "comfy")
    code, out, err = sfumato(capsys, "a (red:1.3) apple", *flags, "-m", tiny_folder, "-o", "out.png")
    assert (code, out) == (0, ["out.png"]) and "40x24" in err, err
    made = read_recipe("out.png")
    assert (made.image, made.strength, made.clip_skip, made.prompt_rule) == ("in.png", 0.5, 1, "comfy")
    code, out, err = sfumato(capsys, "--recipe", "out.png", "-q", "-o", "again.png")
    assert code == 0 and pixels("again.png") == pixels("out.png"), err
    sfumato(capsys, "--recipe", "out.png", "-q", "-o", "other.png", "--strength", 1)
    assert pixels("other.png") != pixels("out.png")


def test_an_adapter_in_the_prompt(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_v"
    rise = torch.linspace(0, 1, 32)
    tensors = {f"{name}.lora_down.weight": rise[None], f"{name}.lora_up.weight": rise.clone()[:, None]}
    save_file(tensors, "smoke.safetensors")
    for prompt, path in ((PROMPT, "a.png"), (f"{PROMPT} <lora:smoke.safetensors:0.5>", "b.png"), (PROMPT, "c.png")):
        code, _, err = sfumato(capsys, prompt, "-m", tiny_folder, "--steps", 2, "--seed", 3, "-o", path)
        assert code == 0, err
    assert pixels("a.png") == pixels("c.png") != pixels("b.png")
    code, _, err = sfumato(capsys, f"{PROMPT} <lora:frost>", "-m", tiny_folder)
    assert code == 2 and err.startswith("sfumato: no lora 'frost'") and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sampler", "dpm2m"], "unknown sampler 'dpm2m'; did you mean 'dpm2' or 'dpmpp_2m'?"),
        (["--spacing", "karas"], "unknown spacing 'karas'; did you mean 'karras' or "),
        (["--width", "35"], "width = 35 is not a multiple of 4; the nearest that is: 36"),
        (["--steps", "0"], "num_inference_steps = '0': input should be greater than or equal to 1"),
        (["--steps", "many"], "num_inference_steps = 'many': input should be a valid integer"),
        (["--eta", "0.5"], "sampler 'dpmpp_2m' takes no eta; these do: ddim"),
        (["--model", "nowhere"], "no model 'nowhere': it is no path"),
        (["--model", "."], "not a model folder"),
        (["--mask", "gone.png"], "mask = gone.png says where to repaint an image; give an image as well"),
        (["--noise-level", "3"], "has no use for noise_level; of its kind it takes: "),
        (["--image", "gone.png"], "image: no picture gone.png"),
        (["--strength", "0.5"], "strength = 0.5 says how far to leave an image; give an image as well"),
        (["--strength", "-1"], "strength = '-1': input should be greater than or equal to 0"),
        (["--vae", "gone.safetensors"], "no vae 'gone.safetensors'"),
        (["--prediction", "w"], "unknown prediction 'w'; known: epsilon, v_prediction"),
        (["--prompt-rule", "x"], "unknown weighting rule 'x'; known: a1111, comfy, none"),
        (["--embeddings", "a,gone"], "no embedding 'a'"),
        (["-o", "a.docx"], "unknown picture suffix '.docx'; use one of .png"),
        (["-o", "/dev/null/a.png"], "/dev/null"),
        (["--precision", "int8"], "unknown precision 'int8'; known: float32"),
        (["--recipe", "gone.png"], "no picture gone.png"),
        (["--stepz", "3"], "--stepz"),
        (["another prompt"], "another prompt"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_picture(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    model = [] if "--model" in args else ["--model", str(tiny_folder)]
    code, out, err = sfumato(capsys, PROMPT, *model, *args)
    assert (code, out) == (2, []), err
    assert message in err and err.startswith("sfumato: ") and err.count("\n") == 1, err
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["txt2img"], "no prompt"),
        (["txt2img", "  "], "the prompt is blank"),
        (["sampler"], "sampler"),
        (["train"], "RECIPE"),
        (["train", "gone.yaml"], "no recipe gone.yaml"),
    ],
)
def test_incomplete_commands(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    code, out, err = sfumato(capsys, *args)
    assert (code, out) == (2, []) and message.lower() in err.lower() and err.count("\n") == 1, err


def test_an_interruption_leaves_finished_pictures_only(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfumato.pipelines.pipeline import Pipeline

    decode, calls = Pipeline.decode, []

    def interrupted(self: Pipeline, z: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(self, z)  # type: ignore[arg-type]

    monkeypatch.setattr(Pipeline, "decode", interrupted)
    code, out, err = sfumato(capsys, PROMPT, "-m", tiny_folder, "--steps", 1, "-n", 3, "-q")
    assert (code, out) == (130, ["outputs/00000.png"])
    assert re.fullmatch(
        r"interrupted: 1 of 3 pictures finished; not made: seeds \d+, \d+ \(seed \d+ was at .*\)\n", err
    )
    assert [p.name for p in Path("outputs").iterdir()] == ["00000.png"]


def test_what_a_first_word_means() -> None:
    assert with_command(["a cat"]) == ["txt2img", "a cat"]
    assert with_command(["cat", "--steps", "3"]) == ["txt2img", "cat", "--steps", "3"]
    assert with_command(["--steps", "3", "cat"]) == ["txt2img", "--steps", "3", "cat"]
    for args in ([], ["--help"], ["--version"], ["train", "x"], ["txt2img", "a cat"], ["trian", "x"]):
        assert with_command(args) == args


def test_every_field_of_request_is_a_flag() -> None:
    text = CliRunner().invoke(make_app(), ["txt2img", "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"}).output
    for name in set(Request.model_fields) - {"prompt"}:
        assert f"--{name.replace('_', '-')}" in text, name


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    for command, table in (("samplers", SAMPLERS), ("spacings", SPACINGS)):
        code, out, _ = sfumato(capsys, command)
        assert code == 0 and [line.split()[0] for line in out] == list(table)
        assert all(len(line.split()) > 3 for line in out)


def test_help_and_version_do_not_import_torch() -> None:
    code = (
        "import sys; from sfumato.cli import main; main(sys.argv[1:]); "
        "sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    for args, expected in (
        ([], "txt2img"),
        (["--help"], "txt2img"),
        (["--version"], "0.1"),
        (["data", "icons", "--help"], "--out"),
    ):
        command = [sys.executable, "-c", code, *args]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "100"}
        )
        assert done.returncode == 0 and expected in done.stdout, f"{args}: {done.stderr}"


def test_progress_lines_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    line = Line(every=1000)
    for done in range(1, 4):
        line.show("unet", done, 3, {"loss": 0.12345678})
    assert capsys.readouterr().err == "unet 1/3 loss=0.1235\nunet 3/3 loss=0.1235\n"


@pytest.mark.parametrize(
    "args", [["train", "--help"], ["eval", "mini", "--help"], ["data", "--help"], ["eval", "--help"]]
)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    code, out, err = sfumato(capsys, *args)
    assert code == 0 and "Usage" in "".join(out) and err == ""
