"""The names of the original checkpoints (CompVis latent-diffusion, Stability's stablediffusion) as key maps.

A map speaks of one component and has no prefix; in a whole checkpoint the names stand behind these:

model.diffusion_model.          the U-Net                       unet_map
first_stage_model.              the autoencoder                 vae_map
cond_stage_model.transformer.   CLIP or the LDM's BERT          clip_map, bare_clip_map, bert_map
cond_stage_model.model.         OpenCLIP                        openclip_map
cond_stage_model.               the class embedder              classes_map
conditioner.embedders.0.transformer.    SDXL's CLIP             clip_map
conditioner.embedders.1.model.          SDXL's OpenCLIP, in the refiner number 0    openclip_map
depth_model.model.              the depth estimator             dpt.midas_map
model_ema.                      averages of the U-Net, see ema_name

A map is made of three things: our names, listed by the module that the config describes; where each block stands
in the other file; and what the parts of a block are called there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.bert import LDMBertConfig
from sfumato.models.classes import ClassEmbedderConfig
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.layers import Attention
from sfumato.models.unet import UNetConfig
from sfumato.models.vq import VQConfig
from sfumato.weights.keymap import KeyMap, Row
from sfumato.weights.parts import network

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."
OPENCLIP = "cond_stage_model.model."
BERT = "cond_stage_model.transformer."
CLASSES = "cond_stage_model."
EMA = "model_ema."

# What whole checkpoints carry besides the components: the schedule, which its betas give, the trainer's counters
# and averages, and parts of other purposes (the upscaler's noise schedule).
FILE_EXTRAS = (
    "betas",
    "*alphas_cumprod*",
    "posterior_*",
    "lvlb_weights",
    "logvar",
    "scale_factor",
    "global_step",
    "v_pred",
    "ztsnr",
    "model_ema.*",
    "cond_stage_model.logit_scale",
    "low_scale_model.*",
    "embedding_manager.*",
    "denoiser.sigmas",
    "text_encoders.*.logit_scale",
)

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OLD_ATTENTION = {"q": "query", "k": "key", "v": "value", "out.0": "proj_attn"}
OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
BERT_LAYER = {  # part of our layer i: whether it belongs to their layer 2i or 2i + 1, and its name there
    "self_attn_layer_norm": (0, "0"),
    "self_attn.q_proj": (0, "1.to_q"),
    "self_attn.k_proj": (0, "1.to_k"),
    "self_attn.v_proj": (0, "1.to_v"),
    "self_attn.out_proj": (0, "1.to_out"),
    "final_layer_norm": (1, "0"),
    "fc1": (1, "1.net.0.0"),
    "fc2": (1, "1.net.2"),
}


def unet_map(config: UNetConfig) -> KeyMap:
    """The U-Net (openaimodel.py), of any family: a class table is `label_emb`.

    In unconditional models the attention is one convolution for q, k and v, cut into heads before it is cut into
    the three (QKVAttentionLegacy): theirs has q, k, v of the first head, then of the second, and so on.
    """
    net = network(config)
    blocks, leaves = dict(unet_blocks(config)), UNET_RESNET | {"group_norm": "norm"}
    heads = {  # of the attentions of a picture with itself; those inside a transformer are not among the blocks
        name: module.heads for name, module in net.named_modules() if isinstance(module, Attention) and name in blocks
    }
    rows: list[Row] = []
    for name in net.state_dict():
        module, _, kind = name.rpartition(".")
        block, _, part = module.rpartition(".to_")
        if block not in heads:
            rows.append(Row((name,), translated(name, blocks, leaves)))
            continue
        shape = "conv1d" if kind == "weight" else ""
        if part == "q":
            fused = tuple(f"{block}.to_{x}.{kind}" for x in "qkv")
            rows.append(Row(fused, f"{blocks[block]}.qkv.{kind}", shape, heads[block]))
        elif part == "out.0":
            rows.append(Row((name,), f"{blocks[block]}.proj_out.{kind}", shape))
    return KeyMap(tuple(rows))


def unet_modules(config: UNetConfig) -> Mapping[str, str]:
    """Our names of the U-Net's layers to theirs, as adapters use them; a layer that is joined with others has none.

    "down_blocks.0.resnets.0.conv1" is "input_blocks.1.0.in_layers.2".
    """
    pairs = ((row.ours[0], row.theirs) for row in unet_map(config).rows if len(row.ours) == 1)
    return {ours.rpartition(".")[0]: theirs.rpartition(".")[0] for ours, theirs in pairs}


def vae_map(config: AutoencoderConfig | VQConfig) -> KeyMap:
    """The autoencoder (diffusionmodules/model.py), with its codebook if it has one; attention is 1x1 convolutions."""
    blocks = dict(vae_blocks(len(config.block_out_channels), config.layers_per_block))
    leaves = {"conv_shortcut": "nin_shortcut"} | VAE_ATTENTION
    rows = [
        Row((name,), translated(name, blocks, leaves), "conv1x1" if ".to_" in name and name.endswith("weight") else "")
        for name in network(config).state_dict()
    ]
    return KeyMap(tuple(rows), extras=("loss.*", "model_ema.*"))


def old_attention_map(config: AutoencoderConfig | VQConfig | UNetConfig) -> KeyMap:
    """A network as older versions of diffusers named it: pictures' attention had query, key, value and proj_attn."""
    net = network(config)
    blocks = {name for name, m in net.named_modules() if isinstance(m, Attention) and m.group_norm is not None}
    rows: list[Row] = []
    for name in net.state_dict():
        module, _, kind = name.rpartition(".")
        block, _, part = module.rpartition(".to_")
        rows.append(Row((name,), f"{block}.{OLD_ATTENTION[part]}.{kind}" if block in blocks else name))
    return KeyMap(tuple(rows))


