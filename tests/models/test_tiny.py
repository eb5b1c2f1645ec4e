"""The tiny autoencoder beside diffusers' AutoencoderTiny, and in the place of a model's own."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

from sfumato.cli import main
from sfumato.files import write_json
from sfumato.models.tiny import AutoencoderTiny, TinyConfig
from sfumato.pipelines.pipeline import Pipeline, load
from sfumato.presets.classic import SD_VAE
from sfumato.recipes.recipe import read
from sfumato.weights.model import load_vae
from sfumato.weights.safe import write_tensors

from ..conftest import tiny_task
from .parity import assert_close, count, exchange, scramble

SMALL = {"encoder_block_out_channels": (16,) * 3, "decoder_block_out_channels": (16,) * 3}
BLOCKS = {"num_encoder_blocks": (1, 2, 2), "num_decoder_blocks": (2, 2, 1)}
TAESD = 2_445_063  # parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny autoencoder four times smaller, as a folder."""
    place = tmp_path_factory.mktemp("tiny") / "taesd"
    net = AutoencoderTiny(TinyConfig(**SMALL, **BLOCKS))
    scramble(net)
    write_tensors(place / "diffusion_pytorch_model.safetensors", net.state_dict())
    write_json(place / "config.json", net.config.to_dict())
    return place


@pytest.mark.parametrize("shape", [{}, {"latent_channels": 16}, {**SMALL, **BLOCKS}])
@torch.no_grad()
def test_same_as_diffusers(shape: dict[str, object]) -> None:
    c = TinyConfig.from_dict(shape)
    ours, theirs = AutoencoderTiny(c), diffusers.AutoencoderTiny.from_config(c.to_dict())
    if shape == {}:
        assert count(ours) == TAESD
    exchange(ours, theirs)
    x = torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(3)) * 2 - 1
    z = theirs.encode(x).latents
    assert_close("encode", ours.encode(x).latents, z, 1e-5)
    assert_close("decode", ours.decode(3 * z / z.std()).sample, theirs.decode(3 * z / z.std()).sample, 1e-5)
    ours.to(memory_format=torch.channels_last)
    assert_close("channels last", ours.to_pixels(z), theirs.decode(z).sample, 1e-5)


def test_config_survives_the_round_trip_through_diffusers() -> None:
    c = TinyConfig(**SMALL, **BLOCKS, scaling_factor=0.7)
    theirs = diffusers.AutoencoderTiny.from_config(c.to_dict())
    assert TinyConfig.from_dict(dict(theirs.config)) == c == TinyConfig.from_dict(c.to_dict())
    assert (c.factor, TinyConfig().factor) == (4, 8)
    for wrong, said in (({"act_fn": "silu"}, "act_fn = 'silu' is not"), ({"num_encoder_blocks": (1,)}, "give 4 entr")):
        with pytest.raises(ValueError, match=said):
            TinyConfig.from_dict(wrong)


def test_tiles_are_the_whole(folder: Path) -> None:
    vae = load_vae(folder, torch.float32, "cpu", TinyConfig(**SMALL, **BLOCKS))
    z = torch.randn(2, 4, 24, 24)
    with torch.no_grad():
        whole = vae.to_pixels(z)
        vae.enable_tiling(64)
        assert_close("tiles, inside", vae.to_pixels(z)[..., :30, :30], whole[..., :30, :30], 0.05)
        vae.disable_tiling()
        vae.enable_slicing()
        assert_close("slices", vae.to_pixels(z), whole)


def test_in_the_place_of_a_models_own(tiny_folder: Path, folder: Path, tmp_path: Path) -> None:
    exact, tiny = load(tiny_folder, "float32"), load(tiny_folder, "float32", vae=folder)
    asked = {"num_inference_steps": 2, "seed": 1, "output_type": "latent"}
    assert torch.equal(exact("a red apple", **asked).images, tiny("a red apple", **asked).images)
    assert isinstance(tiny.vae, AutoencoderTiny)
    image = Image.effect_noise((32, 32), 90).convert("RGB")
    (picture,) = tiny("a red apple", image=image, mask=Image.new("L", (32, 32), 255), num_inference_steps=2).images
    assert picture.size == (32, 32)
    tiny.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderTiny"]
    again = load(tmp_path / "model", "float32")
    assert isinstance(again.vae, AutoencoderTiny)
    theirs = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "model" / "vae")
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert_close("saved", again.vae.to_pixels(z), theirs.decode(z).sample, 1e-5)


def test_one_file_is_enough(tmp_path: Path) -> None:
    net = AutoencoderTiny(TinyConfig())
    write_tensors(tmp_path / "taesd.safetensors", net.state_dict())
    found = load_vae(tmp_path / "taesd.safetensors", torch.float32, "cpu", SD_VAE)
    assert isinstance(found, AutoencoderTiny) and found.config == TinyConfig()
    with pytest.raises(ValueError, match=r"latents of 4 channels, 8 times smaller; the model's have 4 and are 4 times"):
        load_vae(tmp_path / "taesd.safetensors", torch.float32, "cpu", TinyConfig(**SMALL, **BLOCKS))


def test_on_the_command_line(
    tiny_folder: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["txt2img", "a red apple", "-m", str(tiny_folder), "--steps", "1", "--seed", "1", "-o", "a.png"]
    assert main([*line, "--tiny-vae", str(folder)]) == 0
    assert read(tmp_path / "a.png").fields["vae"] == str(folder)
    capsys.readouterr()
    assert main(["txt2img", "a red apple", "--steps", "1", "--tiny-vae", str(folder), "-o", "b.png"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "4 times smaller; the model's have 4 and are 8 times smaller" in said


def test_an_instruction_model_needs_its_own(folder: Path) -> None:
    parts = tiny_task("instruct")
    pipe = Pipeline(parts)
    pipe.vae = load_vae(folder, torch.float32, "cpu", parts.vae.config)
    pipe = Pipeline(type(parts)(**{**vars(parts), "vae": pipe.vae}))
    with pytest.raises(ValueError, match=r"is shown what its own autoencoder says .* leave out vae$"):
        pipe("make it red", image=Image.new("RGB", (32, 32)), seed=1, num_inference_steps=1)
