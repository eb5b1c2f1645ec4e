"""The tables against the modules of every family at full size (without memory), and against diffusers' converters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL as TheirAutoencoder
from diffusers import UNet2DModel
from diffusers.loaders import single_file_utils as peer
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig as TheirBertConfig
from diffusers.pipelines.stable_diffusion import convert_from_ckpt
from torch import Tensor, nn
from transformers import CLIPTextConfig as TheirTextConfig

from sfumato import presets
from sfumato.models.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.models.bert import LDMBertConfig, LDMBertModel
from sfumato.models.classes import ClassEmbedder, ClassEmbedderConfig
from sfumato.models.clip import CLIPTextConfig, CLIPTextModel
from sfumato.models.layers import Attention
from sfumato.models.unet import UNet, UNetConfig
from sfumato.models.vq import VQConfig, VQModel
from sfumato.presets import classic
from sfumato.weights import compvis
from sfumato.weights.keymap import KeyMap

Tensors = dict[str, Tensor]
UNETS = {preset.name: preset.denoiser for preset in presets.SINGLE if isinstance(preset.denoiser, UNetConfig)}
UNETS.pop("mini")
SD_VAE, BERT = classic.SD15.vae, LDMBertConfig()
CLIP_L, OPENCLIP_H = classic.CLIP_L, classic.OPENCLIP_H


def meta(build: Callable[[], nn.Module]) -> Tensors:
    with torch.device("meta"):
        return build().state_dict()


def random(module: nn.Module) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(t.shape, generator=generator) for name, t in module.state_dict().items()}


def assert_bijective(table: KeyMap, ours: Tensors) -> Tensors:
    """Every parameter is in the table once, and comes back under its name, in its shape and place; returns theirs."""
    assert list(table.ours) == list(dict.fromkeys(table.ours)) and set(table.ours) == set(ours)
    theirs = table.save(ours)
    assert list(theirs) == list(table.theirs) and len(theirs) == len(table.rows)
    back = table.load(theirs)
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in ours.items()}
    assert sum(t.numel() for t in theirs.values()) == sum(t.numel() for t in ours.values())
    return theirs


# Names and shapes that the published files have, where the families differ.
LANDMARKS = {
    "sd15": {
        "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
    },
    "sd15-inpaint": {"input_blocks.0.0.weight": (320, 9, 3, 3)},
    "pix2pix": {"input_blocks.0.0.weight": (320, 8, 3, 3)},
    "sd21": {
        "input_blocks.1.1.proj_in.weight": (320, 320),
        "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
    },
    "sd2-depth": {"input_blocks.0.0.weight": (320, 5, 3, 3)},
    "x4-upscaler": {
        "label_emb.weight": (1000, 1024),
        "input_blocks.0.0.weight": (256, 7, 3, 3),
        "input_blocks.4.1.transformer_blocks.0.attn1.to_k.weight": (512, 1024),
        "input_blocks.10.0.skip_connection.bias": (1024,),
    },
    "sdxl": {
        "label_emb.0.0.weight": (1280, 2816),
        "label_emb.0.2.weight": (1280, 1280),
        "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
        "output_blocks.5.2.conv.weight": (640, 640, 3, 3),
    },
    "sdxl-inpaint": {"input_blocks.0.0.weight": (320, 9, 3, 3)},
    "sdxl-refiner": {
        "label_emb.0.0.weight": (1536, 2560),
        "output_blocks.2.1.conv.weight": (1536, 1536, 3, 3),
    },
    "ldm-text": {"middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 1280)},
    "ldm-class": {
        "input_blocks.10.1.transformer_blocks.0.attn2.to_k.weight": (960, 512),
        "output_blocks.2.2.conv.weight": (960, 960, 3, 3),
        "out.2.weight": (3, 192, 3, 3),
    },
    "ldm-unconditional": {
        "input_blocks.4.1.qkv.weight": (1344, 448, 1),
        "input_blocks.4.1.qkv.bias": (1344,),
        "middle_block.1.proj_out.weight": (896, 896, 1),
        "output_blocks.8.2.conv.weight": (448, 448, 3, 3),
    },
}


@pytest.mark.parametrize("name", UNETS)
def test_full_size_unets_are_covered(name: str) -> None:
    theirs = assert_bijective(compvis.unet_map(UNETS[name]), meta(lambda: UNet(UNETS[name])))
    count = {"x4-upscaler": 687, "ldm-class": 688, "ldm-unconditional": 368}
    count |= {"sdxl": 1680, "sdxl-inpaint": 1680, "sdxl-refiner": 1220}
    assert len(theirs) == count.get(name, 686)
    expected = LANDMARKS.get(name, {})
    assert {key: tuple(theirs[key].shape) for key in expected} == expected
    averages = [compvis.ema_name(compvis.UNET + key) for key in theirs]
    assert len(set(averages)) == len(averages)  # without dots they still differ


VAES = {
    "KL f8": (SD_VAE, 248),
    "KL f4": (classic.UPSCALER.vae, 204),
    "VQ f4": (classic.VQ_F4, 205),
}


@pytest.mark.parametrize("name", VAES)
def test_full_size_autoencoders_are_covered(name: str) -> None:
    config, count = VAES[name]
    ours = meta(lambda: VQModel(config) if isinstance(config, VQConfig) else AutoencoderKL(config))
    theirs = assert_bijective(compvis.vae_map(config), ours)
    assert len(theirs) == count
    assert theirs["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert theirs["decoder.up.0.block.0.nin_shortcut.weight"].shape == (128, 256, 1, 1)
    assert ("quantize.embedding.weight" in theirs) == isinstance(config, VQConfig)
    older = assert_bijective(compvis.old_attention_map(config), ours)
    assert older["decoder.mid_block.attentions.0.proj_attn.weight"].shape == (512, 512)


def test_full_size_text_encoders_are_covered() -> None:
    clip = meta(lambda: CLIPTextModel(CLIP_L))
    assert len(assert_bijective(compvis.clip_map(CLIP_L), clip)) == 196
    assert "embeddings.token_embedding.weight" in assert_bijective(compvis.bare_clip_map(CLIP_L), clip)

    openclip = assert_bijective(compvis.openclip_map(OPENCLIP_H), meta(lambda: CLIPTextModel(OPENCLIP_H)))
    assert len(openclip) == 12 * 23 + 4
    assert openclip["transformer.resblocks.22.attn.in_proj_weight"].shape == (3072, 1024)
    assert openclip["transformer.resblocks.0.attn.in_proj_bias"].shape == (3072,)
    assert openclip["positional_embedding"].shape == (77, 1024)

    bert = assert_bijective(compvis.bert_map(BERT), meta(lambda: LDMBertModel(BERT)))
    assert len(bert) == 13 * 32 + 6
    assert bert["attn_layers.layers.62.1.to_q.weight"].shape == (512, 1280)
    assert bert["attn_layers.layers.63.1.net.0.0.weight"].shape == (5120, 1280)

    classes = ClassEmbedderConfig()
    table = assert_bijective(compvis.classes_map(classes), meta(lambda: ClassEmbedder(classes)))
    assert {key: tuple(t.shape) for key, t in table.items()} == {"embedding.weight": (1001, 512)}


# The same shapes of networks, so small that they hold numbers; those that differ in input channels alone are left out.

SHAPES = ("sd15", "sd21", "x4-upscaler", "ldm-class", "ldm-unconditional")


def tiny_unet(like: UNetConfig) -> UNetConfig:
    widths = tuple(8 * (1 + i) for i in range(len(like.block_out_channels)))
    small = replace(like, block_out_channels=widths, norm_num_groups=4)
    if like.unconditional:
        return replace(small, attention_head_dim=4)  # channels a head
    return replace(small, attention_head_dim=2, cross_attention_dim=12)  # heads


def tiny_vae(levels: int) -> AutoencoderConfig:
    return AutoencoderConfig(
        block_out_channels=tuple(4 * (1 + i) for i in range(levels)),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2,
        norm_num_groups=2,
    )


TINY_TEXT = CLIPTextConfig(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=7,
    hidden_act="gelu",
)
TINY_BERT = LDMBertConfig(
    vocab_size=20,
    max_position_embeddings=7,
    encoder_layers=3,
    encoder_ffn_dim=16,
    encoder_attention_heads=2,
    head_dim=3,
    d_model=8,
)


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    assert all(found[name].shape == expected[name].shape for name in expected)
    worst = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    print(f"{len(expected)} tensors, largest difference {worst}")
    assert worst == 0


@pytest.mark.parametrize("name", SHAPES)
def test_unets_come_back_bit_for_bit(name: str) -> None:
    config = tiny_unet(UNETS[name])
    ours, table = random(UNet(config)), compvis.unet_map(config)
    theirs = table.save(ours)
    back = table.load(theirs)
    assert_same(back, ours)
    joined = {part for row in table.rows if len(row.ours) > 1 for part in row.ours}
    assert bool(joined) == config.unconditional
    assert all(back[key].data_ptr() == ours[key].data_ptr() for key in ours.keys() - joined)


def test_others_come_back_bit_for_bit() -> None:
    vae = tiny_vae(3)
    shared = ("down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "norm_num_groups")
    vq = VQConfig(**{name: getattr(vae, name) for name in shared})
    cases: list[tuple[KeyMap, nn.Module, bool]] = [
        (compvis.vae_map(vae), AutoencoderKL(vae), False),
        (compvis.old_attention_map(vae), AutoencoderKL(vae), False),
        (compvis.vae_map(vq), VQModel(vq), False),
        (compvis.clip_map(TINY_TEXT), CLIPTextModel(TINY_TEXT), False),
        (compvis.bare_clip_map(TINY_TEXT), CLIPTextModel(TINY_TEXT), False),
        (compvis.openclip_map(TINY_TEXT), CLIPTextModel(TINY_TEXT), True),
        (compvis.bert_map(TINY_BERT), LDMBertModel(TINY_BERT), False),
    ]
    for table, module, joins in cases:
        ours = random(module)
        back = table.load(table.save(ours))
        assert_same(back, ours)
        assert joins or all(back[key].data_ptr() == ours[key].data_ptr() for key in ours)


# Independent converters: what we write, they read as what we had.


@pytest.mark.parametrize("name", SHAPES[:4])
def test_diffusers_reads_our_unets(name: str) -> None:
    config = tiny_unet(UNETS[name])
    ours = random(UNet(config))
    theirs = compvis.unet_map(config).prefixed(compvis.UNET).save(ours)
    assert_same(peer.convert_ldm_unet_checkpoint(dict(theirs), config.to_dict()), ours)


def test_diffusers_reads_our_averages() -> None:
    config = tiny_unet(UNETS["sd15"])
    ours, plain = random(UNet(config)), compvis.unet_map(config).prefixed(compvis.UNET)
    ema = plain.renamed(compvis.ema_name).save(ours)
    zeros = {name: torch.zeros_like(t) for name, t in plain.save(ours).items()}
    assert_same(peer.convert_ldm_unet_checkpoint(zeros | ema, config.to_dict(), extract_ema=True), ours)


@pytest.mark.parametrize("levels", [3, 4])
def test_diffusers_reads_our_autoencoders(levels: int) -> None:
    config = tiny_vae(levels)
    ours = random(AutoencoderKL(config))
    theirs = compvis.vae_map(config).prefixed(compvis.VAE).save(ours)
    assert_same(peer.convert_ldm_vae_checkpoint(dict(theirs), config.to_dict()), ours)


def test_diffusers_reads_our_clip() -> None:
    ours = random(CLIPTextModel(TINY_TEXT))
    theirs = compvis.clip_map(TINY_TEXT).prefixed(compvis.CLIP).save(ours)
    assert_same(peer.convert_ldm_clip_checkpoint(dict(theirs)), ours)


def test_diffusers_reads_our_openclip_without_a_projection() -> None:
    class Tower:  # what the converter asks of a model
        config = TheirTextConfig(hidden_size=TINY_TEXT.hidden_size)

    ours = random(CLIPTextModel(TINY_TEXT))
    table = compvis.openclip_map(TINY_TEXT).prefixed(compvis.OPENCLIP)
    theirs = table.save(ours)
    assert_same(peer.convert_open_clip_checkpoint(Tower(), dict(theirs)), ours)
    published = {
        "cond_stage_model.model.text_projection": torch.zeros(8, 8),
        "cond_stage_model.model.logit_scale": torch.zeros(()),
        "cond_stage_model.model.transformer.resblocks.3.ln_1.weight": torch.zeros(8),
    }
    assert_same(table.load(theirs | published), ours)
    with pytest.raises(ValueError, match=r"1 unknown: cond_stage_model\.model\.transformer\.resblocks\.4\.ln_1\.bias"):
        table.load(theirs | {"cond_stage_model.model.transformer.resblocks.4.ln_1.bias": torch.zeros(8)})


class XLayer(nn.ModuleList):
    """A layer of x_transformer.py: its norm, then attention or two linear layers."""

    def __init__(self, width: int, inner: int, attention: bool) -> None:
        part = nn.Module()
        if attention:
            part.to_q, part.to_k, part.to_v = (nn.Linear(width, inner, bias=False) for _ in "qkv")
            part.to_out = nn.Linear(inner, width)
        else:
            first = nn.Sequential(nn.Linear(width, inner), nn.GELU())
            part.net = nn.Sequential(first, nn.Dropout(0.0), nn.Linear(inner, width))
        super().__init__([nn.LayerNorm(width), part])


class XTransformer(nn.Module):
    """The parts of x_transformer.py's TransformerWrapper that hold parameters."""

    def __init__(self, c: LDMBertConfig) -> None:
        super().__init__()
        width, inner = c.d_model, c.encoder_attention_heads * c.head_dim
        self.token_emb = nn.Embedding(c.vocab_size, width)
        self.pos_emb = nn.Module()
        self.pos_emb.emb = nn.Embedding(c.max_position_embeddings, width)
        self.attn_layers = nn.Module()
        pairs = [(inner, True), (c.encoder_ffn_dim, False)] * c.encoder_layers
        self.attn_layers.layers = nn.ModuleList([XLayer(width, size, attention) for size, attention in pairs])
        self.norm = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, c.vocab_size)


