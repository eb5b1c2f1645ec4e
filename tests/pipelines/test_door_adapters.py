"""Adapters and learned words on a door: the pictures that they give in diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sfumato

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]
PROMPT, NEGATIVE = "a red apple", "two green frogs"
CALL: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": 4, "output_type": "np"}


def largest(a: Any, b: Any) -> float:
    """The largest difference, in levels of 255."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max()) * 255


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe(tiny_folder: Path) -> sfumato.StableDiffusionPipeline:
    """The door for text, on the tiny folder."""
    return sfumato.StableDiffusionPipeline.from_pretrained(str(tiny_folder))


@pytest.fixture
def peer(tiny_folder: Path) -> Any:
    """Diffusers' door for text, on the tiny folder."""
    import diffusers

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(str(tiny_folder), local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    return theirs


TOWERS = {"unet": ("to_q", "to_v"), "text_encoder": ("q_proj", "v_proj")}


def lora(path: Path, door: Any, seed: int, towers: Sequence[str]) -> Path:
    """An adapter file on the attention of a door's networks, in diffusers' spelling."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for tower in towers:
        for name, module in getattr(door, tower).named_modules():
            if name.endswith(TOWERS[tower]):
                down, up = (4, module.in_features), (module.out_features, 4)
                tensors[f"{tower}.{name}.lora_A.weight"] = torch.randn(down, generator=generator) * 0.3
                tensors[f"{tower}.{name}.lora_B.weight"] = torch.randn(up, generator=generator) * 0.3
    save_file(tensors, path)
    return path


def test_adapters_act_as_in_diffusers(pipe: Any, peer: Any, tmp_path: Path) -> None:
    # The second on the U-Net alone: diffusers draws anew what two hold of the text tower, under transformers 5.
    lora(tmp_path / "one.safetensors", pipe, 1, list(TOWERS))
    lora(tmp_path / "two.safetensors", pipe, 2, ["unet"])

    def both(what: str, difference: bool = True, **more: Any) -> None:
        ours, theirs = (p(**CALL, **more, generator=seeded()).images for p in (pipe, peer))
        print(f"{what}: {largest(ours, theirs):.5f} of 255")
        assert largest(ours, theirs) <= 0.01
        assert (largest(ours, plain) > 0.5) == difference, what

    plain = pipe(**CALL, generator=seeded()).images
    for door in (pipe, peer):
        door.load_lora_weights(str(tmp_path), weight_name="one.safetensors", adapter_name="one")
    both("one")
    both("one at 0.4", cross_attention_kwargs={"scale": 0.4})
    both("one again")
    for door in (pipe, peer):
        door.load_lora_weights(str(tmp_path / "two.safetensors"), adapter_name="two")
    assert pipe.get_active_adapters() == ["two"]
    for door in (pipe, peer):
        door.set_adapters(["one", "two"], adapter_weights=[0.7, -0.4])
    both("one and two")
    assert {tuple(v) for v in pipe.get_list_adapters().values()} == {("one", "two")}
    for door in (pipe, peer):
        door.disable_lora()
    both("disabled", difference=False)
    for door in (pipe, peer):
        door.enable_lora()
        door.set_adapters("one")
        door.fuse_lora(lora_scale=0.5)
    both("fused")
    for door in (pipe, peer):
        door.unfuse_lora()
        door.unload_lora_weights()
    both("unloaded", difference=False)
    assert largest(pipe(**CALL, generator=seeded()).images, plain) == 0
    with pytest.raises(ValueError, match="no adapter 'three' is loaded; loaded: none"):
        pipe.set_adapters("three")


def test_learned_words(pipe: Any, peer: Any, tmp_path: Path) -> None:
    vectors = torch.randn((2, 32), generator=seeded()) * 0.05
    save_file({"<toy>": vectors}, tmp_path / "learned_embeds.safetensors")
    for door in (pipe, peer):
        door.load_textual_inversion(str(tmp_path / "learned_embeds.safetensors"), token="<toy>")
    call = CALL | {"prompt": "a <toy> on a blue background"}
    ours, theirs = (p(**call, generator=seeded()).images for p in (pipe, peer))
    assert largest(ours, theirs) <= 0.01
    pipe.save_pretrained(tmp_path / "saved")
    again = sfumato.StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert largest(pipe(**call, generator=seeded()).images, ours) == 0
    pipe.unload_textual_inversion("<toy>")
    for door in (pipe, again):
        assert largest(door(**call, generator=seeded()).images, ours) > 0.1
    with pytest.raises(ValueError, match="no word '<toy>' was learned"):
        pipe.unload_textual_inversion("<toy>")