def clip_map(config: CLIPTextConfig) -> KeyMap:
    """CLIP's text tower as transformers names it; in CLIP's own files the tower for pictures beside it is an extra."""
    extras = (
        *("text_model.embeddings.position_ids", "text_projection", "text_projection.weight", "logit_scale"),
        *("vision_model.*", "visual_projection.weight"),
    )
    names = network(config).state_dict()
    return KeyMap(tuple(Row((name,), name) for name in names), extras)


def bare_clip_map(config: CLIPTextConfig) -> KeyMap:
    """CLIP's text tower in files whose names lack `text_model.`."""
    whole = clip_map(config)
    bare = whole.renamed(lambda name: name.removeprefix("text_model."))
    return KeyMap(bare.rows, tuple(pattern.removeprefix("text_model.") for pattern in whole.extras))


def openclip_map(config: CLIPTextConfig) -> KeyMap:
    """OpenCLIP's text tower (open_clip/transformer.py), whose q, k and v are one matrix.

    The files of SD 2.x have one more layer than the model reads, and a projection: these are extras, and so is the
    tower for pictures in OpenCLIP's own files. Where a model reads the projection, theirs multiplies from the right.
    """
    layers = config.num_hidden_layers
    blocks = {f"text_model.encoder.layers.{i}": f"transformer.resblocks.{i}" for i in range(layers)}
    blocks |= {"text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final"}
    rows: list[Row] = []
    for name in network(config).state_dict():
        block, _, part = name.partition(".self_attn.")
        if name == "text_model.embeddings.position_embedding.weight":
            rows.append(Row((name,), "positional_embedding"))
        elif name == "text_projection.weight":
            rows.append(Row((name,), "text_projection", "transposed"))
        elif part.startswith("q_proj."):
            kind = part.removeprefix("q_proj.")
            fused = tuple(f"{block}.self_attn.{x}_proj.{kind}" for x in "qkv")
            rows.append(Row(fused, f"{blocks[block]}.attn.in_proj_{kind}"))
        elif not part.startswith(("k_proj.", "v_proj.")):
            rows.append(Row((name,), translated(name, blocks, OPENCLIP_LAYER)))
    extras = (
        f"transformer.resblocks.{layers}.*",
        "transformer.text_model.embeddings.position_ids",
        "text_projection",
        "logit_scale",
        "attn_mask",
        "visual.*",
    )
    return KeyMap(tuple(rows), extras)


