"""The autoencoder with a code book beside diffusers' VQModel."""

from __future__ import annotations

import diffusers
import pytest
import torch

from sfumato.models import vq
from sfumato.models.vq import VectorQuantizer, VQConfig, VQModel

from .parity import assert_close, count, exchange, scramble


def config(**changes: object) -> VQConfig:
    raw = {
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [8, 16, 32],
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "num_vq_embeddings": 50,
    }
    return VQConfig.from_dict({**raw, **changes})


SHAPES = {"f4": config(), "wide codes": config(vq_embed_dim=5, mid_block_add_attention=False)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_same_as_diffusers(shape: str, layout: torch.memory_format) -> None:
    c = SHAPES[shape]
    ours, theirs = VQModel(c), diffusers.VQModel.from_config(c.to_dict())
    exchange(ours, theirs)
    ours.to(memory_format=layout)
    x = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(3))
    z = theirs.encode(x).latents
    assert_close(f"{shape} encode", ours.encode(x.contiguous(memory_format=layout)).latents, z)
    pixels = z.movedim(1, -1).flatten(0, 2)
    for net in (ours, theirs):  # codes all over the latents, as after training
        net.quantize.embedding.weight.copy_(pixels[1::2][:50] * 1.01)
    q = ours.quantize(z.contiguous(memory_format=layout))
    assert len(q.movedim(1, -1).flatten(0, 2).unique(dim=0)) > 20, "few codes would prove little"
    assert_close(f"{shape} quantize", q, theirs.quantize(z)[0])
    assert_close(f"{shape} decode", ours.decode(z.contiguous(memory_format=layout)).sample, theirs.decode(z).sample)


def test_config_survives_the_round_trip_through_diffusers() -> None:
    for c in SHAPES.values():
        theirs = diffusers.VQModel.from_config(c.to_dict())
        assert VQConfig.from_dict(dict(theirs.config)) == c
        assert VQConfig.from_dict(c.to_dict()) == c
        assert c.to_dict()["_class_name"] == "VQModel"


def test_published_parameter_count() -> None:
    c = config(block_out_channels=[128, 256, 512], norm_num_groups=32, num_vq_embeddings=8192)
    with torch.device("meta"):
        ours, theirs = VQModel(c), diffusers.VQModel.from_config(c.to_dict())
    assert count(ours) == count(theirs) == 55_322_782
    assert c.factor == 4


@torch.no_grad()
def test_nearest_code_is_nearest_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    book = VectorQuantizer(64, 3)
    book.embedding.weight.copy_(torch.randn(64, 3, generator=generator))
    z = torch.randn(2, 3, 7, 5, generator=generator)
    codes = book.embedding.weight.double()
    distances = (z.double().movedim(1, -1)[..., None, :] - codes).square().sum(-1)  # (B, h, w, M)
    assert torch.equal(book.nearest(z), distances.argmin(-1))
    whole = book(z)
    monkeypatch.setattr(vq, "SCORES", 64 * 4)
    assert torch.equal(book(z), whole)
    monkeypatch.setattr(vq, "SCORES", 1)
    assert torch.equal(book(z), whole)


def test_quantising_chooses_in_float32_and_lets_gradients_pass() -> None:
    book = VectorQuantizer(16, 3)
    z = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    half = VectorQuantizer(16, 3).bfloat16()
    half.load_state_dict(book.state_dict())
    q = half(z.bfloat16())
    assert q.dtype == torch.bfloat16
    rounded = VectorQuantizer(16, 3)
    rounded.load_state_dict({name: t.float() for name, t in half.state_dict().items()})
    assert torch.equal(half.nearest(z.bfloat16()), rounded.nearest(z.bfloat16().float()))
    z.requires_grad_()
    out = book(z)
    out.sum().backward()
    assert z.grad is not None
    assert torch.equal(z.grad, torch.ones_like(z))


@torch.no_grad()
def test_latents_are_scaled_and_pixels_undo_it() -> None:
    net = VQModel(config(scaling_factor=0.5)).eval()
    scramble(net)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    raw = net.encode(x).latents
    z = net.to_latents(x, torch.Generator())
    assert torch.equal(z, raw * 0.5)
    assert torch.equal(net.to_pixels(z), net.decode(raw).sample)
    assert torch.equal(net(x), net.decode(raw).sample)
    assert config().scaling_factor == 1.0


@torch.no_grad()
def test_tiles_are_near_the_whole() -> None:
    net = VQModel(config(mid_block_add_attention=False)).eval()
    scramble(net)
    x = torch.randn(1, 3, 76, 44, generator=torch.Generator().manual_seed(7))
    z = net.encode(x).latents
    whole = net.decode(z).sample
    net.enable_tiling()
    tiles = net.encode(x).latents, net.decode(z).sample
    for name, a, b in zip(("latent", "picture"), tiles, (z, whole), strict=True):
        error = float((a - b).abs().mean() / (b.max() - b.min()))
        print(f"mean difference from the untiled {name}: {error:.4f} of the range")
        assert 0.0 < error < 0.05
    net.disable_tiling()
    assert torch.equal(net.decode(z).sample, whole)


def test_errors_name_the_value_and_the_mend() -> None:
    with pytest.raises(ValueError, match=r"VQConfig: norm_type = 'spatial' is not supported; allowed: 'group'"):
        config(norm_type="spatial")
    with pytest.raises(ValueError, match=r"VQConfig: up_block_types.*allowed"):
        config(up_block_types=["UpDecoderBlock2D"])
    with pytest.raises(ValueError, match=r"30x32 pixels; use multiples of 4"):
        VQModel(config()).encode(torch.zeros(1, 3, 32, 30))
