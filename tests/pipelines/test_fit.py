"""The three ways of keeping weights: the same pictures, what they take, and what is said where that is too much."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sfumato
from sfumato.cli.app import main
from sfumato.pipelines import fit
from sfumato.pipelines.fit import MEMORY, Memory, estimate, free_memory, resident
from sfumato.pipelines.pipeline import Pipeline
from sfumato.pipelines.request import Request
from sfumato.runtime import choose
from sfumato.weights.folder import Components, load_folder, save_folder
from sfumato.weights.meta import on_meta
from sfumato.weights.model import load_model
from sfumato.weights.packed import Packed
from sfumato.weights.single import save_single
from sfumato.weights.source import open_weights
from tests.pipelines.test_tasks import GIVEN, PROMPT, PROMPTS, made

SMALL = 520  # numbers: more than the tiny towers' tables of positions, less than most layers
Make = Callable[[str], Components]


@pytest.fixture(autouse=True)
def plain_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that computes faster and rounds otherwise, which is for weights that stay."""
    monkeypatch.setenv("SFUMATO_PREPARE", "off")


def kept(folder: Path, way: Memory, dtype: str = "float32") -> Pipeline:
    """A folder's model with its weights kept so, whatever their size."""
    runtime = choose("cpu", dtype)
    pipe = Pipeline(load_folder(folder, runtime.dtype if way == "fast" else None), None, "tiny")
    pipe.runtime = runtime
    pipe._residence = resident(pipe, runtime, way, SMALL)
    return pipe


@pytest.mark.parametrize("task", GIVEN)
def test_the_pictures_are_equal(parts_for: Make, tmp_path: Path, task: str) -> None:
    save_folder(parts_for(task), tmp_path, torch.float16)
    pictures = {}
    for way in MEMORY:
        pipe = kept(tmp_path, way)
        assert pipe.memory == way
        pictures[way] = made(pipe, PROMPTS.get(task, PROMPT), **GIVEN[task])
    assert all(torch.equal(picture, pictures["fast"]) for picture in pictures.values())


@pytest.mark.parametrize("way", ["balanced", "low"])
def test_adapters_and_learned_words_are_equal(
    tiny_parts: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Memory
) -> None:
    monkeypatch.setenv("SFUMATO_MODELS", str(tmp_path))
    generator = torch.Generator().manual_seed(1)
    block = "unet_down_blocks_1_attentions_0_transformer_blocks_0"
    tensors = {}
    for name in (
        f"lora_{block}_attn1_to_q",
        f"lora_{block}_attn2_to_out_0",
        "lora_te_text_model_encoder_layers_0_mlp_fc2",
    ):
        ins, outs = (64, 32) if "fc2" in name else (32, 32)
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, ins, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(outs, 4, generator=generator)
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "style.safetensors")
    word = tmp_path / "word.safetensors"
    save_file({"<word>": torch.randn(2, 32, generator=generator)}, word)
    save_folder(tiny_parts, tmp_path / "model", torch.float16)
    pictures = []
    for pipe in (kept(tmp_path / "model", "fast"), kept(tmp_path / "model", way)):
        plain = made(pipe)
        worn = made(pipe, f"{PROMPT} <lora:{tmp_path}/lora/style.safetensors:0.7>")
        told = made(pipe, f"{PROMPT} <word>", embeddings=[str(word)])
        again = made(pipe)
        assert torch.equal(plain, again) and not torch.equal(plain, worn) and not torch.equal(plain, told)
        pictures.append((plain, worn, told))
    assert all(torch.equal(a, b) for a, b in zip(*pictures, strict=True))


@pytest.mark.parametrize("scaled", [True, False])
def test_8_bit_weights_stay_in_their_file(tiny_parts: Components, tmp_path: Path, scaled: bool) -> None:
    whole, path = tmp_path / "whole.safetensors", tmp_path / "small.safetensors"
    save_single(tiny_parts, whole, torch.float16)
    with open_weights(whole) as weights:
        tensors, metadata = dict(weights), dict(weights.metadata)
    for name in [n for n, t in tensors.items() if t.ndim == 2 and n.endswith(".weight") and "diffusion" in n]:
        scale = tensors[name].abs().max().float() / 448 if scaled else torch.tensor(1.0)
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        if scaled:
            tensors[f"{name.removesuffix('.weight')}.scale_weight"] = scale
    if scaled:
        tensors["model.diffusion_model.scaled_fp8"] = torch.empty(2).to(torch.float8_e4m3fn)
    save_file(tensors, path, metadata)
    fast = made(Pipeline(load_model(path), choose("cpu", "float32"), "tiny"))
    pipe = Pipeline(load_model(path, None, packed=True), None, "tiny")
    pipe.runtime = choose("cpu", "float32")
    pipe._residence = resident(pipe, pipe.runtime, "low", SMALL)
    packed = sum(isinstance(p, Packed) for p in pipe.unet.parameters())
    eight = sum(p.dtype == torch.float8_e4m3fn for p in pipe.unet.parameters())
    print(f"scaled {scaled}: {packed} weights packed, {eight} in 8 bits")
    assert (packed > 5) == scaled and (eight > 5) != scaled
    assert torch.equal(made(pipe), fast)


