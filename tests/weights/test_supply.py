"""Stable Diffusion XL and 3 in one file and in several: folder, file and back, beside diffusers, part by part."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfumato.weights import single, supply
from sfumato.weights.compvis import openclip_map
from sfumato.weights.detect import home_of
from sfumato.weights.folder import load_folder, save_folder
from sfumato.weights.model import load_model, save_model
from sfumato.weights.parts import Components
from sfumato.weights.report import report

from ..text.test_t5 import spiece
from ..tiny_sd3 import tiny_sd3
from ..tiny_xl import TINY_XL, tiny_xl
from .tiny_models import TINY, random_parts

TOWERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
NAMES = ("denoiser", "vae", *TOWERS)


def difference(one: nn.Module, other: nn.Module) -> float:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def assert_same(one: Components, other: Components, names: tuple[str, ...] = NAMES) -> None:
    for name in names:
        mine, yours = getattr(one, name), getattr(other, name)
        assert (mine is None) == (yours is None), name
        if mine is not None:
            assert mine.config == yours.config and difference(mine, yours) == 0, name


def tiny(family: str) -> Components:
    return tiny_xl(family) if family in TINY_XL else tiny_sd3(family)


@pytest.mark.parametrize("family", [*TINY_XL, "sd3.5-medium"])
def test_a_folder_becomes_a_file_and_a_folder_again(family: str, tmp_path: Path) -> None:
    """Bit for bit, with the tokenizers and the flag for empty prompts, and the file is written the same again."""
    parts = tiny(family)
    save_folder(parts, tmp_path / "folder")
    save_model(load_folder(tmp_path / "folder"), tmp_path / "one.safetensors")
    back = load_model(tmp_path / "one.safetensors")
    save_model(back, tmp_path / "again")
    save_model(back, tmp_path / "two.safetensors")
    last = load_folder(tmp_path / "again")
    for found in (back, last):
        assert_same(found, parts)
        assert found.force_zeros_for_empty_prompt == parts.force_zeros_for_empty_prompt
        assert found.pipeline == parts.pipeline and found.scheduler.config["_class_name"]
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            mine, yours = getattr(parts, name), getattr(found, name)
            assert (mine is None) == (yours is None)
            assert mine is None or torch.equal(mine(["a red apple"]), yours(["a red apple"]))
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


ROOTS = {
    "StableDiffusionXLPipeline": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
    "StableDiffusionXLImg2ImgPipeline": ("conditioner.embedders.0.model.",),
    "sd3": tuple(f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ROOTS)
def test_diffusers_opens_our_files(family: str, tmp_path: Path) -> None:
    """Their `from_single_file`, with our folder for the configurations, gives exactly our weights."""
    import diffusers

    parts = tiny(family)
    if family == "sd3":
        nn.init.eye_(parts.text_encoder.text_projection.weight)  # type: ignore[union-attr]
    save_folder(parts, tmp_path / "folder")
    save_model(parts, tmp_path / "one.safetensors")
    tensors = load_file(tmp_path / "one.safetensors")
    fixed = ("model.diffusion_model.", "first_stage_model.")
    assert all(name.startswith((*fixed, *ROOTS[family])) for name in tensors)
    assert all(any(name.startswith(root) for name in tensors) for root in (*fixed, *ROOTS[family]))
    opener = getattr(diffusers, parts.pipeline).from_single_file
    theirs = opener(str(tmp_path / "one.safetensors"), config=str(tmp_path / "folder"), local_files_only=True)
    repeated = ("position_ids", "encoder.embed_tokens.weight")
    for name in ("unet" if family != "sd3" else "transformer", "vae", *TOWERS):
        ours, peer = getattr(parts, name), getattr(theirs, name, None)
        if ours is None:
            assert peer is None
            continue
        mine = {key.removeprefix("text_model."): t for key, t in ours.state_dict().items()}
        yours = {key.removeprefix("text_model."): t for key, t in peer.state_dict().items()}
        assert {key for key in yours if not key.endswith(repeated)} == mine.keys(), name
        worst = max(float((yours[key] - mine[key]).abs().max()) for key in mine)
        print(f"{name}: {len(mine)} tensors, largest difference {worst}")
        assert worst == 0


@pytest.mark.parametrize("name", ["sdxl", "sd3-medium"])
def test_a_report_names_the_parts(name: str, tmp_path: Path) -> None:
    parts = random_parts(TINY[name])
    single.save_single(parts, tmp_path / "one.safetensors")
    found = report(tmp_path / "one.safetensors")
    assert found.kind == "model" and found.preset is not None and found.preset.denoiser == TINY[name].denoiser
    first = "transformer" if name == "sd3-medium" else "unet"
    assert [part.name for part in found.parts][:3] == [first, "vae", "text_encoder"]
    assert not (found.missing or found.unknown or found.absent)


def split(parts: Components, folder: Path) -> dict[str, str]:
    """The parts as files of their own, named without prefix, as ComfyUI keeps them."""
    single.save_single(parts, folder / "whole.safetensors", note=False)
    tensors = load_file(folder / "whole.safetensors")
    roots = {
        "transformer": "model.diffusion_model.",
        "ae": "first_stage_model.",
        **{name: f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")},
    }
    paths = {}
    for name, root in roots.items():
        own = {key.removeprefix(root): t.clone() for key, t in tensors.items() if key.startswith(root)}
        if name == "clip_l":
            own.pop("text_projection.weight")
            own["logit_scale"] = torch.zeros(())
        paths[name] = str(folder / f"{name}.safetensors")
        save_file(own, paths[name])
    (folder / "whole.safetensors").unlink()
    return paths


@pytest.fixture
def pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny SD 3.5 medium in five files, read as a released model would be."""
    parts = random_parts(TINY["sd35-medium"])
    monkeypatch.setenv("SFUMATO_MODELS", str(tmp_path / "models"))
    opened = partial(single.load_single, presets=(TINY["sd35-medium"],))
    monkeypatch.setattr("sfumato.weights.model.load_single", opened)
    return parts, split(parts, tmp_path), tmp_path