def test_diffusers_reads_our_bert() -> None:
    ours = random(LDMBertModel(TINY_BERT))
    stage = nn.Module()
    stage.transformer = XTransformer(TINY_BERT)
    stage.transformer.load_state_dict(compvis.bert_map(TINY_BERT).save(ours), strict=True)
    sizes = {name: value for name, value in TINY_BERT.to_dict().items() if isinstance(value, int)}
    with torch.no_grad():
        model = convert_from_ckpt.convert_ldm_bert_checkpoint(stage, TheirBertConfig(**sizes))
    assert_same(model.state_dict(), ours)


def test_diffusers_mends_our_old_attention_names() -> None:
    vae, unet = tiny_vae(2), tiny_unet(UNETS["ldm-unconditional"])
    for config, ours, build in (
        (vae, random(AutoencoderKL(vae)), lambda: TheirAutoencoder.from_config(vae.to_dict())),
        (unet, random(UNet(unet)), lambda: UNet2DModel.from_config(unet.to_dict())),
    ):
        older = compvis.old_attention_map(config).save(ours)
        assert older.keys() != ours.keys() and any(name.endswith("proj_attn.bias") for name in older)
        with torch.device("meta"):
            theirs = build()
        theirs._fix_state_dict_keys_on_load(older)
        assert_same(older, ours)