def bert_map(config: LDMBertConfig) -> KeyMap:
    """The text encoder of the 1.4B latent diffusion model (x_transformer.py): a layer is two of theirs."""
    blocks = {
        "model.embed_tokens": "token_emb",
        "model.embed_positions": "pos_emb.emb",
        "model.layer_norm": "norm",
        "to_logits": "to_logits",
    }
    for i in range(config.encoder_layers):
        for ours, (half, name) in BERT_LAYER.items():
            blocks[f"model.layers.{i}.{ours}"] = f"attn_layers.layers.{2 * i + half}.{name}"
    names = network(config).state_dict()
    return KeyMap(tuple(Row((name,), translated(name, blocks, {})) for name in names))


def classes_map(config: ClassEmbedderConfig) -> KeyMap:
    """The table of classes (encoders/modules.py, ClassEmbedder)."""
    return KeyMap(tuple(Row((name,), name) for name in network(config).state_dict()))


def ema_name(name: str) -> str:
    """Where the moving average of a parameter stands (ema.py, LitEma): without dots, behind `model_ema.`.

    "model.diffusion_model.input_blocks.0.0.weight" is "model_ema.diffusion_modelinput_blocks00weight". The averages
    of a U-Net are read by `unet_map(config).prefixed(UNET).renamed(ema_name)`.
    """
    return EMA + name.removeprefix("model.").replace(".", "")


def is_file_extra(name: str) -> bool:
    """Whether a whole checkpoint's name belongs to no component."""
    return any(fnmatchcase(name, pattern) for pattern in FILE_EXTRAS)


def unet_blocks(c: UNetConfig) -> Iterator[tuple[str, str]]:
    """Where the U-Net's blocks stand in theirs: all inputs are counted through, and so are all outputs."""
    yield from {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "class_embedding": "label_emb",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }.items()
    layers = c.levels("layers_per_block")
    last = len(layers) - 1
    n = 1
    for i in range(last + 1):
        for j in range(layers[i]):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1"
            n += 1
        if i < last:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{n}.0.op"
            n += 1
    n = 0
    for i in range(last + 1):
        for j in range(layers[last - i] + 1):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{n}.1"
            n += 1
        if i < last:  # the upsampler is the last part of the level's last block
            place = 2 if "Attn" in c.up_block_types[i] else 1
            yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{n - 1}.{place}.conv"


def vae_blocks(levels: int, layers: int) -> Iterator[tuple[str, str]]:
    """Where the autoencoder's blocks stand in theirs, which counts the decoder's levels from the finest."""
    for name in ("quant_conv", "post_quant_conv", "quantize.embedding"):
        yield name, name
    for side in ("encoder", "decoder"):
        yield f"{side}.conv_in", f"{side}.conv_in"
        yield f"{side}.conv_norm_out", f"{side}.norm_out"
        yield f"{side}.conv_out", f"{side}.conv_out"
        yield f"{side}.mid_block.resnets.0", f"{side}.mid.block_1"
        yield f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1"
        yield f"{side}.mid_block.resnets.1", f"{side}.mid.block_2"
    for i in range(levels):
        up = levels - 1 - i
        for j in range(layers):
            yield f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}"
        for j in range(layers + 1):
            yield f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{up}.block.{j}"
        yield f"encoder.down_blocks.{i}.downsamplers.0.conv", f"encoder.down.{i}.downsample.conv"
        yield f"decoder.up_blocks.{i}.upsamplers.0.conv", f"decoder.up.{up}.upsample.conv"


def translated(name: str, blocks: Mapping[str, str], leaves: Mapping[str, str]) -> str:
    """The name of a parameter there: that of its block, then that of the part, then "weight" or "bias".

    A part that `leaves` does not list is called the same. Raises ValueError when no block's name begins `name`.
    """
    module, _, kind = name.rpartition(".")
    block, rest = module, ""
    while block not in blocks:
        block, dot, part = block.rpartition(".")
        if not dot:
            raise ValueError(f"{name} belongs to no block that the original layout has; keep the diffusers layout")
        rest = f"{part}.{rest}" if rest else part
    return ".".join(filter(None, (blocks[block], leaves.get(rest, rest), kind)))
