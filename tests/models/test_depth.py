"""The estimators of depth beside transformers' DPT, and what diffusers makes of them for a depth model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionDepth2ImgPipeline
from PIL import Image
from torch import nn
from transformers import DPTConfig as TheirConfig
from transformers import DPTForDepthEstimation
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

from sfumato.images import to_tensor
from sfumato.models.bit import BitConfig, pad_same
from sfumato.models.depth import DepthEstimator, DPTProcessorConfig, depth_channel
from sfumato.models.dpt import DPT_HYBRID, DPT_LARGE, DPTConfig
from sfumato.weights.dpt import dpt_map

from .parity import assert_close, count, scramble

LARGE = DPTConfig(
    hidden_size=32,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=64,
    backbone_out_indices=(0, 2, 3, 5),
    neck_hidden_sizes=(12, 20, 24, 40),
    fusion_hidden_size=16,
)
HYBRID = replace(
    LARGE,
    neck_hidden_sizes=(32, 64, 24, 40),
    reassemble_factors=(1, 1, 1, 0.5),
    backbone_config=BitConfig(embedding_size=16, hidden_sizes=(32, 64, 96, 128), depths=(2, 1, 2), num_groups=4),
)
FORMS = {"large": LARGE, "hybrid": HYBRID}
UNREAD = "neck.fusion_stage.layers.0.residual_layer1."
# The files of stabilityai/stable-diffusion-2-depth and of Intel/dpt-large, as published.
PUBLISHED = {
    "new": """{"do_normalize": true, "do_rescale": true, "do_resize": true, "ensure_multiple_of": 1,
        "image_mean": [0.5, 0.5, 0.5], "image_processor_type": "DPTImageProcessor", "image_std": [0.5, 0.5, 0.5],
        "keep_aspect_ratio": false, "resample": 2, "rescale_factor": 0.00392156862745098,
        "size": {"height": 384, "width": 384}}""",
    "old": """{"do_normalize": true, "do_resize": true, "ensure_multiple_of": 1,
        "feature_extractor_type": "DPTFeatureExtractor", "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5], "keep_aspect_ratio": false, "resample": 2, "size": 384}""",
}
LARGE_JSON = """{"architectures": ["DPTForDepthEstimation"], "attention_probs_dropout_prob": 0.0,
    "auxiliary_loss_weight": 0.4, "backbone_out_indices": [5, 11, 17, 23], "fusion_hidden_size": 256,
    "head_in_index": -1, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 1024, "image_size": 384,
    "initializer_range": 0.02, "intermediate_size": 4096, "layer_norm_eps": 1e-12, "model_type": "dpt",
    "neck_hidden_sizes": [256, 512, 1024, 1024], "num_attention_heads": 16, "num_channels": 3,
    "num_hidden_layers": 24, "patch_size": 16, "qkv_bias": true, "readout_type": "project",
    "reassemble_factors": [4, 2, 1, 0.5], "semantic_classifier_dropout": 0.1, "semantic_loss_ignore_index": 255,
    "torch_dtype": "float32", "transformers_version": "4.18.0.dev0", "use_auxiliary_head": true,
    "use_batch_norm_in_fusion_residual": false}"""


def pair(config: DPTConfig, seed: int = 0) -> tuple[DepthEstimator, nn.Module]:
    """The two networks with the same random weights, theirs read through the key map of model folders."""
    ours, theirs = DepthEstimator(config), DPTForDepthEstimation(TheirConfig(**config.to_dict()))
    scramble(theirs, seed)
    ours.load_state_dict(dpt_map(config).load(theirs.state_dict()))
    ours.processor = DPTProcessorConfig(size=(64, 64))
    return ours.eval(), theirs.eval()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture with some noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height), 3)
    noise = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray((np.asarray(small) + noise).clip(0, 255).astype(np.uint8))


# The network ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_same_as_transformers(form: str) -> None:
    ours, theirs = pair(FORMS[form])
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    a, b = ours(x).predicted_depth, theirs(x).predicted_depth
    assert a.shape == (2, 64, 64) and float(b.max()) > float(b.min()) >= 0
    assert_close(f"depth by DPT-{form}", a, b, 1e-5)


