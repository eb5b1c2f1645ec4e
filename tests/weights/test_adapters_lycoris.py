"""LyCORIS' kinds against their formulas (Yeh et al. 2023), written here entry by entry in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sfumato.models.unet import UNet
from sfumato.weights.adapters import AdapterHost, read_adapter

from .adapters_made import (
    assert_near,
    assert_untouched,
    factors,
    layers,
    snapshot,
    tiny_tower,
    tiny_unet,
    unet_answer,
    written,
)

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"  # 24 to 16
SMALL = "down_blocks.0.attentions.0.proj_in"  # 1x1, 16 to 16
LARGE = "down_blocks.1.resnets.0.conv1"  # 3x3, 16 to 32
STRIDED = "down_blocks.0.downsamplers.0.conv"  # 3x3, stride 2
R = 3


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64) * 0.4


def kernel(weight: Tensor) -> tuple[int, ...]:
    return tuple(weight.shape[2:])


def by_entries(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Tucker: sum over both ranks of core[r, s, k] a[r, o] b[s, i], rank by rank."""
    total = torch.zeros(a.shape[1], b.shape[1], *core.shape[2:], dtype=torch.float64)
    for r in range(core.shape[0]):
        for s in range(core.shape[1]):
            outer = a[r][:, None] * b[s][None, :]
            total += outer.reshape(*outer.shape, *(1,) * (core.ndim - 2)) * core[r, s]
    return total


def kron(one: Tensor, two: Tensor) -> Tensor:
    """The Kronecker product over the first two axes: block (i, j) is one[i, j] * two."""
    rows = [torch.cat([one[i, j] * two for j in range(one.shape[1])], dim=1) for i in range(one.shape[0])]
    return torch.cat(rows, dim=0)


