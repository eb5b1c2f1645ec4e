from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from sfumato.cli import main
from sfumato.cli.models import size
from sfumato.weights.folder import Components, load_folder
from sfumato.weights.listing import listing
from sfumato.weights.safe import read_tensors, write_tensors
from sfumato.weights.source import Weights

COMMIT = "89abcdef" * 5


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    place = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place))
    return place


@pytest.fixture
def library(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder, and nothing in the hub's cache."""
    root = tmp_path / "models"
    root.mkdir()
    monkeypatch.setenv("SFUMATO_MODELS", str(root))
    return root


def checkpoint(context: int) -> dict[str, torch.Tensor]:
    """The two tensors by which the U-Net of a checkpoint is known."""
    prefix = "model.diffusion_model.input_blocks."
    first, deep = "0.0.weight", "1.1.transformer_blocks.0.attn2.to_k.weight"
    return {prefix + first: torch.zeros(320, 4, 3, 3), prefix + deep: torch.zeros(2, context)}


def lora(context: int) -> dict[str, torch.Tensor]:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    return {
        f"{module}.lora_down.weight": torch.zeros(4, context),
        f"{module}.lora_up.weight": torch.zeros(320, 4),
        f"{module}.alpha": torch.tensor(4.0),
    }


def fill(root: Path, tiny_folder: Path) -> None:
    write_tensors(root / "v1.safetensors", checkpoint(768))
    write_tensors(root / "flux.safetensors", checkpoint(2048) | {"double_blocks.0.x": torch.zeros(1)})
    write_tensors(root / "Lora" / "ink.safetensors", lora(768))
    write_tensors(root / "Lora" / "ink2.safetensors", lora(1024))
    write_tensors(root / "embeddings" / "smooth.safetensors", {"emb_params": torch.zeros(3, 1024)})
    torch.save({"string_to_param": {"*": torch.zeros(2, 768)}, "name": "old"}, root / "embeddings" / "old.pt")
    write_tensors(root / "something.safetensors", {"a": torch.zeros(2, 2, 2), "b": torch.zeros(1)})
    (root / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (root / "gone.safetensors").symlink_to(root / "nowhere")
    shutil.copytree(tiny_folder, root / "diffusers" / "tiny")
    shutil.copytree(tiny_folder / "vae", root / "VAE" / "sharp")
    shutil.copy(tiny_folder / "vae" / "diffusion_pytorch_model.safetensors", root / "VAE" / "soft.safetensors")
    torch.save(read_tensors(root / "v1.safetensors"), root / "mislabelled.pt")


def test_what_there_is_is_told_by_content(library: Path, tiny_folder: Path) -> None:
    fill(library, tiny_folder)
    found = {entry.name: entry for entry in listing()}
    kinds = {name: (entry.kind, entry.family) for name, entry in found.items()}
    assert kinds.pop("broken.safetensors")[0] == kinds.pop("gone.safetensors")[0] == "unreadable"
    assert kinds == {
        "v1.safetensors": ("unet", "Stable Diffusion 1.x"),
        "mislabelled.pt": ("unet", "Stable Diffusion 1.x"),
        "flux.safetensors": ("checkpoint", "FLUX, not supported"),
        "Lora/ink.safetensors": ("lora", "Stable Diffusion 1.x"),
        "Lora/ink2.safetensors": ("lora", "Stable Diffusion 2.x"),
        "embeddings/smooth.safetensors": ("embedding", "Stable Diffusion 2.x"),
        "embeddings/old.pt": ("embedding", "Stable Diffusion 1.x"),
        "something.safetensors": ("other", ""),
        "diffusers/tiny": ("folder", "a model of its own"),
        "VAE/sharp": ("vae", "KL, 4 channels, 1/4 size"),
        "VAE/soft.safetensors": ("vae", "KL, 4 channels, 1/4 size"),
    }
    assert found["VAE/soft.safetensors"].size == (library / "VAE" / "soft.safetensors").stat().st_size
    assert found["diffusers/tiny"].size == sum(p.stat().st_size for p in tiny_folder.rglob("*") if p.is_file())
    assert "the file that this links to is not there" in found["gone.safetensors"].family


def put(cache: Path, repo: str, files: dict[str, Path], commit: str, ref: str | None) -> None:
    """Files in the layout of the hub's cache."""
    home = cache / f"models--{repo.replace('/', '--')}"
    for folder in ("blobs", "refs"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    if ref is not None:
        (home / "refs" / ref).write_text(commit)
    for name, file in files.items():
        blob = home / "blobs" / (commit[:4] + name.replace("/", "-"))
        shutil.copy(file, blob)
        link = home / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)


def test_the_cache_of_the_hub_is_looked_through(library: Path, cache: Path, tiny_folder: Path, tmp_path: Path) -> None:
    files = {p.relative_to(tiny_folder).as_posix(): p for p in tiny_folder.rglob("*") if p.is_file()}
    put(cache, "a/whole", files, COMMIT, "main")
    put(cache, "a/whole", files, COMMIT[::-1], "fp16")
    write_tensors(tmp_path / "ink.safetensors", lora(768))
    write_tensors(tmp_path / "words.safetensors", {"model.layers.0.weight": torch.zeros(2, 2), "b": torch.zeros(1)})
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    put(cache, "b/ink", {"ink.safetensors": tmp_path / "ink.safetensors"}, COMMIT, "main")
    words = {"config.json": tmp_path / "config.json", "model.safetensors": tmp_path / "words.safetensors"}
    put(cache, "c/words", words, COMMIT, "main")
    put(cache, "d/damaged", {"ink.safetensors": tmp_path / "ink.safetensors"}, COMMIT, "main")
    (cache / "models--d--damaged" / "blobs" / f"{COMMIT[:4]}ink.safetensors").unlink()
    found = [(entry.name, entry.kind, entry.family) for entry in listing() if entry.kind != "unreadable"]
    assert found == [
        ("a/whole", "folder", "a model of its own"),
        ("a/whole@fp16", "folder", "a model of its own"),
        ("b/ink/ink.safetensors", "lora", "Stable Diffusion 1.x"),
    ]
    (damaged,) = [entry for entry in listing() if entry.kind == "unreadable"]
    assert "Blob missing" in damaged.family and damaged.source == "hub cache"


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(["models", *args])
    return code, *capsys.readouterr()


def test_the_table_and_the_json(
    library: Path, cache: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(library, tiny_folder)
    code, out, err = run(capsys)
    lines = out.splitlines()
    assert code == 0 and lines[0].split() == ["name", "kind", "family", "size", "path"] and len(lines) == 14
    (ink,) = [line for line in lines if line.startswith("Lora/ink.s")]
    assert " lora " in ink and " Stable Diffusion 1.x " in ink and str(library / "Lora" / "ink.safetensors") in ink
    assert err == f"13 found; looked in {library} and {cache}\n"
    code, out, err = run(capsys, "--json")
    found = json.loads(out)
    assert (code, err, found["models_folder"], found["hub_cache"]) == (0, "", str(library), str(cache))
    assert len(found["models"]) == 13
    assert set(found["models"][0]) == {"name", "kind", "family", "size", "path", "source"}
    code, out, _ = run(capsys, "--folder", str(library / "Lora"))
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:]] == ["ink.safetensors", "ink2.safetensors"]


def test_nothing_found_says_what_to_do(library: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert (code, out) == (0, "") and f"put models into {library} " in err and "SFUMATO_MODELS" in err
    code, out, err = run(capsys, "--folder", "nowhere")
    assert (code, out) == (2, "") and "no folder nowhere" in err and err.count("\n") == 1


def test_a_listed_name_opens(library: Path, tiny_folder: Path, tiny_parts: Components) -> None:
    from sfumato.weights.hub import find_model

    shutil.copytree(tiny_folder, library / "diffusers" / "tiny")
    (entry,) = listing()
    assert find_model(entry.name) == find_model("TINY") == entry.path
    assert load_folder(entry.path).unet.config == tiny_parts.unet.config


def test_only_headers_are_read(library: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(library, tiny_folder)

    def read(self: Weights, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Weights, "__getitem__", read)
    assert len(listing()) == 13


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (4_265_146_304, "4.27 GB"), (10**16, "1e+04 TB")],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert size(count) == text
