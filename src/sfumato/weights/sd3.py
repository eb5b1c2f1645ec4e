"""The names of Stable Diffusion 3 in its original files as a key map: mmditx.py of https://github.com/Stability-AI/sd3.5.

model.diffusion_model.                  the transformer         mmdit_map
first_stage_model.                      the autoencoder         compvis.vae_map
text_encoders.clip_l.transformer.       CLIP                    compvis.clip_map
text_encoders.clip_g.transformer.       OpenCLIP's, spelled as transformers does
text_encoders.t5xxl.transformer.        T5                      t5.t5_map
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sfumato.models.mmdit import MMDiTConfig
from sfumato.weights.compvis import translated
from sfumato.weights.keymap import KeyMap, Row
from sfumato.weights.parts import network

# The parts of a block: our attention, its q, k and v, and what theirs calls the three joined.
JOINED: Mapping[str, str] = {
    "attn.to_q": "x_block.attn.qkv",
    "attn.add_q_proj": "context_block.attn.qkv",
    "attn2.to_q": "x_block.attn2.qkv",
}
OTHERS = {name.replace("q", x) for name in JOINED for x in "kv"}  # come with their q
BLOCK: Mapping[str, str] = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


def mmdit_map(config: MMDiTConfig) -> KeyMap:
    """The transformer: q, k and v are one matrix, and two modulations have shift before scale."""
    blocks = dict(mmdit_blocks(config))
    # The norm before the output, and what the last block does to a text that it only reads.
    swapped = ("norm_out.linear", f"transformer_blocks.{config.num_layers - 1}.norm1_context.linear")
    rows: list[Row] = []
    for name in network(config).state_dict():
        module, _, kind = name.rpartition(".")
        block, part = _within(module)
        if name == "pos_embed.pos_embed":
            rows.append(Row((name,), "pos_embed"))
        elif part in JOINED:
            fused = tuple(f"{block}.{part.replace('q', x)}.{kind}" for x in "qkv")
            rows.append(Row(fused, f"{blocks[block]}.{JOINED[part]}.{kind}"))
        elif part not in OTHERS:
            rows.append(Row((name,), translated(name, blocks, BLOCK), "swapped" if module in swapped else ""))
    return KeyMap(tuple(rows))


def mmdit_modules(config: MMDiTConfig) -> Mapping[str, Row]:
    """Their names of the layers, as adapters use them, to rows of our layers: q, k and v are three of ours."""
    names: dict[str, Row] = {}
    for row in mmdit_map(config).rows:
        theirs, _, kind = row.theirs.rpartition(".")
        if kind == "weight":
            names[theirs] = Row(tuple(ours.removesuffix(".weight") for ours in row.ours), theirs, row.shape)
    return names


def mmdit_blocks(config: MMDiTConfig) -> Iterator[tuple[str, str]]:
    """Where the transformer's layers and blocks stand in theirs."""
    yield "pos_embed.proj", "x_embedder.proj"
    yield "context_embedder", "context_embedder"
    for ours, theirs in (("timestep_embedder", "t_embedder"), ("text_embedder", "y_embedder")):
        yield f"time_text_embed.{ours}.linear_1", f"{theirs}.mlp.0"
        yield f"time_text_embed.{ours}.linear_2", f"{theirs}.mlp.2"
    yield "norm_out.linear", "final_layer.adaLN_modulation.1"
    yield "proj_out", "final_layer.linear"
    for i in range(config.num_layers):
        yield f"transformer_blocks.{i}", f"joint_blocks.{i}"


def _within(module: str) -> tuple[str, str]:
    """A layer's block and its name there; two empty texts for a layer of no block."""
    head, *rest = module.split(".", 2)
    return (f"{head}.{rest[0]}", rest[1]) if head == "transformer_blocks" else ("", "")