@torch.no_grad()
def test_same_as_transformers_at_another_size() -> None:
    # Theirs takes squares only, and in the hybrid form only the trained one.
    ours, theirs = pair(LARGE)
    x = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    assert_close("depth at another size", ours(x).predicted_depth, theirs(x).predicted_depth, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_pictures_need_not_be_square(form: str) -> None:
    # Theirs guesses a square grid of patches; its parts, put together by hand, need not.
    config = FORMS[form]
    ours, theirs = pair(config)
    x = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(1))
    seen = theirs.dpt.embeddings(x, **({"interpolate_pos_encoding": True} if config.is_hybrid else {}))
    tokens, states = seen.last_hidden_states, []
    for layer in theirs.dpt.encoder.layer:
        tokens = layer(tokens)
        states.append(tokens)
    first = list(seen.intermediate_activations or ())
    wanted = [*first, *(states[i] for i in config.backbone_out_indices[len(first) :])]
    expected = theirs.head(theirs.neck(wanted, 3, 5))
    assert_close(f"80 x 48 by DPT-{form}", ours(x).predicted_depth, expected, 1e-5)
    with pytest.raises(ValueError, match="a picture of 80 x 50 pixels for the depth estimator; use multiples of 16"):
        ours(x.new_zeros(1, 3, 50, 80))


@pytest.mark.parametrize("form", FORMS)
def test_names_are_those_of_transformers_but_for_layers_that_nothing_passes(form: str) -> None:
    ours, theirs = pair(FORMS[form])
    names = set(theirs.state_dict())
    unread = {name for name in names if name.startswith(UNREAD)}
    assert len(unread) == 4 and set(ours.state_dict()) == names - unread
    # The published files lack them, too.
    published = {name: tensor for name, tensor in theirs.state_dict().items() if name not in unread}
    loaded = dpt_map(FORMS[form]).load(published)
    assert loaded.keys() == ours.state_dict().keys()
    with pytest.raises(ValueError, match=r"1 unknown: dpt\.more"):
        dpt_map(FORMS[form]).load(published | {"dpt.more": torch.zeros(1)})


@torch.no_grad()
def test_layers_that_nothing_passes_change_nothing() -> None:
    _, theirs = pair(HYBRID)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    before = theirs(x).predicted_depth
    for name, parameter in theirs.named_parameters():
        if name.startswith(UNREAD):
            parameter.fill_(7.0)
    assert torch.equal(before, theirs(x).predicted_depth)


@pytest.mark.parametrize(("config", "parameters"), [(DPT_LARGE, 341_850_305), (DPT_HYBRID, 121_197_825)])
def test_parameters_of_the_published_sizes(config: DPTConfig, parameters: int) -> None:
    with torch.device("meta"):
        ours, theirs = DepthEstimator(config), DPTForDepthEstimation(TheirConfig(**config.to_dict()))
    unread = sum(p.numel() for name, p in theirs.named_parameters() if name.startswith(UNREAD))
    print(f"{count(ours):,} and {unread:,} that nothing passes; transformers' {count(theirs):,}")
    assert count(ours) + unread == count(theirs)
    assert count(ours) == parameters


def test_padding_finds_as_many_places_as_tensorflow() -> None:
    for size in range(1, 12):
        for kernel, stride in ((7, 2), (3, 2), (1, 2), (3, 1)):
            padded = pad_same(torch.ones(1, 1, size, size), kernel, stride)
            assert (padded.shape[2] - kernel) // stride + 1 == -(-size // stride)
    assert pad_same(torch.ones(1, 1, 4, 4), 3, 2)[0, 0, :, 0].tolist() == [1, 1, 1, 1, 0]


# Configurations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LARGE, HYBRID, DPT_LARGE, DPT_HYBRID], ids=["a", "b", "large", "hybrid"])
def test_config_survives_the_round_trip_through_transformers(config: DPTConfig) -> None:
    written = TheirConfig(**config.to_dict()).to_dict()
    assert DPTConfig.from_dict(written) == config
    assert DPTConfig.from_dict(config.to_dict()) == config