def test_a_model_in_several_files(pieces: Any) -> None:
    parts, paths, folder = pieces
    vae, clips = paths["ae"], [paths["clip_l"], paths["clip_g"]]
    two = load_model(paths["transformer"], None, vae=vae, base=clips)
    assert_same(two, parts, NAMES[:4])
    assert two.text_encoder_3 is None and two.tokenizer_3 is None  # zeros stand for it
    (folder / "spiece.model").write_bytes(spiece())
    for base in ([*clips, paths["t5xxl"]], ",".join([*clips, paths["t5xxl"]])):
        assert_same(load_model(paths["transformer"], None, vae=vae, base=base), parts)


@pytest.mark.parametrize("whole", [False, True])
def test_the_second_tower_in_openclips_own_names(pieces: Any, whole: bool) -> None:
    """As OpenCLIP spells it, without prefix, also with its tower for pictures beside it."""
    parts, paths, folder = pieces
    table = openclip_map(parts.text_encoder_2.config)
    tensors = {key: t.contiguous() for key, t in table.save(parts.text_encoder_2.state_dict()).items()}
    assert {"token_embedding.weight", "positional_embedding", "text_projection"} < tensors.keys()
    more = {"logit_scale": torch.zeros(()), "visual.conv1.weight": torch.zeros(2, 3, 4, 4)} if whole else {}
    save_file(tensors | more, folder / "open_clip.safetensors")
    assert report(folder / "open_clip.safetensors").kind == "text encoder"
    base = [paths["ae"], paths["clip_l"], folder / "open_clip.safetensors"]
    assert_same(load_model(paths["transformer"], None, base=base), parts, NAMES[:4])


def test_the_tokenizer_of_t5_is_looked_for(pieces: Any) -> None:
    parts, paths, folder = pieces
    base = [paths[name] for name in ("ae", "clip_l", "clip_g", "t5xxl")]
    with pytest.raises(ValueError, match=r"comes with T5 but without its tokenizer: put T5's spiece\.model"):
        load_model(paths["transformer"], None, base=base)
    (folder / "elsewhere.model").write_bytes(spiece())
    found = load_model(paths["transformer"], None, base=[*base, folder / "elsewhere.model"])
    assert_same(found, parts)
    (folder / "models" / "t5").mkdir(parents=True)
    (folder / "models" / "t5" / "spiece.model").write_bytes(spiece())
    assert load_model(paths["transformer"], None, base=base).tokenizer_3 is not None