def lora_tucker(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    up, mid, down = rand(w.shape[0], R), rand(R, R, *kernel(w), seed=1), rand(R, w.shape[1], seed=2)
    parts = {"lora_up.weight": up[:, :, None, None], "lora_mid.weight": mid, "lora_down.weight": down[:, :, None, None]}
    return {**parts, "alpha": torch.tensor(2.0)}, 2.0 / R * by_entries(mid, up.T, down)


def loha(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    flat = w[0].numel()
    a1, b1, a2, b2 = rand(w.shape[0], R), rand(R, flat), rand(w.shape[0], R, seed=3), rand(R, flat, seed=4)
    wanted = torch.stack([sum(a1[:, r] * b1[r, i] for r in range(R)) for i in range(flat)], 1)  # type: ignore[misc]
    wanted = wanted * torch.stack([sum(a2[:, r] * b2[r, i] for r in range(R)) for i in range(flat)], 1)  # type: ignore[misc]
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(1.5)}
    return parts, 1.5 / R * wanted.reshape(w.shape)


def loha_tucker(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    t1, t2 = rand(R, R, *kernel(w)), rand(R, R, *kernel(w), seed=5)
    a1, b1, a2, b2 = rand(R, w.shape[0]), rand(R, w.shape[1]), rand(R, w.shape[0], seed=6), rand(R, w.shape[1], seed=7)
    parts = {"hada_t1": t1, "hada_t2": t2, "hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    return {**parts, "alpha": torch.tensor(6.0)}, 6.0 / R * by_entries(t1, a1, b1) * by_entries(t2, a2, b2)


def lokr_whole(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    one, two = rand(4, 2), rand(w.shape[0] // 4, w.shape[1] // 2, *kernel(w))
    # with both matrices whole there is no rank, and alpha is not used
    return {"lokr_w1": one, "lokr_w2": two, "alpha": torch.tensor(7.0)}, kron(one, two)


def lokr_right(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    b, d = w.shape[0] // 2, w.shape[1] // 4
    one, a2, b2 = rand(2, 4), rand(b, R), rand(R, d * w[0, 0].numel())
    two = (a2 @ b2).reshape(b, d, *kernel(w))
    parts = {"lokr_w1": one, "lokr_w2_a": a2, "lokr_w2_b": b2, "alpha": torch.tensor(2.0)}
    return parts, 2.0 / R * kron(one, two)


def lokr_both(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    parts, _ = lokr_right(w)
    a1, b1 = rand(2, R, seed=8), rand(R, 4, seed=9)
    del parts["lokr_w1"]
    two = (parts["lokr_w2_a"] @ parts["lokr_w2_b"]).reshape(w.shape[0] // 2, w.shape[1] // 4, *kernel(w))
    return {**parts, "lokr_w1_a": a1, "lokr_w1_b": b1}, 2.0 / R * kron(a1 @ b1, two)


def lokr_tucker(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    core, a2, b2 = rand(R, R, *kernel(w)), rand(R, w.shape[0] // 2), rand(R, w.shape[1] // 4)
    one = rand(2, 4)
    parts = {"lokr_w1": one, "lokr_t2": core, "lokr_w2_a": a2, "lokr_w2_b": b2, "alpha": torch.tensor(2.0)}
    return parts, 2.0 / R * kron(one, by_entries(core, a2, b2))


def full(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    difference = rand(*w.shape)
    return {"diff": difference}, difference


KINDS = {
    "LoCon, Tucker": (lora_tucker, (LARGE, STRIDED)),
    "LoHa": (loha, (LINEAR, SMALL, LARGE, STRIDED)),
    "LoHa, Tucker": (loha_tucker, (LARGE, STRIDED)),
    "LoKr, whole": (lokr_whole, (LINEAR, SMALL, LARGE)),
    "LoKr, right in factors": (lokr_right, (LINEAR, SMALL, LARGE)),
    "LoKr, both in factors": (lokr_both, (LINEAR, LARGE)),
    "LoKr, Tucker": (lokr_tucker, (LARGE, STRIDED)),
    "full": (full, (LINEAR, SMALL, LARGE)),
}


def raw(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def answer(net: UNet) -> Tensor:
    return unet_answer(net.float()).double()


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula(tmp_path: Path, kind: str) -> None:
    make, names = KINDS[kind]
    net = tiny_unet().double()
    tensors, expected = {}, {}
    for name in names:
        weight = net.get_parameter(f"{name}.weight").detach()
        parts, delta = make(weight)
        tensors |= {f"{raw(name)}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        expected[name] = weight + 0.7 * delta
    adapter = read_adapter(written(tmp_path / "a.safetensors", tensors))
    before = snapshot(net)
    host = AdapterHost(net)
    host.apply([(adapter, 0.7)])
    for name, wanted in expected.items():
        assert_near(f"{kind}, {name}", net.get_parameter(f"{name}.weight"), wanted, 1e-12)
    net.float()
    merged = unet_answer(net)
    host.apply([(adapter, 0.7)], live=True)
    assert_near(f"{kind}, live", unet_answer(net), merged)
    host.apply([])
    net.double()
    assert all(
        torch.equal(p.float(), numbers.float()) for p, (_, _, numbers, _) in zip(net.parameters(), before, strict=True)
    )


def test_biases_and_norms(tmp_path: Path) -> None:
    net = tiny_unet()
    norm, conv = "mid_block.resnets.0.norm1", "mid_block.resnets.0.conv1"
    tensors = {
        f"{raw(norm)}.w_norm": rand(32).float(),
        f"{raw(norm)}.b_norm": rand(32, seed=1).float(),
        f"{raw(conv)}.diff": rand(32, 32, 3, 3).float(),
        f"{raw(conv)}.diff_b": rand(32, seed=2).float(),
        f"{raw(LINEAR)}.diff": rand(16, 24).float(),
        f"{raw(LINEAR)}.diff_b": rand(16, seed=3).float(),  # a layer that has no bias of its own
    }
    adapter = read_adapter(written(tmp_path / "a.safetensors", tensors))
    before, keys = snapshot(net), set(net.state_dict())
    host = AdapterHost(net)
    answers = []
    wanted = net.get_parameter(f"{norm}.weight").detach() + 0.5 * tensors[f"{raw(norm)}.w_norm"]
    for live in (False, True):
        host.apply([(adapter, 0.5)], live)
        assert_near("norm", net.get_parameter(f"{norm}.weight"), wanted, 1e-7)
        assert_near("new bias", net.get_submodule(LINEAR).bias, 0.5 * tensors[f"{raw(LINEAR)}.diff_b"], 1e-7)
        answers.append(unet_answer(net))
    assert_near("merged and live", answers[1], answers[0])
    host.apply([])
    assert_untouched(before, net)
    assert set(net.state_dict()) == keys and net.get_submodule(LINEAR).bias is None


def decomposed(weight: Tensor, delta: Tensor, lengths: Tensor, kept: int) -> Tensor:
    """DoRA in words: each row (kept 0) or column (kept 1) of weight + delta, brought to its length."""
    target = (weight + delta).transpose(0, kept)
    rows = [length * row / row.square().sum().sqrt() for row, length in zip(target, lengths, strict=True)]
    return torch.stack(rows).transpose(0, kept)


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("make", [lokr_right, loha, None])
def test_dora_of_any_kind_by_rows_or_columns(tmp_path: Path, kept: int, make: object) -> None:
    net = tiny_unet().double()
    tensors, expected = {}, {}
    for name in (LINEAR, LARGE):
        weight = net.get_parameter(f"{name}.weight").detach()
        if callable(make):
            parts, delta = make(weight)
        else:
            down, up = (t.double() for t in factors(net.get_submodule(name), R, 0))  # type: ignore[arg-type]
            parts = {"lora_down.weight": down, "lora_up.weight": up}
            delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        lengths = 1 + rand(weight.shape[kept]).abs()
        shape = [1] * weight.ndim
        shape[kept] = len(lengths)
        tensors |= {f"{raw(name)}.{part}": tensor for part, tensor in parts.items()}
        tensors[f"{raw(name)}.dora_scale"] = lengths.reshape(shape)
        # a strength other than 1 goes part of the way
        expected[name] = weight + 0.6 * (decomposed(weight, delta, lengths, kept) - weight)
    adapter = read_adapter(written(tmp_path / "a.safetensors", tensors))
    host = AdapterHost(net)
    host.apply([(adapter, 0.6)])
    for name, wanted in expected.items():
        assert_near(name, net.get_parameter(f"{name}.weight"), wanted, 1e-12)
    net.float()
    merged = unet_answer(net)
    host.apply([(adapter, 0.6)], live=True)
    assert_near("live", unet_answer(net), merged)


def test_several_differences_are_taken_from_the_untouched_weights(tmp_path: Path) -> None:
    net = tiny_unet().double()
    weight = net.get_parameter(f"{LINEAR}.weight").detach().clone()
    lengths = 1 + rand(16).abs()
    parts, delta = loha(weight)
    named = {f"{raw(LINEAR)}.{part}": tensor for part, tensor in parts.items()}
    dora = read_adapter(written(tmp_path / "a.safetensors", named | {f"{raw(LINEAR)}.dora_scale": lengths[:, None]}))
    plain = read_adapter(written(tmp_path / "b.safetensors", named))
    wanted = decomposed(weight, delta, lengths, 0) + delta
    for order in ([(dora, 1.0), (plain, 1.0)], [(plain, 1.0), (dora, 1.0)]):
        host = AdapterHost(net)
        host.apply(order)
        assert_near("sum", net.get_parameter(f"{LINEAR}.weight"), wanted, 1e-12)
        host.apply([])


def test_lengths_and_cores_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    net = tiny_unet()
    weight = net.get_parameter(f"{LARGE}.weight").detach()
    host = AdapterHost(net)
    for make, part, wrong, message in (
        (loha, "dora_scale", torch.ones(5, 1), "5 DoRA lengths instead of 32"),
        (loha, "hada_w2_a", torch.ones(32, 2), "hada_w2_a and hada_w2_b have different ranks, 2 and 3"),
        (loha, "hada_w2_a", torch.ones(16, R), "its two matrices are 32x144 and 16x144"),
        (loha_tucker, "hada_t1", torch.ones(R, 2, 3, 3), "hada_w1_b and hada_t1 have different ranks, 3 and 2"),
        (loha_tucker, "hada_t2", torch.ones(R, R), "expected 3 axes"),
        (lokr_tucker, "lokr_t2", torch.ones(2, R, 3, 3), "lokr_w2_a and lokr_t2 have different ranks, 3 and 2"),
        (lokr_whole, "lokr_w1", torch.ones(3, 2), "24x144 instead of 32x144"),
        (lora_tucker, "lora_mid.weight", torch.ones(R, 2, 3, 3), "down and mid have different ranks, 3 and 2"),
        (full, "diff", torch.ones(32, 16), "32x16 instead of 32x144"),
        (full, "diff_b", torch.ones(31), "bias of 31 instead of 32"),
    ):
        parts, _ = make(weight)
        tensors = {f"{raw(LARGE)}.{key}": tensor for key, tensor in {**parts, part: wrong}.items()}
        before = snapshot(net)
        with pytest.raises(ValueError, match="a.safetensors.*" + message):
            host.apply([(read_adapter(written(tmp_path / "a.safetensors", tensors)), 1.0)])
        assert_untouched(before, net)


def test_a_row_of_zeros_stays_one(tmp_path: Path) -> None:
    tower = tiny_tower()
    name, part = next(layers(tower, "q_proj"))
    with torch.no_grad():
        part.weight[0] = 0
    down, up = factors(part, R, 0)
    up[0] = 0
    key = "lora_te_" + name.replace(".", "_")
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.dora_scale": torch.ones(24, 1)}
    AdapterHost(nn.Identity(), tower).apply([(read_adapter(written(tmp_path / "a.safetensors", tensors)), 1.0)])
    assert torch.isfinite(part.weight).all() and not part.weight[0].any()
