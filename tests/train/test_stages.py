"""The stages of a recipe on tiny networks: autoencoder, cache, denoiser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.cond import Cond
from sfumato.diffusion.path import FlowPath, VPPath, betas
from sfumato.diffusion.prediction import get_prediction
from sfumato.images import to_unit
from sfumato.models.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.models.mmdit import MMDiT, MMDiTConfig
from sfumato.models.unet import UNet, UNetConfig
from sfumato.train.cache import LatentCache
from sfumato.train.latent import DenoiserLoss, start_plain, train_latent
from sfumato.train.loop import LoopConfig
from sfumato.train.objectives import DENSITIES, min_snr_v, x0_v
from sfumato.train.recipe import read_recipe
from sfumato.train.vae import crops, standardise, start_linear
from sfumato.weights.safe import write_tensors

VAE = AutoencoderConfig(
    block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=2, latent_channels=3, scaling_factor=1.0, mid_block_add_attention=False,
)  # fmt: skip
UNET = UNetConfig(
    sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1, cross_attention_dim=6, attention_head_dim=2, norm_num_groups=4,
)  # fmt: skip


def pictures(count: int = 32, side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_standardising_leaves_reconstructions_alone() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(VAE).eval()
    x = to_unit(torch.from_numpy(pictures()))
    with torch.no_grad():
        before = vae.decode(vae.encode(x).latent_dist.mode()).sample
        standardise(vae, pictures())
        dist = vae.encode(x).latent_dist
        after = vae.decode(dist.mode()).sample
    z = dist.mode()
    difference = float((before - after).abs().max())
    print(f"largest difference {difference:.1e}; means {z.mean((0, 2, 3))}, deviations {z.std((0, 2, 3))}")
    assert difference < 1e-4
    assert z.mean((0, 2, 3)).abs().max() < 1e-4 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-4


def test_the_linear_start_keeps_the_variance_of_a_picture() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(VAE)
    start_linear(vae)
    with torch.no_grad():
        dist = vae.encode(to_unit(torch.from_numpy(pictures()))).latent_dist
    print(f"latent deviation {float(dist.mode().detach().std()):.2f}, noise {float(dist.std.detach().mean()):.3f}")
    assert 0.2 < float(dist.mode().std()) < 5 and float((dist.std - np.exp(-3)).abs().max()) < 1e-6


def test_crops_come_from_the_pool() -> None:
    pool = pictures(3)
    cut = crops(pool, 20, 8, np.random.default_rng(1))
    assert cut.shape == (20, 8, 8, 3)
    windows = np.lib.stride_tricks.sliding_window_view(pool, (8, 8), axis=(1, 2)).transpose(0, 1, 2, 4, 5, 3)
    assert all((windows == one).all(axis=(3, 4, 5)).any() for one in cut)


@pytest.mark.parametrize("name", list(DENSITIES))
def test_densities_stay_inside(name: str) -> None:
    u = DENSITIES[name](4000, torch.Generator().manual_seed(0))
    print(f"{name}: mean {float(u.mean()):.3f}, smallest {float(u.min()):.4f}, largest {float(u.max()):.4f}")
    mean = 2 - 2 * np.log(2) if name == "shifted" else 0.5  # the integral of 2 u / (1 + u)
    assert float(u.min()) >= 0 and float(u.max()) < 1 and abs(float(u.mean()) - mean) < 0.03


def test_x0_weight_turns_the_error_of_v_into_that_of_the_picture() -> None:
    path = VPPath(betas("scaled_linear", 1000, 0.00085, 0.02))
    points, v = path.at(torch.tensor([5, 300, 990])), get_prediction("v")
    x, out, wanted = torch.randn(3, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    picture = (v.x0(x, out, points) - v.x0(x, wanted, points)).square().mean((1, 2, 3))
    weighted = (x0_v(points) * (out - wanted).square()).mean((1, 2, 3))
    difference = float((picture - weighted).abs().max())
    print(f"largest difference {difference:.1e}")
    assert difference < 1e-5


def test_min_snr_weight() -> None:
    points = VPPath(betas("scaled_linear", 1000, 0.00085, 0.02)).at(torch.tensor([0, 400, 999]))
    snr = (points.alpha / points.sigma).flatten() ** 2
    weight = min_snr_v(points).flatten()
    wanted = torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)
    assert float((weight - wanted).abs().max()) < 1e-7 and weight[0] < weight[1]


def test_untrained_network_has_the_loss_of_a_zero_guess() -> None:
    """v has variance alpha² + sigma² = 1 for standard latents, and the plain start predicts zero."""
    torch.manual_seed(0)
    net = UNet(UNET)
    start_plain(net)
    path = VPPath(betas("scaled_linear", 1000, 0.00085, 0.02))
    x0, empty = torch.randn(64, 3, 8, 8), Cond(torch.zeros(1, 5, 6))
    with torch.no_grad():
        cond = Cond(torch.randn(64, 5, 6))
        loss = DenoiserLoss()(net, path, x0, cond, empty, torch.Generator().manual_seed(0))
    print(f"loss {float(loss['loss']):.3f}")
    assert abs(float(loss["loss"]) - 1) < 0.05


def test_dropped_text_is_the_empty_prompt() -> None:
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
            seen.append((t, cond.context))  # type: ignore[attr-defined]
            return x

    path = VPPath(betas("scaled_linear", 1000, 0.00085, 0.02))
    loss = DenoiserLoss(drop_text=0.5, pure_noise=0.25)
    cond, empty = Cond(torch.ones(4000, 2, 3)), Cond(torch.zeros(1, 2, 3))
    loss(Spy(), path, torch.zeros(4000, 1, 1, 1), cond, empty, torch.Generator().manual_seed(0))
    t, told = seen[0]
    dropped, last = float((told[:, 0, 0] == 0).float().mean()), float((t == 999).float().mean())
    print(f"dropped {dropped:.3f}, at the last time {last:.3f}")
    assert abs(dropped - 0.5) < 0.03 and abs(last - 0.25) < 0.03


def test_denoiser_learns_a_text_dependent_colour(tmp_path: Path) -> None:
    """Two prompts, two constant latents: after some steps each prompt's prediction is its own latent."""
    states = torch.stack([torch.zeros(5, 6), torch.ones(5, 6)])
    latents = torch.stack([torch.full((3, 8, 8), -1.0), torch.full((3, 8, 8), 1.0)])
    which = torch.arange(64, dtype=torch.int32) % 2
    shard = tmp_path / "latents-0000.safetensors"
    write_tensors(shard, {"latents": latents[which.long()].half(), "caption": which, "context": states.half()})
    path = VPPath(betas("scaled_linear", 1000, 0.00085, 0.02))
    loop = LoopConfig(steps=60, batch_size=16, lr=3e-3, warmup=5, cooldown=20, ema=0.8)
    net = train_latent(UNET, LatentCache([shard]), Cond(torch.zeros(1, 5, 6)), path, loop, tmp_path / "run")
    with torch.no_grad():
        v = net(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), 999.0, Cond(states))
    x0 = -v.mean((1, 2, 3))  # at the last time v is all but -x0
    print(f"predicted latents {x0.tolist()}, wanted -1 and 1")
    assert x0[0] < -0.5 < 0.5 < x0[1]


