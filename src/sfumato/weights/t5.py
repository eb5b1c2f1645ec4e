"""How files name the tensors of the T5 encoder."""

from __future__ import annotations

from collections.abc import Mapping

from sfumato.models.t5 import T5Config
from sfumato.weights.compvis import translated
from sfumato.weights.keymap import KeyMap, Row
from sfumato.weights.parts import network

GGML_LAYER: Mapping[str, str] = {
    **{f"0.SelfAttention.{x}": f"attn_{x}" for x in "qkvo"},
    "0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "0.layer_norm": "attn_norm",
    "1.DenseReluDense.wi_0": "ffn_gate",
    "1.DenseReluDense.wi_1": "ffn_up",
    "1.DenseReluDense.wo": "ffn_down",
    "1.layer_norm": "ffn_norm",
}


def t5_map(config: T5Config) -> KeyMap:
    """T5's encoder as transformers names it; some files hold the table of tokens twice, and whole T5's a decoder."""
    names = network(config).state_dict()
    extras = ("encoder.embed_tokens.weight", "decoder.*", "lm_head.weight")
    return KeyMap(tuple(Row((name,), name) for name in names), extras)


def ggml_map(config: T5Config) -> KeyMap:
    """T5's encoder as llama.cpp names it, in GGUF files."""
    blocks = {"shared": "token_embd", "encoder.final_layer_norm": "enc.output_norm"}
    for i in range(config.num_layers):
        for ours, theirs in GGML_LAYER.items():
            blocks[f"encoder.block.{i}.layer.{ours}"] = f"enc.blk.{i}.{theirs}"
    names = network(config).state_dict()
    return KeyMap(tuple(Row((name,), translated(name, blocks, {})) for name in names))