def test_published_configs_are_read() -> None:
    assert DPTConfig.from_dict(json.loads(LARGE_JSON)) == DPT_LARGE
    # Entries of the hybrid that a file leaves out are those of the published one.
    assert DPTConfig.from_dict({"is_hybrid": True, "neck_hidden_sizes": [256, 512, 768, 768]}) == replace(
        DPT_HYBRID, reassemble_factors=(4, 2, 1, 0.5)
    )
    for text in PUBLISHED.values():
        assert DPTProcessorConfig.from_dict(json.loads(text)) == DPTProcessorConfig()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "glpn"}, r"model_type = 'glpn'.*'dpt'"),
        ({"readout_type": "add"}, r"readout_type = 'add'.*'project'"),
        ({"use_batch_norm_in_fusion_residual": True}, "use_batch_norm_in_fusion_residual = True"),
        ({"backbone_config": {"model_type": "dinov2"}}, "a backbone of kind 'dinov2' is not supported"),
        ({"is_hybrid": True, "backbone_config": {"layer_type": "preactivation"}}, "layer_type = 'preactivation'"),
        ({"is_hybrid": True, "backbone_config": {"depths": [3, 4, 6, 3]}}, "DPT-hybrid has three stages"),
        ({"is_hybrid": True, "backbone_config": {"hidden_sizes": [60, 64, 96]}}, "has 60; use multiples of 32"),
        ({"is_hybrid": True, "backbone_featmap_shape": [1, 384, 24, 24]}, r"backbone_featmap_shape = 384.*1024"),
        ({"is_hybrid": True}, r"neck_hidden_sizes begin with = \(96, 192\).*\(256, 512\)"),
        ({"backbone_out_indices": [2, 5, 8, 12]}, "give rising numbers from 0 to 11"),
        ({"neck_hidden_sizes": [1, 2]}, "give 4 values"),
        ({"image_size": [384, 512]}, r"image_size = \(384, 512\); only squares"),
        ({"num_attention_heads": 7}, "num_attention_heads = 7 does not divide hidden_size = 768"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPTConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"do_resize": False}, "do_resize = False"),
        ({"do_pad": True}, "do_pad = True"),
        ({"rescale_factor": 1.0}, "rescale_factor = 1.0 is not supported; use 1 / 255"),
        ({"size": {"shortest_edge": 384}}, "give height and width"),
        ({"resample": 9}, "resample = 9"),
    ],
)
def test_errors_of_the_processor(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPTProcessorConfig.from_dict(raw)


# Pictures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "processor",
    [
        DPTProcessorConfig(size=(96, 64)),
        DPTProcessorConfig(size=(64, 64), resample=3, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4)),
        DPTProcessorConfig(size=(96, 96), keep_aspect_ratio=True, ensure_multiple_of=32),
    ],
    ids=["as published", "other numbers", "aspect kept"],
)
def test_pictures_are_prepared_as_in_transformers(processor: DPTProcessorConfig) -> None:
    theirs = DPTImageProcessorPil(**processor.to_dict())
    assert DPTProcessorConfig.from_dict(theirs.to_dict()) == processor
    for width, height in ((64, 64), (150, 70), (70, 200)):
        images = [picture(width, height, seed) for seed in (0, 1)]
        expected = torch.as_tensor(np.stack(theirs(images=images)["pixel_values"]))
        assert_close(f"{width} x {height}", processor.pixel_values(to_tensor(images)), expected, 1e-6)


def test_a_thin_picture_keeps_a_row_of_patches() -> None:
    processor = DPTProcessorConfig(size=(96, 96), keep_aspect_ratio=True, ensure_multiple_of=32)
    assert processor.target(200, 5) == (96, 32) and processor.target(5, 200) == (32, 96)


@pytest.mark.parametrize("form", FORMS)
def test_an_estimate_has_the_size_of_the_picture(form: str) -> None:
    ours, theirs = pair(FORMS[form])
    image = picture(120, 72)
    depth = ours.estimate(to_tensor([image, picture(120, 72, seed=1)]))
    assert depth.shape == (2, 1, 72, 120) and depth.dtype == torch.float32 and not depth.requires_grad
    processor = DPTImageProcessorPil(**ours.processor.to_dict())
    with torch.no_grad():
        output = theirs(**processor(images=[image], return_tensors="pt"))
    expected = processor.post_process_depth_estimation(output, target_sizes=[(72, 120)])[0]["predicted_depth"]
    assert_close("estimate", depth[0, 0], expected, 1e-5)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_half_precision_gives_about_the_same(form: str) -> None:
    ours, _ = pair(FORMS[form])
    x = to_tensor([picture(64, 64)])
    exact = ours.predict(x)
    assert_close("bfloat16", ours.to(torch.bfloat16).predict(x), exact, 0.1)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_depth_channel_is_the_one_of_diffusers(form: str) -> None:
    ours, theirs = pair(FORMS[form])
    stand_in = StableDiffusionDepth2ImgPipeline.__new__(StableDiffusionDepth2ImgPipeline)
    stand_in.feature_extractor = DPTImageProcessorPil(**ours.processor.to_dict())
    stand_in.depth_estimator, stand_in.vae_scale_factor = theirs, 8
    images = [picture(128, 96, seed) for seed in (0, 1)]
    expected = stand_in.prepare_depth_map(images, None, 2, False, torch.float32, torch.device("cpu"))
    channel = depth_channel(ours.predict(to_tensor(images)), 12, 16)
    assert (channel.amin((1, 2, 3)) == -1).all() and (channel.amax((1, 2, 3)) == 1).all()
    assert_close("estimated", channel, expected, 1e-5)
    given = torch.rand(2, 96, 128, generator=torch.Generator().manual_seed(0))
    expected = stand_in.prepare_depth_map(images, given, 2, False, torch.float32, torch.device("cpu"))
    assert_close("given", depth_channel(given[:, None], 12, 16), expected, 1e-6)


def test_a_flat_depth_is_refused() -> None:
    flat = torch.rand(2, 1, 8, 8)
    flat[1] = 3.0
    with pytest.raises(ValueError, match="depth is 3 everywhere; give a map that tells near from far"):
        depth_channel(flat, 4, 4)