MMDIT = MMDiTConfig(
    sample_size=8, in_channels=3, out_channels=3, num_layers=2, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=6, caption_projection_dim=16, pooled_projection_dim=4, pos_embed_max_size=4,
)  # fmt: skip


def test_a_transformer_learns_a_text_dependent_colour_at_both_sizes(tmp_path: Path) -> None:
    """On a flow at time 1000 the network is shown noise alone, and x0 is the noise less what it says."""
    states = torch.stack([torch.zeros(5, 6), torch.ones(5, 6)])
    vectors = torch.stack([torch.zeros(4), torch.ones(4)])
    latents = torch.stack([torch.full((3, 8, 8), -1.0), torch.full((3, 8, 8), 1.0)])
    which = torch.arange(64, dtype=torch.int32) % 2
    shard = tmp_path / "latents-0000.safetensors"
    rows = latents[which.long()].half()
    texts = {"caption": which, "context": states.half(), "pooled": vectors.half()}
    write_tensors(shard, {"latents": rows, "half": rows[..., :4, :4].contiguous(), **texts})
    loop = LoopConfig(steps=80, batch_size=16, lr=5e-3, warmup=5, cooldown=30, ema=0.8, weight_decay=0.0)
    loss = DenoiserLoss("flow_prediction", "logit_normal", pure_noise=0.25)
    empty = Cond(torch.full((1, 5, 6), -1.0), torch.full((1, 4), -1.0))
    run = tmp_path / "run"
    net = train_latent(MMDIT, LatentCache([shard]), empty, FlowPath(), loop, run, loss, half=0.5)
    assert isinstance(net, MMDiT)
    for side in (8, 4):
        eps = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            x0 = (eps - net(eps, 1000.0, Cond(states, vectors))).mean((1, 2, 3))
        print(f"{side}x{side}: predicted latents {x0.tolist()}, wanted -1 and 1")
        assert x0[0] < -0.5 < 0.5 < x0[1]
    lone = tmp_path / "lone.safetensors"
    write_tensors(lone, {"latents": rows, **texts})
    with pytest.raises(ValueError, match="no pictures of half the side; delete it, or set half to 0"):
        LatentCache([lone]).batch(2, torch.Generator(), half=True)


