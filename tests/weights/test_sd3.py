"""The names of Stable Diffusion 3: at full size without memory, and tiny ones against diffusers' own converter."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders import single_file_utils as peer
from torch import Tensor

from sfumato.models.mmdit import MMDiT, MMDiTConfig
from sfumato.models.t5 import T5Config, T5EncoderModel
from sfumato.presets.sd3 import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from sfumato.weights import sd3, t5
from sfumato.weights.keymap import KeyMap

from .test_compvis import assert_bijective, assert_same, meta, random
from .tiny_models import TINY

LANDMARKS = {
    "sd3-medium": {
        "pos_embed": (1, 36864, 1536),
        "x_embedder.proj.weight": (1536, 16, 2, 2),
        "context_embedder.weight": (1536, 4096),
        "y_embedder.mlp.0.weight": (1536, 2048),
        "t_embedder.mlp.0.weight": (1536, 256),
        "joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536),
        "joint_blocks.0.context_block.adaLN_modulation.1.weight": (9216, 1536),
        "joint_blocks.23.context_block.adaLN_modulation.1.weight": (3072, 1536),
        "joint_blocks.23.x_block.mlp.fc2.weight": (1536, 6144),
        "final_layer.adaLN_modulation.1.weight": (3072, 1536),
        "final_layer.linear.weight": (64, 1536),
    },
    "sd35-medium": {
        "pos_embed": (1, 147456, 1536),
        "joint_blocks.12.x_block.attn2.qkv.weight": (4608, 1536),
        "joint_blocks.12.x_block.attn2.ln_k.weight": (64,),
        "joint_blocks.12.x_block.adaLN_modulation.1.weight": (13824, 1536),
        "joint_blocks.13.x_block.adaLN_modulation.1.weight": (9216, 1536),
        "joint_blocks.0.context_block.attn.ln_q.weight": (64,),
    },
    "sd35-large": {
        "pos_embed": (1, 36864, 2432),
        "joint_blocks.37.context_block.attn.qkv.bias": (7296,),
    },
}


@pytest.mark.parametrize("preset", [SD3_MEDIUM, SD35_MEDIUM, SD35_LARGE], ids=lambda preset: preset.name)
def test_full_size_transformers_are_covered(preset: object) -> None:
    config = preset.denoiser  # type: ignore[attr-defined]
    theirs = assert_bijective(sd3.mmdit_map(config), meta(lambda: MMDiT(config)))
    expected = LANDMARKS[preset.name]  # type: ignore[attr-defined]
    assert {name: tuple(theirs[name].shape) for name in expected} == expected
    last = config.num_layers - 1
    assert not any(name.startswith(f"joint_blocks.{last}.context_block.mlp") for name in theirs)
    assert f"joint_blocks.{last}.context_block.attn.proj.weight" not in theirs
    assert not any("attn2" in name or "ln_" in name for name in theirs) or preset is not SD3_MEDIUM


@pytest.mark.parametrize("name", ["sd3-medium", "sd35-medium", "sd35-large"])
def test_diffusers_reads_our_transformers(name: str) -> None:
    config = TINY[name].denoiser
    assert isinstance(config, MMDiTConfig)
    ours, table = random(MMDiT(config)), sd3.mmdit_map(config)
    theirs = table.prefixed("model.diffusion_model.").save(ours)
    assert_same(peer.convert_sd3_transformer_checkpoint_to_diffusers(dict(theirs)), ours)
    assert_same(table.prefixed("model.diffusion_model.").load(theirs), ours)


def test_halves_are_exchanged_and_back() -> None:
    config = TINY["sd3-medium"].denoiser
    table: KeyMap = sd3.mmdit_map(config)  # type: ignore[arg-type]
    swapped = [row for row in table.rows if row.shape == "swapped"]
    assert [row.theirs for row in swapped] == [
        f"{place}.adaLN_modulation.1.{kind}"
        for place in ("joint_blocks.2.context_block", "final_layer")
        for kind in ("weight", "bias")
    ]
    rows = torch.arange(6.0)
    assert swapped[0].load(rows)[0].tolist() == [3, 4, 5, 0, 1, 2] == swapped[0].save([rows]).tolist()
    with pytest.raises(ValueError, match="multiple of 2"):
        swapped[0].load(torch.zeros(3))


def test_t5_as_llama_cpp_names_it() -> None:
    gguf = pytest.importorskip("gguf")
    config = T5Config()
    theirs: dict[str, Tensor] = assert_bijective(t5.ggml_map(config), meta(lambda: T5EncoderModel(config)))
    kinds = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.T5ENCODER]
    known = {gguf.TENSOR_NAMES[kind].format(bid=i) for kind in kinds for i in range(config.num_layers)}
    assert {name.rpartition(".")[0] for name in theirs} <= known
    assert theirs["enc.blk.0.attn_rel_b.weight"].shape == (32, 64)
    assert theirs["token_embd.weight"].shape == (32128, 4096)
