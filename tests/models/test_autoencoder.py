"""The autoencoder beside diffusers' AutoencoderKL, its latents, and tiling."""

from __future__ import annotations

from itertools import pairwise

import diffusers
import pytest
import torch

from sfumato.models.autoencoder import AutoencoderConfig, AutoencoderKL, DiagonalGaussian, feather, starts

from .parity import assert_close, count, exchange, scramble


def config(**changes: object) -> AutoencoderConfig:
    raw = {
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [8, 16, 32],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    return AutoencoderConfig.from_dict({**raw, **changes})


SHAPES = {
    "sd": config(layers_per_block=2),
    "built-in": config(mid_block_add_attention=False),
    "sd3": config(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_same_as_diffusers(shape: str, layout: torch.memory_format) -> None:
    c = SHAPES[shape]
    ours, theirs = AutoencoderKL(c), diffusers.AutoencoderKL.from_config(c.to_dict())
    exchange(ours, theirs)
    ours.to(memory_format=layout)
    x = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(3))
    a, b = ours.encode(x.contiguous(memory_format=layout)).latent_dist, theirs.encode(x).latent_dist
    assert_close(f"{shape} mean", a.mean, b.mean)
    assert_close(f"{shape} logvar", a.logvar, b.logvar)
    assert_close(f"{shape} kl", a.kl(), b.kl())
    draws = [d.sample(generator=torch.Generator().manual_seed(4)) for d in (a, b)]
    assert_close(f"{shape} sample", *draws)
    assert_close(f"{shape} decode", ours.decode(b.mean).sample, theirs.decode(b.mean).sample)


def test_config_survives_the_round_trip_through_diffusers() -> None:
    c = SHAPES["sd3"]
    theirs = diffusers.AutoencoderKL.from_config(c.to_dict())
    assert AutoencoderConfig.from_dict(dict(theirs.config)) == c
    assert c.to_dict()["_class_name"] == "AutoencoderKL"
    assert AutoencoderConfig.from_dict(c.to_dict()) == c


@pytest.mark.parametrize(
    ("widths", "published"), [([128, 256, 512, 512], 83_653_863), ([128, 256, 512], 55_325_927)], ids=["f8", "f4"]
)
def test_published_parameter_counts(widths: list[int], published: int) -> None:
    raw = {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": 2,
    }
    with torch.device("meta"):
        ours = AutoencoderKL(AutoencoderConfig.from_dict(raw))
        theirs = diffusers.AutoencoderKL.from_config(ours.config.to_dict())
    assert ours.config.factor == 2 ** (len(widths) - 1)
    assert count(ours) == count(theirs) == published


@torch.no_grad()
def test_latents_are_shifted_and_scaled_and_pixels_undo_it() -> None:
    vae = AutoencoderKL(config(scaling_factor=0.5, shift_factor=0.25)).eval()
    scramble(vae)
    x = torch.randn(2, 3, 16, 16)
    raw = vae.encode(x).latent_dist.sample(torch.Generator().manual_seed(5))
    z = vae.to_latents(x, torch.Generator().manual_seed(5))
    assert_close("to_latents", z, (raw - 0.25) * 0.5, 1e-6)
    assert_close("to_pixels", vae.to_pixels(z), vae.decode(raw).sample, 1e-5)


def test_log_variance_is_clamped() -> None:
    dist = DiagonalGaussian(torch.tensor([0.0, -99.0, 99.0, 0.0]).view(1, 4, 1, 1))
    assert dist.logvar.flatten().tolist() == [20.0, 0.0]
    assert dist.mode() is dist.mean


@torch.no_grad()
def test_tiled_decode_is_nearer_to_the_whole_than_diffusers_tiles() -> None:
    c = config(mid_block_add_attention=False)
    ours, theirs = AutoencoderKL(c), diffusers.AutoencoderKL.from_config(c.to_dict())
    exchange(ours, theirs)
    z = torch.randn(1, 4, 26, 11, generator=torch.Generator().manual_seed(6))
    whole = ours.decode(z).sample
    ours.enable_tiling()
    theirs.enable_tiling()
    tiles = ours.decode(z).sample
    span = float(whole.max() - whole.min())
    error, peer = (float((y - whole).abs().mean()) / span for y in (tiles, theirs.decode(z).sample))
    print(f"mean difference from the untiled picture: ours {error:.4f}, diffusers {peer:.4f} of the range")
    assert 0.0 < error < min(0.05, peer)
    ours.disable_tiling()
    assert torch.equal(ours.decode(z).sample, whole)


@torch.no_grad()
def test_tiled_encode_covers_the_picture() -> None:
    vae = AutoencoderKL(config(mid_block_add_attention=False)).eval()
    scramble(vae)
    x = torch.randn(2, 3, 76, 44, generator=torch.Generator().manual_seed(7))
    whole = vae.encode(x).latent_dist.mean
    vae.enable_tiling()
    tiles = vae.encode(x).latent_dist.mean
    span = float(whole.max() - whole.min())
    error = float((tiles - whole).abs().mean()) / span
    print(f"mean difference from the untiled latent: {error:.4f} of the range")
    assert tiles.shape == whole.shape
    assert 0.0 < error < 0.05


@torch.no_grad()
def test_tiling_bounds_what_the_network_sees() -> None:
    vae = AutoencoderKL(config()).eval()
    sizes: list[torch.Size] = []
    vae.decoder.register_forward_hook(lambda module, args, out: sizes.append(out.shape[2:]))
    vae.enable_tiling()
    assert vae.decode(torch.randn(1, 4, 30, 30)).sample.shape == (1, 3, 120, 120)
    assert set(sizes) == {torch.Size([32, 32])}
    sizes.clear()
    vae.decode(torch.randn(1, 4, 8, 8))
    assert len(sizes) == 1


@pytest.mark.parametrize(("size", "tile"), [(9, 8), (26, 8), (112, 64), (8, 8), (200, 64)])
def test_tiles_cover_a_side_with_overlap(size: int, tile: int) -> None:
    begin = starts(size, tile)
    assert begin[0] == 0
    assert begin[-1] == size - tile
    assert all(0 < b - a <= tile - tile // 4 for a, b in pairwise(begin))
    weight = torch.zeros(size)
    for start in begin:
        weight[start : start + tile] += feather(tile, tile // 4, start, size)
    assert float(weight.min()) > 0.0


def test_errors_name_the_value_and_the_mend() -> None:
    with pytest.raises(ValueError, match=r"down_block_types.*AttnDown.*allowed.*DownEncoderBlock2D"):
        config(down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"])
    with pytest.raises(ValueError, match=r"act_fn = 'mish'.*'silu'"):
        config(act_fn="mish")
    with pytest.raises(ValueError, match=r"latents_mean.*allowed: None"):
        config(latents_mean=[0.0] * 4)
    with pytest.raises(ValueError, match=r"scaling_facto = 1\.0; did you mean 'scaling_factor'"):
        config(scaling_facto=1.0)
    with pytest.raises(ValueError, match="divisor"):
        AutoencoderKL(config(norm_num_groups=5))
    vae = AutoencoderKL(config())
    with pytest.raises(ValueError, match=r"30x32 pixels; use multiples of 4"):
        vae.encode(torch.zeros(1, 3, 32, 30))
    with pytest.raises(ValueError, match="tile = 18; use a multiple of 4"):
        vae.enable_tiling(18)