def test_the_times_of_a_flow_are_no_whole_numbers_and_end_at_pure_noise() -> None:
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
            seen.append((x, t, cond))
            return x

    cond, empty = Cond(torch.ones(4000, 2, 3), torch.ones(4000, 5)), Cond(torch.zeros(1, 2, 3), torch.zeros(1, 5))
    loss = DenoiserLoss("flow_prediction", "logit_normal", drop_text=0.5, pure_noise=0.25)
    loss(Spy(), FlowPath(3.0), torch.full((4000, 1, 1, 1), 50.0), cond, empty, torch.Generator().manual_seed(0))
    x, t, told = seen[0]
    pure = t == 1000
    print(f"{pure.float().mean():.3f} pure, between {t[~pure].min():.1f} and {t[~pure].max():.1f}")
    assert abs(float(pure.float().mean()) - 0.25) < 0.03 and x[pure].abs().max() < 6
    assert (t != t.floor()).float().mean() > 0.7 and abs(float(t[~pure].median()) - 500) < 20
    assert told.context is not None and told.pooled is not None
    assert torch.equal(told.context[:, 0, 0] == 0, told.pooled[:, 0] == 0)


def test_a_recipe_takes_its_parts_from_a_base_or_makes_them(tmp_path: Path) -> None:
    place = Path(__file__).parents[2] / "recipes/mmdit.yaml"
    recipe = read_recipe(place)
    part, config = recipe.denoiser
    assert recipe.base == "mini" and isinstance(config, MMDiTConfig) and part.loss.density == "logit_normal"
    with torch.device("meta"):
        count = sum(p.numel() for p in MMDiT(config).parameters())
    print(f"{count:,} parameters")
    assert 10e6 < count < 25e6
    bad = tmp_path / "bad.yaml"
    for old, new, message in (
        ("base: mini", "", "give base, or text and vae"),
        ("base: mini", "base: mini\ntext: {}", "give base, or text and vae"),
        ("transformer:", "other:", "other: Extra inputs are not permitted|give one denoiser, unet or transformer"),
    ):
        bad.write_text(place.read_text().replace(old, new))
        with pytest.raises(ValueError, match=message):
            read_recipe(bad)


def test_the_shipped_recipe_parses() -> None:
    recipe = read_recipe(Path(__file__).parents[2] / "recipes/mini.yaml")
    assert recipe.unet is not None and recipe.vae is not None and recipe.unet.loop.steps > 0
    assert isinstance(recipe.denoiser[1], UNetConfig)
    AutoencoderConfig.from_dict(recipe.vae.config)


def test_a_wrong_entry_is_named(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "recipes/mini.yaml").read_text()
    bad = tmp_path / "bad.yaml"
    bad.write_text(text.replace("shards: ", "shard: "))
    with pytest.raises(ValueError, match=r"bad\.yaml: cache\.shards: Field required"):
        read_recipe(bad)
    bad.write_text("out: [")
    with pytest.raises(ValueError, match="is not valid YAML"):
        read_recipe(bad)