# The joined q, k, v of unconditional models.


def legacy_attention(qkv: Tensor, heads: int) -> Tensor:
    """QKVAttentionLegacy in openaimodel.py: (B, 3 C, L) -> (B, C, L); heads are cut first, q, k, v inside them."""
    B, width, L = qkv.shape
    q, k, v = qkv.reshape(B * heads, width // heads, L).split(width // heads // 3, dim=1)
    scores = torch.einsum("bct,bcs->bts", q, k) / (width // heads // 3) ** 0.5
    return torch.einsum("bts,bcs->bct", scores.softmax(-1), v).reshape(B, -1, L)


def test_joined_attention_means_the_same() -> None:
    torch.manual_seed(0)
    heads, C = 3, 12
    config = tiny_unet(UNETS["ldm-unconditional"])
    table = compvis.unet_map(config)
    row = next(row for row in table.rows if row.theirs.endswith("middle_block.1.qkv.weight"))
    assert row.heads == config.block_out_channels[-1] // 4
    ours = Attention(C, heads, bias=True, groups=4, eps=1e-6).double()
    x = torch.randn(2, C, 4, 5, dtype=torch.float64)

    tensors = ours.state_dict()
    weight = replace(row, heads=heads).save([tensors[f"to_{part}.weight"] for part in "qkv"])
    bias = replace(row, heads=heads, shape="").save([tensors[f"to_{part}.bias"] for part in "qkv"])
    h = F.group_norm(x, 4, tensors["group_norm.weight"], tensors["group_norm.bias"], 1e-6).flatten(2)  # (B, C, L)
    h = legacy_attention(F.conv1d(h, weight, bias), heads)
    h = F.conv1d(h, tensors["to_out.0.weight"][:, :, None], tensors["to_out.0.bias"])
    difference = float((ours(x) - (x + h.view_as(x))).detach().abs().max())
    print(f"attention in the legacy order: largest difference {difference:.1e}")
    assert difference < 1e-12

    plain = torch.cat([tensors[f"to_{part}.weight"] for part in "qkv"])[..., None]
    assert not torch.equal(plain, weight)  # the order matters
    assert torch.equal(replace(row, heads=1).save([tensors[f"to_{part}.weight"] for part in "qkv"]), plain)


def test_diffusers_splits_joined_attention_as_we_do() -> None:
    config = tiny_unet(UNETS["ldm-unconditional"])
    ours, table = random(UNet(config)), compvis.unet_map(config)
    theirs = table.save(ours)
    found: Tensors = {}
    for row in table.rows:
        if len(row.ours) > 1:
            split = {row.theirs: dict(zip(("query", "key", "value"), row.ours, strict=True))}
            # their option is the number of channels a head, which the old configs called num_head_channels
            convert_from_ckpt.assign_to_checkpoint([], found, theirs, split, config={"num_head_channels": 4})
    assert_same(found, {name: ours[name] for name in found})
    assert len(found) == 3 * sum(len(row.ours) > 1 for row in table.rows) > 0


# What stands in files besides the components.


def test_names_that_no_component_needs() -> None:
    for name in (
        "betas",
        "alphas_cumprod_prev",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_mean_coef2",
        "model_ema.decay",
        "model_ema.diffusion_modelout0weight",
        "cond_stage_model.logit_scale",
        "low_scale_model.betas",
        "global_step",
    ):
        assert compvis.is_file_extra(name), name
    for name in ("model.diffusion_model.out.0.weight", "first_stage_model.quant_conv.bias", "lora_te_x.alpha"):
        assert not compvis.is_file_extra(name), name
    vae = compvis.vae_map(SD_VAE).prefixed(compvis.VAE)
    assert vae.is_extra("first_stage_model.loss.discriminator.main.0.weight")
    clip = compvis.clip_map(CLIP_L).prefixed(compvis.CLIP)
    assert clip.is_extra("cond_stage_model.transformer.text_model.embeddings.position_ids")
    bare = compvis.bare_clip_map(CLIP_L).prefixed(compvis.CLIP)
    assert bare.is_extra("cond_stage_model.transformer.embeddings.position_ids")
    assert bare.fits(bare.theirs) and not bare.fits(clip.theirs)


def test_names_of_averages() -> None:
    name = compvis.ema_name("model.diffusion_model.input_blocks.0.0.weight")
    assert name == "model_ema.diffusion_modelinput_blocks00weight"
    assert compvis.ema_name("encoder.conv_in.bias") == "model_ema.encoderconv_inbias"


def test_layers_for_adapters() -> None:
    names = compvis.unet_modules(UNETS["sd15"])
    assert len(names) == len(set(names.values()))
    block = "transformer_blocks.0"
    expected = {
        f"down_blocks.0.attentions.0.{block}.attn1.to_q": f"input_blocks.1.1.{block}.attn1.to_q",
        "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
        "down_blocks.2.resnets.0.conv_shortcut": "input_blocks.7.0.skip_connection",
        f"mid_block.attentions.0.{block}.ff.net.0.proj": f"middle_block.1.{block}.ff.net.0.proj",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        f"up_blocks.3.attentions.2.{block}.attn2.to_out.0": f"output_blocks.11.1.{block}.attn2.to_out.0",
        "time_embedding.linear_2": "time_embed.2",
    }
    assert {name: names[name] for name in expected} == expected


def test_a_parameter_outside_all_blocks_is_named() -> None:
    with pytest.raises(ValueError, match=r"novel\.part\.weight belongs to no block"):
        compvis.translated("novel.part.weight", {"conv_in": "input_blocks.0.0"}, {})
