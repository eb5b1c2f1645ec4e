"""The key maps of depth estimators: in model folders, and in single files, which spell them as MiDaS does."""

from __future__ import annotations

from collections.abc import Iterator

from sfumato.models.dpt import STATES, DPTConfig
from sfumato.weights.compvis import translated
from sfumato.weights.keymap import KeyMap, Row
from sfumato.weights.parts import network

# What transformers writes, and the published files lack: layers that no picture goes through.
UNREAD = ("neck.fusion_stage.layers.0.residual_layer1.*",)
# In MiDaS' files these are the same layers, and the head with which the transformer told things apart.
MIDAS_UNREAD = (f"scratch.refinenet{STATES}.resConfUnit1.*", "pretrained.model.head.*")
MIDAS_LAYER = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
MIDAS_FUSION = {
    "projection": "out_conv",
    **{
        f"residual_layer{unit}.convolution{conv}": f"resConfUnit{unit}.conv{conv}" for unit in (1, 2) for conv in (1, 2)
    },
}


def dpt_map(config: DPTConfig) -> KeyMap:
    """DPT as transformers names it: our names, and layers that take no part."""
    return KeyMap(tuple(Row((name,), name) for name in network(config).state_dict()), UNREAD)


def midas_map(config: DPTConfig) -> KeyMap:
    """DPT as MiDaS names it (dpt_depth.py), transformer and ResNet as timm does: q, k and v are one matrix."""
    blocks, leaves = dict(midas_blocks(config)), MIDAS_LAYER | MIDAS_FUSION
    rows: list[Row] = []
    for name in network(config).state_dict():
        block, _, part = name.partition(".attention.attention.")
        if name == "dpt.embeddings.position_embeddings":
            rows.append(Row((name,), "pretrained.model.pos_embed"))
        elif part.startswith("query."):
            kind = part.removeprefix("query.")
            fused = tuple(f"{block}.attention.attention.{x}.{kind}" for x in ("query", "key", "value"))
            rows.append(Row(fused, f"{blocks[block]}.attn.qkv.{kind}"))
        elif not part:
            rows.append(Row((name,), translated(name, blocks, leaves)))
    return KeyMap(tuple(rows), MIDAS_UNREAD)


def midas_blocks(c: DPTConfig) -> Iterator[tuple[str, str]]:
    """Where the estimator's blocks stand in theirs, which counts states and fusions from 1, fusions from the last."""
    embeddings, backbone = "dpt.embeddings", "dpt.embeddings.backbone.bit"
    yield embeddings, "pretrained.model"
    yield f"{embeddings}.{'' if c.is_hybrid else 'patch_embeddings.'}projection", "pretrained.model.patch_embed.proj"
    yield f"{backbone}.embedder.convolution", "pretrained.model.patch_embed.backbone.stem.conv"
    yield f"{backbone}.embedder.norm", "pretrained.model.patch_embed.backbone.stem.norm"
    for i, depth in enumerate(() if c.backbone_config is None else c.backbone_config.depths):
        for j in range(depth):
            theirs = f"pretrained.model.patch_embed.backbone.stages.{i}.blocks.{j}"
            yield f"{backbone}.encoder.stages.{i}.layers.{j}", theirs
    for i in range(c.num_hidden_layers):
        yield f"dpt.encoder.layer.{i}", f"pretrained.model.blocks.{i}"
    yield "dpt.layernorm", "pretrained.model.norm"
    for i in range(STATES):
        theirs = f"pretrained.act_postprocess{i + 1}"
        yield f"neck.reassemble_stage.readout_projects.{i}.0", f"{theirs}.0.project.0"
        yield f"neck.reassemble_stage.layers.{i}.projection", f"{theirs}.3"
        yield f"neck.reassemble_stage.layers.{i}.resize", f"{theirs}.4"
        yield f"neck.convs.{i}", f"scratch.layer{i + 1}_rn"
        yield f"neck.fusion_stage.layers.{i}", f"scratch.refinenet{STATES - i}"
    yield "head.head", "scratch.output_conv"
