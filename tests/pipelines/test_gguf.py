"""Denoisers from GGUF files beside a folder's other parts: gguf's own numbers, and diffusers' pictures of these."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.pipelines import doors_sd3, doors_xl
from sfumato.pipelines.pipeline import Pipeline
from sfumato.weights import single
from sfumato.weights.detect import home_of
from sfumato.weights.folder import save_folder
from sfumato.weights.model import load_model

from ..weights.tiny_models import TINY, random_parts
from .test_tasks_parity import PROMPT, seeded

gguf = pytest.importorskip("gguf")
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
DOORS = {"sdxl": doors_xl.StableDiffusionXLPipeline, "sd35-medium": doors_sd3.StableDiffusion3Pipeline}
ABSENT: dict[str, dict[str, Any]] = {"sdxl": {}, "sd35-medium": {"text_encoder_3": None, "tokenizer_3": None}}
BLOCK = 256  # numbers in a block of Q6_K: 4 low bits of each, 2 high bits, 16 scales, and one for all


def packed(tensor: Tensor, kind: Any, draw: np.random.Generator) -> np.ndarray:
    """The rows of a tensor in blocks of a type. The package writes no K types: of these, blocks with random numbers."""
    rows = tensor.numpy()
    if kind != gguf.GGMLQuantizationType.Q6_K:
        return np.asarray(gguf.quants.quantize(rows, kind))
    count = rows.size // BLOCK
    bits = draw.integers(0, 256, (count, 192), dtype=np.uint8)
    scales = draw.integers(5, 15, (count, 16), dtype=np.uint8)
    whole = np.full((count, 1), float(tensor.std()) / 185, np.float16).view(np.uint8)
    return np.concatenate([bits, scales, whole], axis=1).reshape(*rows.shape[:-1], -1)


def written(tensors: dict[str, Tensor], path: Path, name: str) -> dict[str, Tensor]:
    """A GGUF file as converters write it: matrices and kernels packed, in rows of other lengths where their own are no
    multiple of a block; the rest as it is. What its tensors then are, by gguf.
    """
    kind = gguf.GGMLQuantizationType[name]
    block = gguf.GGML_QUANT_SIZES[kind][0]
    writer, wanted, draw = gguf.GGUFWriter(str(path), "sd3"), {}, np.random.default_rng(0)
    for key, tensor in tensors.items():
        if tensor.ndim < 2 or tensor.numel() % block:
            writer.add_tensor(key, tensor.numpy())
            wanted[key] = tensor
            continue
        whole = tensor.shape[-1] % block == 0
        if not whole:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", tuple(tensor.shape))
        raw = packed(tensor if whole else tensor.reshape(-1, block), kind, draw)
        writer.add_tensor(key, raw, raw_dtype=kind)
        wanted[key] = torch.from_numpy(gguf.quants.dequantize(raw, kind).copy()).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q6_K"])
@pytest.mark.parametrize("name", DOORS)
def test_a_picture_from_a_gguf_denoiser(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    parts = replace(random_parts(TINY[name]), text_encoder_3=None, tokenizer_3=None)
    monkeypatch.setattr("sfumato.weights.model.load_single", partial(single.load_single, presets=(TINY[name],)))
    dialect, _ = home_of(TINY[name], "denoiser", parts.denoiser.config)
    table = dialect.table(parts.denoiser.config)
    bare = {key: tensor.contiguous() for key, tensor in table.save(parts.denoiser.state_dict()).items()}
    save_folder(parts, tmp_path / "base")
    expected = table.load(written(bare, tmp_path / f"net-{kind}.gguf", kind))
    changed = sum(not torch.equal(tensor, parts.denoiser.state_dict()[key]) for key, tensor in expected.items())
    assert changed > len(expected) / 4
    loaded = load_model(tmp_path / f"net-{kind}.gguf", base=tmp_path / "base")
    state = loaded.denoiser.state_dict()
    worst = max(float((state[key] - tensor).abs().max()) for key, tensor in expected.items())
    print(f"{name} {kind}: {changed} of {len(expected)} tensors packed, largest difference {worst}")
    assert worst == 0
    parts.denoiser.load_state_dict(expected)
    save_folder(parts, tmp_path / "unpacked")
    peer = getattr(diffusers, DOORS[name].__name__).from_pretrained(str(tmp_path / "unpacked"), **ABSENT[name])
    peer.set_progress_bar_config(disable=True)
    door = DOORS[name].from_pipe(Pipeline(loaded))
    door.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPT, "height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}
    ours, theirs = (pipe(**call, generator=seeded()).images for pipe in (door, peer))
    difference = float(np.abs(ours - theirs).max()) * 255
    print(f"{name} {kind}: largest difference {difference:.4f} of 255")
    assert difference <= 2 and float(ours.std()) > 0.01
