from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sfumato.diffusion import named
from sfumato.models.autoencoder import AutoencoderKL
from sfumato.models.bert import LDMBertConfig, LDMBertModel
from sfumato.models.classes import ClassEmbedder, ClassEmbedderConfig
from sfumato.models.clip import CLIPTextModel
from sfumato.models.mmdit import MMDiT
from sfumato.models.unet import UNet, UNetConfig
from sfumato.models.vq import VQConfig, VQModel
from sfumato.pipelines.pipeline import Pipeline
from sfumato.text.bert import BertTokenizer
from sfumato.weights.folder import Components, choose, load_folder, load_vae_folder, save_folder, shards
from sfumato.weights.layouts import LAYOUTS
from sfumato.weights.safe import read_tensors, write_tensors

from ..tiny_sd3 import tiny_sd3
from ..tiny_xl import TINY_XL, tiny_xl

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
# How many channels each class's U-Net takes besides the four of the noisy latent.
EXTRA_CHANNELS = {
    "StableDiffusionPipeline": 0,
    "StableDiffusionInpaintPipeline": 5,
    "StableDiffusionInstructPix2PixPipeline": 4,
    "StableDiffusionDepth2ImgPipeline": 1,
    "StableDiffusionUpscalePipeline": 3,
}
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple", "##s"]


def tiny(family: str, parts: Components) -> Components:
    """Random parts of a pipeline class; `parts` are those of the plain one."""
    if family in TINY_XL:
        return tiny_xl(family)
    if family == "StableDiffusion3Pipeline":
        return tiny_sd3("sd3.5-medium")
    torch.manual_seed(1)
    if family in EXTRA_CHANNELS:
        labels = 10 if family == "StableDiffusionUpscalePipeline" else None
        config = replace(parts.unet.config, in_channels=4 + EXTRA_CHANNELS[family], num_class_embeds=labels)
        low_res = named.DDPMScheduler(beta_start=0.0001, beta_end=0.02) if labels else None
        vae = AutoencoderKL(replace(parts.vae.config, scaling_factor=0.08333)).eval() if labels else parts.vae
        return replace(parts, denoiser=UNet(config).eval(), vae=vae, low_res_scheduler=low_res, pipeline=family)
    vae = VQModel(
        VQConfig(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            num_vq_embeddings=11,
        )
    )
    unet = replace(parts.unet.config, in_channels=3, out_channels=3)
    classes = ClassEmbedder(ClassEmbedderConfig(num_classes=7, embed_dim=unet.cross_attention_dim))
    if family == "LDMClassToImagePipeline":
        whole = replace(parts, denoiser=UNet(unet), vae=vae, text_encoder=classes, tokenizer=None, pipeline=family)
    elif family == "LDMPipeline":
        free = UNetConfig.from_dict(
            {
                "_class_name": "UNet2DModel",
                "block_out_channels": [16, 32],
                "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
                "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
                "layers_per_block": 1,
                "norm_num_groups": 8,
                "sample_size": 8,
            }
        )
        whole = replace(parts, denoiser=UNet(free), vae=vae, text_encoder=None, tokenizer=None, pipeline=family)
    else:
        bert = LDMBertConfig(
            vocab_size=len(PIECES),
            max_position_embeddings=12,
            encoder_layers=2,
            encoder_ffn_dim=48,
            encoder_attention_heads=2,
            head_dim=8,
            d_model=32,
        )
        tokenizer = BertTokenizer({piece: i for i, piece in enumerate(PIECES)}, max_length=12)
        whole = replace(parts, text_encoder=LDMBertModel(bert), tokenizer=tokenizer, pipeline=family)
    for network in networks(whole).values():
        network.eval()
    return whole


def networks(parts: Components) -> dict[str, nn.Module]:
    names = ("transformer" if name == "unet" and isinstance(parts.denoiser, MMDiT) else name for name in NETWORKS)
    found = {name: getattr(parts, name) for name in names}
    return {name: module for name, module in found.items() if module is not None}


