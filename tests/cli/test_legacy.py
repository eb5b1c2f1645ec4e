from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sfumato.cli import main
from sfumato.cli.legacy import applies, parser
from sfumato.images import read_recipe

from .command import sfumato

PUBLISHED = {
    "txt2img": {
        "prompt": "a painting of a virus monster playing guitar",
        "outdir": "outputs/txt2img-samples",
        "ddim_steps": 50,
        "ddim_eta": 0.0,
        "n_iter": 2,
        "H": 512,
        "W": 512,
        "n_samples": 3,
        "n_rows": 0,
        "scale": 7.5,
        "ckpt": "models/ldm/stable-diffusion-v1/model.ckpt",
        "seed": 42,
        "precision": "autocast",
    },
    "img2img": {"outdir": "outputs/img2img-samples", "n_iter": 1, "n_samples": 2, "scale": 5.0, "strength": 0.75},
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("script", list(PUBLISHED))
def test_defaults_are_the_scripts(script: str) -> None:
    given = vars(parser(script).parse_args([]))
    assert {name: given[name] for name in PUBLISHED[script]} == PUBLISHED[script]


def test_whose_line_it_is() -> None:
    for line in ("--plms", "x --ddim_steps=5", "--prompt x --H 64", "--from-file a.txt"):
        assert applies(["txt2img", *line.split()]), line
    for line in ("--prompt x", "x --steps 5 --seed 3 --precision float32", "x --strength 0.5"):
        assert not applies(["txt2img", *line.split()]), line
    assert not applies(["info", "--plms"]) and not applies([])


def test_the_layout_and_the_seeds(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--H", 32, "--W", 40, "--C", 4, "--f", 4, "--ddim_steps", 2, "--ckpt", tiny_folder, "--outdir", "out")
    for first, sheet in ((0, "grid-0000.png"), (4, "grid-0001.png")):
        flags = ("--plms", "--n_samples", 2, "--n_iter", 2, "--prompt", "a cat", "--scale", 3, "--precision", "full")
        code, out, err = sfumato(capsys, "txt2img", *flags, *size)
        samples = [f"out/samples/{first + i:05}.png" for i in range(4)]
        assert (code, out) == (0, [*samples, f"out/{sheet}"]), err
    made = [read_recipe(f"out/samples/{i:05}.png") for i in range(4)]
    assert [r.seed for r in made] == [42, 43, 44, 45] and {r.prompt for r in made} == {"a cat"}
    assert (made[0].sampler, made[0].spacing, made[0].width, made[0].guidance_scale) == ("plms", "leading", 40, 3)
    with Image.open("out/grid-0000.png") as image:
        assert image.size == (2 * 40 + 4, 2 * 32 + 4)


def test_prompts_from_a_file_and_the_same_noise(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("a cat\ntwo frogs\n")
    flags = ("--from-file", "prompts.txt", "--fixed_code", "--ddim_eta", 0.5, "--skip_grid", "--ddim_steps", 2)
    code, out, err = sfumato(capsys, "txt2img", *flags, "--H", 32, "--W", 32, "--ckpt", tiny_folder)
    assert (code, len(out)) == (0, 4), err
    made = [read_recipe(path) for path in out]
    assert [(r.prompt, r.seed, r.eta) for r in made] == [("a cat", 42, 0.5), ("two frogs", 43, 0.5)] * 2


def test_image_to_image(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.effect_noise((70, 40), 90).save("in.png")
    flags = ("--init-img", "in.png", "--strength", 0.5, "--n_samples", 1, "--ddim_steps", 4, "--skip_save")
    code, out, err = sfumato(capsys, "img2img", *flags, "--ckpt", tiny_folder)
    assert (code, out) == (0, ["outputs/img2img-samples/grid-0000.png"]), err
    made = read_recipe(out[0])
    assert (made.width, made.height, made.strength, made.sampler) == (64, 32, 0.5, "ddim")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("txt2img --plms", "no checkpoint models/ldm/stable-diffusion-v1/model.ckpt, which is the script's default"),
        ("txt2img --laion400m", "no checkpoint models/ldm/text2img-large/model.ckpt"),
        ("txt2img --plms --steps 5", "--steps is not one of the research script's flags"),
        ("txt2img --plms -n 5", "write --n_samples"),
        ("txt2img --n_iters 5 --plms", "write --n_iter;"),
        ("txt2img --H tall", "invalid int value: 'tall'"),
        ("txt2img --n_samples 0", "--n_samples 0: give 1 or more"),
        ("txt2img --ckpt mini --H 100", "height = 100 is not a multiple of 8"),
        ("txt2img --ckpt mini --f 4", "--f 4, but mini has 8"),
        ("txt2img --ckpt mini --from-file gone.txt", "no file gone.txt"),
        ("txt2img --ckpt mini --config gone.yaml", "no file gone.yaml"),
        ("img2img --init-img gone.png --ckpt mini", "--init-img: no picture gone.png"),
        ("img2img --init-img x --plms", "--plms cannot begin from a picture"),
        ("img2img --ddim_steps 5", "img2img needs --init-img FILE"),
    ],
)
def test_bad_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    code, out, err = sfumato(capsys, *line.split())
    assert (code, out) == (2, []) and message in err and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_scripts_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["txt2img", "--plms", "--help"])
    assert left.value.code == 0 and "--ddim_steps" in capsys.readouterr().out