def test_the_way_can_be_changed(tiny_parts: Components, tmp_path: Path) -> None:
    save_folder(tiny_parts, tmp_path / "model", torch.float16)
    pipe = kept(tmp_path / "model", "low")
    first = made(pipe)
    pipe.save_pretrained(tmp_path / "copy")
    copy, source = (load_folder(tmp_path / name, None).unet.state_dict() for name in ("copy", "model"))
    assert all(torch.equal(copy[name], source[name]) for name in source)
    assert torch.equal(made(pipe), first)
    pipe.set_memory("balanced")
    assert torch.equal(made(pipe), first)
    pipe.set_memory("fast")
    assert pipe.unet.dtype == torch.float32 and torch.equal(made(pipe), first)
    with pytest.raises(ValueError, match="unknown memory 'small'; known: fast, balanced, low"):
        pipe.set_memory("small")


def test_networks_say_what_they_compute_in(tiny_parts: Components, tmp_path: Path) -> None:
    save_folder(tiny_parts, tmp_path, torch.float16)
    pipe = kept(tmp_path, "low")
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.float32  # type: ignore[union-attr]
    pipe.to(dtype=torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16 and torch.isfinite(made(pipe)).all()


def test_estimates_count_weights_once_by_what_is_there(tiny_parts: Components) -> None:
    request = Request(prompt="a", width=32, height=32)
    needs = {way: estimate(tiny_parts, request, way, torch.float32) for way in MEMORY}
    assert needs["low"] < needs["balanced"] < needs["fast"]
    weights = sum(p.numel() * 4 for net in (tiny_parts.unet, tiny_parts.vae) for p in net.parameters())
    assert needs["fast"] > weights
    larger = request.model_copy(update={"width": 64})
    assert estimate(tiny_parts, larger, "fast", torch.float32) > needs["fast"]
    assert estimate(tiny_parts, request, "fast", torch.bfloat16) < needs["fast"]


def limited(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(fit, "free_memory", lambda device: free)


def test_the_fastest_way_that_fits(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = load_folder(tiny_folder, None)
    request = Request(prompt=PROMPT)
    for way in MEMORY:
        limited(monkeypatch, estimate(parts, request, way, torch.float32))
        assert sfumato.load(tiny_folder, "float32", "cpu").memory == way


def test_too_much_is_refused_at_once(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, out = load_folder(tiny_folder, None), str(tmp_path / "x.png")
    request = Request(prompt=PROMPT)
    limited(monkeypatch, estimate(parts, request, "low", torch.float32))
    command = ["txt2img", PROMPT, "--model", str(tiny_folder), "-o", out, "--precision", "float32"]
    assert main([*command, "--memory", "fast"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "GiB" in line and "--memory low would need" in line
    print(line)
    assert main([*command, "--steps", "1"]) == 0
    assert "memory low" in capsys.readouterr().err
    limited(monkeypatch, 1000)
    assert main([*command, "-o", str(tmp_path / "y.png")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "a smaller picture" in line
    assert main([*command, "-o", str(tmp_path / "y.png"), "--memory", "much"]) == 2
    assert "unknown memory 'much'; known: fast, balanced, low" in capsys.readouterr().err


def test_limits_of_the_process_count(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert free_memory(cpu, tmp_path) is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert free_memory(cpu, tmp_path) == 5000 * 1024
    group = tmp_path / "sys/fs/cgroup/work"
    group.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/work\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000000\n")
    assert free_memory(cpu, tmp_path) == 5000 * 1024
    (group / "memory.max").write_text("3000000\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 400000\n")
    assert free_memory(cpu, tmp_path) == 2_400_000
    old = tmp_path / "sys/fs/cgroup/memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("1500000")
    (old / "memory.usage_in_bytes").write_text("1000000")
    assert free_memory(cpu, tmp_path) == 500_000
    assert free_memory(torch.device("meta"), tmp_path) is None
    assert (free_memory(cpu) or 1) > 0


def test_a_large_picture_is_decoded_in_tiles(tiny_parts: Components) -> None:
    pipe = Pipeline(tiny_parts, choose("cpu", "float32"))
    pipe.set_memory("low")
    assert pipe.vae.tile == 512
    pipe.set_memory("balanced")
    assert pipe.vae.tile is None


def test_full_size_estimates_need_no_weights() -> None:
    from sfumato.diffusion.scheduler import Scheduler
    from sfumato.presets import PRESETS
    from sfumato.weights.parts import NETWORKS

    preset = next(p for p in PRESETS if p.name == "sd15")
    nets = [on_meta(lambda c=c: NETWORKS[type(c)](c)) for c in (preset.denoiser, preset.vae, preset.text)]
    parts = Components(*nets, None, Scheduler.from_config(preset.scheduler))
    low, fast = (estimate(parts, Request(prompt="a"), way, torch.float32) / 2**30 for way in ("low", "fast"))
    print(f"SD 1.5 in float32: low {low:.2f} GiB, fast {fast:.2f} GiB")
    assert low < 2.1 and 4 < fast < 6