def test_what_is_missing_or_does_not_go_together_is_named(pieces: Any, tmp_path: Path) -> None:
    _, paths, _ = pieces
    with pytest.raises(ValueError, match="has no autoencoder and no text encoder and no second text encoder; name a"):
        load_model(paths["transformer"], None)
    with pytest.raises(ValueError, match="has no second text encoder; name"):
        load_model(paths["transformer"], None, base=[paths["clip_l"], paths["ae"]])
    save_file({"text_model.embeddings.token_embedding.weight": torch.zeros(4, 4)}, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=r"small\.safetensors holds no part that goes with Stable Diffusion 3\.5"):
        load_model(paths["transformer"], None, base=tmp_path / "small.safetensors")


def test_several_sources() -> None:
    assert supply.sources(None) == [] and supply.sources("a, b,") == ["a", "b"]
    assert supply.sources(Path("a,b")) == [Path("a,b")] and supply.sources("owner/name") == ["owner/name"]


# Denoisers in fewer bits, under names without a prefix.


def as_gguf(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A GGUF file in 8 bits where the shapes allow it; what its tensors then are."""
    gguf = pytest.importorskip("gguf")
    writer, wanted = gguf.GGUFWriter(str(path), "sd3"), {}
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType["Q8_0" if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else "F32"]
        raw = gguf.quants.quantize(tensor.numpy(), kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
        wanted[name] = torch.from_numpy(gguf.quants.dequantize(raw, kind).copy()).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


def as_fp8(tensors: dict[str, Tensor], path: Path, scaled: bool) -> dict[str, Tensor]:
    """A file with its matrices in 8-bit floating point, with scales or without; what its tensors then are."""
    stored, wanted = {}, {}
    for name, tensor in tensors.items():
        stored[name] = wanted[name] = tensor.clone()
        if tensor.ndim == 2 and name.endswith(".weight"):
            scale = tensor.abs().max() / 448 if scaled else torch.ones(())
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            wanted[name] = stored[name].float() * scale
            if scaled:
                stored[name.removesuffix("weight") + "scale_weight"] = scale
    save_file(stored | ({"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} if scaled else {}), path)
    return wanted


@pytest.mark.parametrize("form", ["gguf", "fp8", "scaled fp8"])
@pytest.mark.parametrize("name", ["sdxl", "sdxl-refiner", "sd35-medium"])
def test_a_denoiser_in_eight_bits(name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = random_parts(TINY[name])
    opened = partial(single.load_single, presets=(TINY[name],))
    monkeypatch.setattr("sfumato.weights.model.load_single", opened)
    if parts.text_encoder_3 is not None:
        parts = replace(parts, text_encoder_3=None, tokenizer_3=None)
    save_folder(parts, tmp_path / "base")
    dialect, _ = home_of(TINY[name], "denoiser", parts.denoiser.config)
    table, path = dialect.table(parts.denoiser.config), tmp_path / ("net." + form.split()[-1])
    bare = {key: tensor.contiguous() for key, tensor in table.save(parts.denoiser.state_dict()).items()}
    wanted = as_gguf(bare, path) if form == "gguf" else as_fp8(bare, path, form != "fp8")
    assert report(path).kind == ("transformer" if name.startswith("sd35") else "unet")
    back = load_model(path, base=tmp_path / "base")
    assert_same(back, parts, ("vae", *TOWERS))
    expected = table.load(wanted)
    assert any(not torch.equal(t, parts.denoiser.state_dict()[key]) for key, t in expected.items())
    worst = max(float((t - expected[key]).abs().max()) for key, t in back.denoiser.state_dict().items())
    print(f"{name} as {form}: largest difference {worst}")
    assert worst <= 1e-7