def difference(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def assert_same(a: Components, b: Components) -> None:
    assert networks(a).keys() == networks(b).keys()
    for name, module in networks(a).items():
        other = networks(b)[name]
        assert module.config == other.config, name
        worst = difference(module.state_dict(), other.state_dict())
        assert worst == 0, f"{name}: {worst}"
    assert a.scheduler.plan(7).grid == b.scheduler.plan(7).grid
    assert a.pipeline == b.pipeline


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the plain tiny folder that may be changed."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Saving and loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_folder_comes_back_as_it_was_saved(tiny_parts: Components, tmp_path: Path, family: str) -> None:
    saved = tiny(family, tiny_parts)
    save_folder(saved, tmp_path / "model")
    loaded = load_folder(tmp_path / "model")
    assert_same(saved, loaded)
    assert not any(module.training for module in networks(loaded).values())
    texts = ["a red apple on a green background"]
    if saved.tokenizer is not None:
        assert loaded.tokenizer is not None
        assert torch.equal(saved.tokenizer(texts), loaded.tokenizer(texts))
    assert (saved.low_res_scheduler is None) == (loaded.low_res_scheduler is None)
    assert loaded.low_res_scheduler is None or loaded.low_res_scheduler.config.beta_start == 0.0001
    save_folder(loaded, tmp_path / "again")
    for file in (tmp_path / "model").rglob("*.*"):
        again = tmp_path / "again" / file.relative_to(tmp_path / "model")
        assert file.read_bytes() == again.read_bytes(), file


@pytest.mark.parametrize("family", [name for name in LAYOUTS if name != "LDMClassToImagePipeline"])
def test_diffusers_opens_what_is_saved_and_the_other_way_round(
    tiny_parts: Components, tmp_path: Path, family: str, quiet: None
) -> None:
    import diffusers

    saved = tiny(family, tiny_parts)
    save_folder(saved, tmp_path / "ours")
    # diffusers wants to be told that its depth estimator is left out on purpose
    # diffusers wants to be told that the depth estimator, which is no part of ours, is left out on purpose
    left_out = {"depth_estimator": None, "feature_extractor": None} if "Depth" in family else {}
    theirs = getattr(diffusers, family).from_pretrained(tmp_path / "ours", **left_out)
    layout = LAYOUTS[family]
    for name, module in networks(saved).items():
        other = getattr(theirs, {"vae": layout.vae, "text_encoder": "".join(layout.text_encoders[:1])}.get(name, name))
        mine, yours = module.state_dict(), other.state_dict()
        if name.startswith("text_encoder") and family.startswith("Stable"):  # transformers 5 leaves the outer name out
            mine, yours = ({k.removeprefix("text_model."): v for k, v in d.items()} for d in (mine, yours))
        repeated = ("position_ids", "encoder.embed_tokens.weight")
        worst = difference(mine, {k: v for k, v in yours.items() if not k.endswith(repeated)})
        assert worst == 0, f"{name}: {worst}"
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(saved, load_folder(tmp_path / "theirs"))


@pytest.fixture
def quiet() -> Iterator[None]:
    """No progress bars and advice of the peers."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    yield


def test_a_pipeline_saves_what_it_opened(tiny_pipe: Pipeline, tiny_folder: Path, tmp_path: Path) -> None:
    tiny_pipe.save_pretrained(tmp_path / "again")
    files = sorted(p.relative_to(tiny_folder) for p in tiny_folder.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    for file in files:
        assert (tiny_folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_a_model_without_a_part_of_its_class_is_not_saved(tiny_parts: Components, tmp_path: Path) -> None:
    for family, missing in (
        ("StableDiffusionUpscalePipeline", "low_res_scheduler"),
        ("LDMTextToImagePipeline", "bert"),
    ):
        parts = replace(tiny_parts, pipeline=family, text_encoder=None)
        with pytest.raises(ValueError, match=f"a {family} has .*{missing}.*not given"):
            save_folder(parts, tmp_path / "model")
    with pytest.raises(ValueError, match=r"'FluxPipeline' are not supported; known: .*LDMPipeline"):
        save_folder(replace(tiny_parts, pipeline="FluxPipeline"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


# Layouts of a part ------------------------------------------------------------------------------------


def to_half(copy: Path, part: str, source: Path, target: str) -> None:
    write_tensors(copy / part / target, read_tensors(source), torch.float16)


def test_of_variants_the_plain_one_comes_first_but_in_half_precision(copy: Path) -> None:
    whole = load_folder(copy).unet.state_dict()
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    to_half(copy, "unet", file, "diffusion_pytorch_model.fp16.safetensors")
    rounded = {name: tensor.half() for name, tensor in whole.items()}
    assert difference(load_folder(copy).unet.state_dict(), whole) == 0
    asked = load_folder(copy, variant="fp16").unet.state_dict()
    assert difference(asked, rounded) == 0 and {t.dtype for t in asked.values()} == {torch.float32}
    file.write_bytes(b"not to be read")
    assert difference(load_folder(copy, torch.float16).unet.state_dict(), rounded) == 0
    file.unlink()
    assert difference(load_folder(copy).unet.state_dict(), rounded) == 0
    assert load_folder(copy, None).unet.conv_in.weight.dtype == torch.float16
    with pytest.raises(ValueError, match=r"no part of .* has the variant 'ema'; there are: fp16, the plain one"):
        load_folder(copy, variant="ema")


@pytest.mark.parametrize(
    ("names", "variant", "dtype", "chosen"),
    [
        ("model.safetensors pytorch_model.bin model.fp16.safetensors", None, torch.float32, "model.safetensors"),
        ("model.safetensors model.fp16.safetensors", None, torch.float16, "model.fp16.safetensors"),
        ("model.safetensors model.fp16.safetensors", None, torch.bfloat16, "model.safetensors"),
        ("model.safetensors model.fp16.safetensors", None, None, "model.safetensors"),
        ("pytorch_model.bin pytorch_model.fp16.bin", "fp16", torch.float32, "pytorch_model.fp16.bin"),
        ("model.safetensors", "fp16", torch.float32, "model.safetensors"),
        ("model.non_ema.safetensors model.fp16.safetensors", None, torch.float32, "model.fp16.safetensors"),
        ("model.safetensors.index.json model-00001-of-00002.safetensors", None, None, "model.safetensors.index.json"),
        ("model.safetensors.index.json model.safetensors", None, None, "model.safetensors"),
        ("model.safetensors.index.fp16.json", None, None, "model.safetensors.index.fp16.json"),
        ("model.fp16-00001-of-00002.safetensors flax_model.msgpack model.onnx openvino_model.bin", None, None, None),
    ],
)
def test_which_file_is_chosen(names: str, variant: str | None, dtype: torch.dtype | None, chosen: str | None) -> None:
    assert choose(names.split(), variant, dtype) == chosen


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_are_put_together(copy: Path, variant: str) -> None:
    whole = load_folder(copy)
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = read_tensors(file)
    homes = {}
    for i in (1, 2):
        shard = f"diffusion_pytorch_model{variant}-0000{i}-of-00002.safetensors"
        part = {name: tensor for j, (name, tensor) in enumerate(tensors.items()) if j % 2 == i - 1}
        write_tensors(copy / "unet" / shard, part)
        homes |= dict.fromkeys(part, shard)
    file.unlink()
    index = copy / "unet" / f"diffusion_pytorch_model.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    assert_same(whole, load_folder(copy))
    names = [path.name for path in (copy / "unet").iterdir()]
    assert shards(index.name, names) == sorted(set(homes.values()))
    with pytest.raises(ValueError, match="belongs to 2 shards, of which 1 are there"):
        shards(index.name, [name for name in names if "00001" not in name])
    for outside in ("../../secret.safetensors", "/etc/passwd"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(homes, outside)}))
        with pytest.raises(ValueError, match="which is no file name"):
            load_folder(copy)


@pytest.mark.parametrize("part", NETWORKS[:3])
def test_pickles_are_read_safely(copy: Path, tiny_parts: Components, part: str) -> None:
    (file,) = (copy / part).glob("*.safetensors")
    pickled = copy / part / f"{file.stem.replace('model', 'pytorch_model').replace('pytorch_pytorch', 'pytorch')}.bin"
    torch.save(read_tensors(file), pickled)
    file.unlink()
    assert_same(tiny_parts, load_folder(copy))


def old_attention(name: str) -> str:
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f"mid_block.attentions.0.{new}", f"mid_block.attentions.0.{old}")
    return name


def without_prefix(name: str) -> str:
    return name.removeprefix("text_model.")


@pytest.mark.parametrize(
    ("part", "rename", "extra"),
    [
        ("vae", old_attention, {}),
        ("text_encoder", without_prefix, {"embeddings.position_ids": torch.arange(16)[None]}),
        ("text_encoder", str, {"text_model.embeddings.position_ids": torch.arange(16)[None]}),
        ("text_encoder", str, {"text_projection.weight": torch.ones(8, 32)}),
    ],
)
def test_names_of_other_versions(
    copy: Path, tiny_parts: Components, part: str, rename: Callable[[str], str], extra: dict[str, torch.Tensor]
) -> None:
    (file,) = (copy / part).glob("*.safetensors")
    tensors = {rename(name): tensor.clone() for name, tensor in read_tensors(file).items()}
    write_tensors(file, {**tensors, **extra})
    assert_same(tiny_parts, load_folder(copy))
    write_tensors(file, {**tensors, **extra, "something.else": torch.ones(1)})
    with pytest.raises(ValueError, match=r"1 unknown: something\.else"):
        load_folder(copy)


def test_old_names_in_an_unconditional_unet(tiny_parts: Components, tmp_path: Path) -> None:
    saved = tiny("LDMPipeline", tiny_parts)
    save_folder(saved, tmp_path / "model")
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = read_tensors(file)
    old = {name: name for name in tensors}
    for new, word in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        old = {name: spelled.replace(f".{new}.", f".{word}.") for name, spelled in old.items()}
    assert sum(name != spelled for name, spelled in old.items()) == 8 * 4  # four attentions
    write_tensors(file, {old[name]: tensor.clone() for name, tensor in tensors.items()})
    assert_same(saved, load_folder(tmp_path / "model"))


def test_a_tower_with_a_projection_keeps_it(tiny_parts: Components, tmp_path: Path) -> None:
    assert isinstance(tiny_parts.text_encoder, CLIPTextModel)
    projected = CLIPTextModel(replace(tiny_parts.text_encoder.config, projected=True)).eval()
    whole = replace(tiny_parts, text_encoder=projected)
    save_folder(whole, tmp_path)
    row = json.loads((tmp_path / "model_index.json").read_text())["text_encoder"]
    assert row == ["transformers", "CLIPTextModelWithProjection"]
    assert_same(whole, load_folder(tmp_path))


def test_links_are_followed_as_the_cache_of_the_hub_has_them(
    copy: Path, tiny_parts: Components, tmp_path: Path
) -> None:
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(sorted(p for p in copy.rglob("*") if p.is_file())):
        blob = file.rename(tmp_path / "blobs" / str(i))
        file.symlink_to(blob)
    assert_same(tiny_parts, load_folder(copy))


def test_an_autoencoder_alone(copy: Path, tiny_parts: Components, tmp_path: Path) -> None:
    wanted = tiny_parts.vae.state_dict()
    for path in (copy, copy / "vae"):
        assert difference(load_vae_folder(path).state_dict(), wanted) == 0
    save_folder(tiny("LDMPipeline", tiny_parts), tmp_path / "ldm")
    assert isinstance(load_vae_folder(tmp_path / "ldm"), VQModel)
    assert isinstance(load_vae_folder(copy / "vae"), AutoencoderKL)
    with pytest.raises(ValueError, match="holds a 'UNet2DConditionModel'; an autoencoder is one of Auto"):
        load_vae_folder(copy / "unet")
    with pytest.raises(FileNotFoundError, match=r"neither config\.json nor model_index\.json"):
        load_vae_folder(tmp_path)


def test_the_upscalers_latents_have_a_scale_of_their_own(tiny_parts: Components, tmp_path: Path) -> None:
    save_folder(tiny("StableDiffusionUpscalePipeline", tiny_parts), tmp_path / "model")
    path = tmp_path / "model" / "vae" / "config.json"
    config = json.loads(path.read_text())
    del config["scaling_factor"]  # as in the published folder
    path.write_text(json.dumps(config))
    assert load_folder(tmp_path / "model").vae.config.scaling_factor == 0.08333
    edit(path, scaling_factor=0.5)
    assert load_folder(tmp_path / "model").vae.config.scaling_factor == 0.5


# The index --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "family"),
    [
        ("StableDiffusionImg2ImgPipeline", 4, "StableDiffusionPipeline"),
        ("StableDiffusionInpaintPipelineLegacy", 4, "StableDiffusionPipeline"),
        ("StableDiffusionInpaintPipeline", 4, "StableDiffusionPipeline"),
        ("StableDiffusionInpaintPipeline", 9, "StableDiffusionInpaintPipeline"),
    ],
)
def test_classes_in_other_words(tiny_parts: Components, tmp_path: Path, name: str, channels: int, family: str) -> None:
    unet = UNet(replace(tiny_parts.unet.config, in_channels=channels))
    save_folder(replace(tiny_parts, denoiser=unet), tmp_path / "model")
    edit(tmp_path / "model" / "model_index.json", _class_name=name)
    assert load_folder(tmp_path / "model").pipeline == family


def test_a_unet_of_another_task_is_refused(tiny_parts: Components, tmp_path: Path) -> None:
    unet = UNet(replace(tiny_parts.unet.config, in_channels=9))
    save_folder(replace(tiny_parts, denoiser=unet), tmp_path / "model")
    with pytest.raises(ValueError, match="the unet takes 9 channels; that of a StableDiffusionPipeline takes 4"):
        load_folder(tmp_path / "model")


def test_other_sub_folders_are_passed_over(copy: Path, tiny_parts: Components) -> None:
    (copy / "safety_checker").mkdir()
    (copy / "safety_checker" / "pytorch_model.bin").write_bytes(b"not to be read")
    edit(
        copy / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        **{"../outside": ["os", "system"]},
    )
    assert_same(tiny_parts, load_folder(copy))


def test_the_prediction_may_be_overridden(copy: Path) -> None:
    assert load_folder(copy).scheduler.prediction == "v_prediction"
    changed = load_folder(copy, prediction="eps").scheduler
    assert changed.prediction == "epsilon" and changed.config.prediction_type == "epsilon"
    assert changed.config.timestep_spacing == "trailing"
    with pytest.raises(ValueError, match="unknown prediction 'x'"):
        load_folder(copy, prediction="x")


@pytest.mark.parametrize("part", NETWORKS[:3])
def test_missing_weights_say_what_lies_there(copy: Path, part: str) -> None:
    (weights,) = (copy / part).glob("*.safetensors")
    weights.rename(copy / part / "flax_model.msgpack")
    with pytest.raises(FileNotFoundError, match=rf"{part} has none of .*it holds: config.json, flax_model.msgpack"):
        load_folder(copy)


def test_folders_of_other_kinds_are_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model folder"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"not a model folder: it has no model_index\.json"):
        load_folder(tmp_path)
    edit(copy / "model_index.json", unet=["diffusers", "UNet3DConditionModel"])
    with pytest.raises(ValueError, match="names the class 'UNet3DConditionModel' for unet; supported: UNet2DCond"):
        load_folder(copy)
    edit(copy / "model_index.json", unet=None)
    with pytest.raises(ValueError, match="names no class for unet; supported"):
        load_folder(copy)
    edit(copy / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(ValueError, match="describes a 'FluxPipeline'; this version opens"):
        load_folder(copy)
    (copy / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index\.json is not valid JSON"):
        load_folder(copy)


def test_weights_of_another_config_are_refused(copy: Path) -> None:
    edit(copy / "unet" / "config.json", cross_attention_dim=48)
    with pytest.raises(ValueError, match=r"does not fit UNet as its config describes it; .* of another shape"):
        load_folder(copy)
