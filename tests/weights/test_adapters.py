"""Adapters on a model: what is read, what fits, and that nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.cond import Cond
from sfumato.models.clip import CLIPTextModel
from sfumato.models.unet import UNet
from sfumato.weights.adapters import Adapter, AdapterHost, read_adapter
from sfumato.weights.compvis import unet_modules

from .adapters_made import (
    assert_near,
    assert_untouched,
    factors,
    kohya,
    layers,
    peft,
    snapshot,
    tiny_tower,
    tiny_unet,
    tower_answer,
    unet_answer,
    written,
)

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture
def unet() -> UNet:
    return tiny_unet()


@pytest.fixture
def tower() -> CLIPTextModel:
    return tiny_tower()


def delta(part: torch.nn.Linear | torch.nn.Conv2d, rank: int, seed: int) -> Tensor:
    down, up = factors(part, rank, seed)
    return (up.flatten(1) @ down.flatten(1)).reshape(part.weight.shape)


def both(path: Path, unet: UNet, tower: CLIPTextModel) -> Path:
    return written(path, kohya("lora_unet_", unet) | kohya("lora_te_", tower))


@pytest.mark.parametrize("live", [False, True])
def test_taking_off_leaves_no_residue(tmp_path: Path, unet: UNet, tower: CLIPTextModel, live: bool) -> None:
    adapter = read_adapter(both(tmp_path / "a.safetensors", unet, tower))
    before, plain = snapshot(unet, tower), unet_answer(unet)
    host = AdapterHost(unet, tower)
    for strength in (0.8, -1.5):
        host.apply([(adapter, strength)], live)
        assert host.applied == (("a", strength),) and host.live == live
        assert float((unet_answer(unet) - plain).abs().max()) > 0.01
    host.apply([])
    assert host.applied == ()
    assert_untouched(before, unet, tower)
    assert torch.equal(unet_answer(unet), plain)


def test_live_touches_no_weight_and_says_the_same(tmp_path: Path, unet: UNet, tower: CLIPTextModel) -> None:
    adapter = read_adapter(both(tmp_path / "a.safetensors", unet, tower))
    weights = snapshot(unet, tower)
    host = AdapterHost(unet, tower)
    host.apply([(adapter, 0.7), (adapter, 0.2)], live=True)
    assert [p.data_ptr() for m in (unet, tower) for p in m.parameters()] == [row[1] for row in weights]
    live = unet_answer(unet), tower_answer(tower)
    host.apply([(adapter, 0.9)])
    assert sum(len(part._forward_hooks) for m in (unet, tower) for part in m.modules()) == 0
    assert_near("U-Net, merged and live", unet_answer(unet), live[0])
    assert_near("text tower, merged and live", tower_answer(tower), live[1])


def test_the_weights_are_the_formula(tmp_path: Path, unet: UNet) -> None:
    path = written(tmp_path / "a.safetensors", kohya("lora_unet_", unet, *ATTENTION, "conv1", "proj_in", alpha=2.0))
    chosen = list(layers(unet, *ATTENTION, "conv1", "proj_in"))
    expected = [part.weight + 0.5 * (2.0 / 4) * delta(part, 4, i) for i, (_, part) in enumerate(chosen)]
    AdapterHost(unet).apply([(read_adapter(path), 0.5)])
    for (name, part), wanted in zip(chosen, expected, strict=True):
        assert_near(name, part.weight, wanted, 1e-6)


def processor(name: str) -> str:
    return name.removesuffix(".0").replace(".to_", ".processor.to_")


def joined(name: str) -> str:
    return name.replace(".", "_")


# How a module is spelled, and how the names of its two factors end.
STYLES: dict[str, tuple[Callable[[str], str], str, str]] = {
    "diffusers": (lambda n: f"unet.{n}", ".lora_A.weight", ".lora_B.weight"),
    "diffusers before PEFT": (lambda n: f"unet.{n}", ".lora.down.weight", ".lora.up.weight"),
    "processors": (lambda n: f"unet.{processor(n)}", "_lora.down.weight", "_lora.up.weight"),
    "processors, no prefix": (processor, "_lora.down.weight", "_lora.up.weight"),
    "PEFT": (lambda n: f"base_model.model.{n}", ".lora_A.weight", ".lora_B.weight"),
    "PEFT in memory": (lambda n: f"base_model.model.{n}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "kohya": (lambda n: f"lora_unet_{joined(n)}", ".lora_down.weight", ".lora_up.weight"),
    "LyCORIS' wrapper": (lambda n: f"lycoris_{joined(n)}", ".lora_down.weight", ".lora_up.weight"),
    "CompVis": (lambda n: f"diffusion_model.{THEIRS[n]}", ".lora_down.weight", ".lora_up.weight"),
    "kohya on CompVis": (lambda n: f"lora_unet_{joined(THEIRS[n])}", ".lora_down.weight", ".lora_up.weight"),
}
THEIRS = unet_modules(tiny_unet().config)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_names_is_the_same_adapter(tmp_path: Path, unet: UNet, style: str) -> None:
    spell, down_ends, up_ends = STYLES[style]
    tensors = {}
    for seed, (name, part) in enumerate(layers(unet, *ATTENTION)):
        down, up = factors(part, 4, seed)
        tensors |= {spell(name) + down_ends: down, spell(name) + up_ends: up}
    adapter = read_adapter(written(tmp_path / "a.safetensors", tensors))
    expected = [part.weight + delta(part, 4, i) for i, (_, part) in enumerate(layers(unet, *ATTENTION))]
    AdapterHost(unet).apply([(adapter, 1.0)])
    for (name, part), wanted in zip(layers(unet, *ATTENTION), expected, strict=True):
        assert_near(name, part.weight, wanted, 1e-6)


TEXT_STYLES: dict[str, tuple[Callable[[str], str], str, str]] = {
    "diffusers": (lambda n: f"text_encoder.{n}", ".lora_A.weight", ".lora_B.weight"),
    "diffusers, recent transformers": (
        lambda n: f"text_encoder.{n.removeprefix('text_model.')}",
        ".lora_A.weight",
        ".lora_B.weight",
    ),
    "diffusers before PEFT": (
        lambda n: f"text_encoder.{n}",
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
    ),
    "processors": (
        lambda n: f"text_encoder.{n.replace('out_proj', 'to_out').replace('q_proj', 'to_q').replace('v_proj', 'to_v')}",
        "_lora.down.weight",
        "_lora.up.weight",
    ),
    "kohya": (lambda n: f"lora_te_{joined(n)}", ".lora_down.weight", ".lora_up.weight"),
    "kohya, SDXL's way": (lambda n: f"lora_te1_{joined(n)}", ".lora_down.weight", ".lora_up.weight"),
}


@pytest.mark.parametrize("style", TEXT_STYLES)
def test_every_style_of_names_on_the_text_tower(tmp_path: Path, unet: UNet, tower: CLIPTextModel, style: str) -> None:
    spell, down_ends, up_ends = TEXT_STYLES[style]
    chosen = list(layers(tower, "q_proj", "v_proj", "out_proj"))
    tensors = {}
    for seed, (name, part) in enumerate(chosen):
        down, up = factors(part, 4, seed)
        tensors |= {spell(name) + down_ends: down, spell(name) + up_ends: up}
    adapter = read_adapter(written(tmp_path / "a.safetensors", tensors))
    expected = [part.weight + delta(part, 4, i) for i, (_, part) in enumerate(chosen)]
    AdapterHost(unet, tower).apply([(adapter, 1.0)])
    for (name, part), wanted in zip(chosen, expected, strict=True):
        assert_near(name, part.weight, wanted, 1e-6)


def test_one_by_one_convolutions_may_be_written_as_matrices(tmp_path: Path, unet: UNet) -> None:
    tensors = kohya("lora_unet_", unet, "proj_in")
    flat = {name: t.flatten(1) if t.ndim == 4 else t for name, t in tensors.items()}
    answers = []
    for i, content in enumerate((tensors, flat)):
        host = AdapterHost(unet)
        adapter = read_adapter(written(tmp_path / f"{i}.safetensors", content))
        for live in (False, True):
            host.apply([(adapter, 1.0)], live)
            answers.append(unet_answer(unet))
        host.apply([])
    for other in answers[1:]:
        assert_near("proj_in", other, answers[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_full_and_rounded_once(tmp_path: Path, unet: UNet, dtype: torch.dtype) -> None:
    adapters = [
        read_adapter(written(tmp_path / "a.safetensors", kohya("lora_unet_", unet, *ATTENTION))),
        read_adapter(written(tmp_path / "b.safetensors", peft("unet.", unet, *ATTENTION))),
    ]
    unet = unet.to(dtype)
    before = snapshot(unet)
    expected = [
        (part.weight.float() + 0.3 * 0.5 * delta(part, 4, i) - 0.6 * delta(part, 4, 100 + i)).to(dtype)
        for i, (_, part) in enumerate(layers(unet, *ATTENTION))
    ]
    host = AdapterHost(unet)
    host.apply([(adapters[0], 0.3), (adapters[1], -0.6)])
    for (name, part), wanted in zip(layers(unet, *ATTENTION), expected, strict=True):
        off = (part.weight != wanted).float().mean().item()
        assert part.weight.dtype == dtype and off < 0.01, f"{name}: {off:.2%} of the numbers are rounded otherwise"
    host.apply([])
    assert_untouched(before, unet)


def test_memory_layout_and_gradients_are_kept(tmp_path: Path, unet: UNet) -> None:
    unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    unet.requires_grad_(False)
    AdapterHost(unet).apply([(read_adapter(written(tmp_path / "a.safetensors", kohya("lora_unet_", unet))), 1.0)])
    for _, part in layers(unet):
        assert not part.weight.requires_grad
        assert part.weight.ndim == 2 or part.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_shared_weight_changes_where_it_is_asked_for(tmp_path: Path, unet: UNet) -> None:
    one = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    one.to_k.weight = one.to_q.weight  # type: ignore[union-attr]
    before = one.to_k.weight.detach().clone()  # type: ignore[union-attr, operator]
    host = AdapterHost(unet)
    path = written(
        tmp_path / "a.safetensors", kohya("lora_unet_", unet, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    )
    host.apply([(read_adapter(path), 1.0)])
    assert torch.equal(one.to_k.weight, before) and not torch.equal(one.to_q.weight, before)  # type: ignore
    host.apply([])
    assert one.to_q.weight is one.to_k.weight  # type: ignore[union-attr]


def test_a_model_that_is_moved_meanwhile_comes_back_where_it_is(tmp_path: Path, unet: UNet) -> None:
    adapter = read_adapter(written(tmp_path / "a.safetensors", kohya("lora_unet_", unet)))
    plain = unet_answer(unet).double()
    host = AdapterHost(unet)
    for live in (False, True):
        host.apply([(adapter, 1.0)], live)
        unet.double()
        unet(torch.zeros(1, 4, 8, 8).double(), 3.0, cond_of(unet))
        host.apply([])
        assert all(p.dtype == torch.float64 for p in unet.parameters())
    unet.float()
    assert_near("after moving", unet_answer(unet).double(), plain)


def cond_of(unet: UNet) -> Cond:
    return Cond(context=torch.zeros(1, 2, unet.config.cross_attention_dim).double())


def test_what_does_not_fit_is_listed_and_nothing_is_applied(tmp_path: Path, unet: UNet, tower: CLIPTextModel) -> None:
    good = read_adapter(both(tmp_path / "good.safetensors", unet, tower))
    content = kohya("lora_unet_", unet, "to_q") | kohya("lora_te2_", tower, "q_proj")
    bad = read_adapter(written(tmp_path / "bad.safetensors", content))
    host = AdapterHost(unet, tower)
    before = snapshot(unet, tower)
    with pytest.raises(
        ValueError, match=r"bad.safetensors: 8 of 10 modules fit .*SDXL; 2 match no module: lora_te2_text"
    ):
        host.apply([(good, 1.0), (bad, 1.0)])
    assert_untouched(before, unet, tower)
    host.apply([(good, 1.0)])
    answer = unet_answer(unet)
    with pytest.raises(ValueError, match="bad"):
        host.apply([(bad, 1.0)])
    assert host.applied == (("good", 1.0),) and torch.equal(unet_answer(unet), answer)
    with pytest.raises(ValueError, match="no text encoder was given"):
        AdapterHost(unet).apply([(good, 1.0)])


def test_an_adapter_for_another_width_says_for_which_family(tmp_path: Path, unet: UNet) -> None:
    name, part = next(layers(unet, "attn2.to_k"))
    raw = f"lora_unet_{joined(name)}"
    down, up = torch.ones(4, 1024), torch.ones(part.weight.shape[0], 4)
    content = {f"{raw}.lora_down.weight": down, f"{raw}.lora_up.weight": up}
    adapter = read_adapter(written(tmp_path / "a.safetensors", content))
    with pytest.raises(
        ValueError, match=r"0 of 1 modules fit.*Stable Diffusion 2; 1 have another shape: .* 16x1024 instead of 16x24"
    ):
        AdapterHost(unet).apply([(adapter, 1.0)])


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = read_adapter(written(tmp_path / "a.safetensors", kohya("lora_unet_", unet)))
    before = snapshot(unet)
    host = AdapterHost(unet)
    real, calls = host._swap, 0

    def failing(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise MemoryError
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(host, "_swap", failing)
    with pytest.raises(MemoryError):
        host.apply([(adapter, 1.0)])
    assert host.applied == ()
    assert_untouched(before, unet)


def test_asking_again_does_nothing(tmp_path: Path, unet: UNet) -> None:
    adapter = read_adapter(written(tmp_path / "a.safetensors", kohya("lora_unet_", unet, "to_q")))
    host = AdapterHost(unet)
    host.apply([(adapter, 0.5)])
    placed = [p for p in unet.parameters()]
    host.apply([(adapter, 0.5)])
    assert all(p is q for p, q in zip(placed, unet.parameters(), strict=True))
    with pytest.raises(ValueError, match="finite"):
        host.apply([(adapter, float("nan"))])


def test_strength_nought_is_no_change(tmp_path: Path, unet: UNet) -> None:
    adapter = read_adapter(written(tmp_path / "a.safetensors", kohya("lora_unet_", unet)))
    before = snapshot(unet)
    AdapterHost(unet).apply([(adapter, 0.0)])
    assert_untouched(before, unet)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 16, "lora_alpha": 8, "rank_pattern": {"to_q": 4}, "alpha_pattern": {"attn1.to_q": 3, "to_q": 6}}, None),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
    ],
)
def test_settings_beside_the_tensors_are_read(
    tmp_path: Path, unet: UNet, settings: dict[str, object], scale: float | None
) -> None:
    def scales(adapter: Adapter) -> set[float]:
        return {change.delta.scale for change in adapter.changes.values()}  # type: ignore[union-attr]

    wanted = {0.75, 1.5} if scale is None else {scale}
    raw = json.dumps({f"unet.{key}": value for key, value in settings.items()})
    path = written(tmp_path / "a.safetensors", peft("unet.", unet, "to_q"), {"lora_adapter_metadata": raw})
    assert scales(read_adapter(path)) == wanted
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    written(tmp_path / "adapter_model.safetensors", peft("base_model.model.", unet, "to_q"))
    assert scales(read_adapter(tmp_path)) == wanted
    assert scales(read_adapter(written(tmp_path / "b.safetensors", peft("unet.", unet, "to_q")))) == {1.0}


def test_pickles_are_read_as_well(tmp_path: Path, unet: UNet) -> None:
    tensors = kohya("lora_unet_", unet, "to_q")
    torch.save(tensors, tmp_path / "p.pt")
    one, two = (read_adapter(p) for p in (tmp_path / "p.pt", written(tmp_path / "s.safetensors", tensors)))
    assert one.changes.keys() == two.changes.keys() and one.name == "p"


RAW = "lora_unet_mid_block_attentions_0_proj_in"
BROKEN = {
    "no part of an adapter": (
        {"model.weight": torch.ones(2)},
        "not an adapter that this version reads: of 1 tensors 1",
    ),
    "a kind that is not known": ({f"{RAW}.oft_blocks": torch.ones(2, 2, 2)}, "oft_blocks; known are LoRA"),
    "half a LoRA": ({f"{RAW}.lora_down.weight": torch.ones(2, 2)}, f"{RAW}: has down, but no up"),
    "no rank in common": (
        {f"{RAW}.lora_down.weight": torch.ones(3, 2), f"{RAW}.lora_up.weight": torch.ones(2, 2)},
        "down and up have different ranks, 3 and 2",
    ),
    "alpha alone": ({f"{RAW}.alpha": torch.tensor(1.0)}, "alpha alone make no adapter"),
    "two kinds in one": (
        {f"{RAW}.lora_down.weight": torch.ones(2, 2), f"{RAW}.hada_w1_a": torch.ones(2, 2)},
        "down, hada_w1_a do not belong together",
    ),
    "not a number": (
        {f"{RAW}.lora_down.weight": torch.full((2, 2), torch.nan), f"{RAW}.lora_up.weight": torch.ones(2, 2)},
        "NaN",
    ),
    "a scalar": (
        {f"{RAW}.lora_down.weight": torch.tensor(1.0), f"{RAW}.lora_up.weight": torch.ones(2, 2)},
        "expected 2 axes or more",
    ),
    "an alpha of two": (
        {
            f"{RAW}.alpha": torch.ones(2),
            f"{RAW}.lora_down.weight": torch.ones(2, 2),
            f"{RAW}.lora_up.weight": torch.ones(2, 2),
        },
        "alpha has the shape (2,)",
    ),
    "empty": (
        {f"{RAW}.lora_down.weight": torch.ones(0, 2), f"{RAW}.lora_up.weight": torch.ones(2, 0)},
        "none empty",
    ),
    "twice": (
        {f"{RAW}.lora_down.weight": torch.ones(2, 2), f"{RAW}.lora_A.weight": torch.ones(2, 2)},
        "its part 'down' twice",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    tensors, message = BROKEN[case]
    path = written(tmp_path / "broken.safetensors", tensors)
    with pytest.raises(ValueError, match="broken") as caught:
        read_adapter(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_broken_settings_are_refused(tmp_path: Path, unet: UNet) -> None:
    for raw, message in (
        ("{", "not valid JSON"),
        ('{"unet.r": 0, "unet.lora_alpha": 1}', "ranks are positive"),
        ('{"unet.r": "many"}', "damaged"),
        ('{"unet.r": 4, "unet.alpha_pattern": {"(a+)+$": 1}}', "regular expression"),
        ("[]", "damaged"),
    ):
        path = written(tmp_path / "a.safetensors", peft("unet.", unet, "to_q"), {"lora_adapter_metadata": raw})
        with pytest.raises(ValueError, match=message):
            read_adapter(path)
    with pytest.raises(FileNotFoundError, match="no adapter in it"):
        read_adapter(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone"):
        read_adapter(tmp_path / "gone.safetensors")


def test_two_names_for_one_module(tmp_path: Path, unet: UNet) -> None:
    content = kohya("lora_unet_", unet, "mid_block.attentions.0.proj_in") | peft(
        "unet.", unet, "mid_block.attentions.0.proj_in"
    )
    adapter = read_adapter(written(tmp_path / "a.safetensors", content))
    with pytest.raises(ValueError, match="two names of the same module"):
        AdapterHost(unet).apply([(adapter, 1.0)])


# Parts that fit the layers of `Small`; below, some of them get another shape, or are left out.
FITTING: list[tuple[str, dict[str, tuple[int, ...]]]] = [
    ("linear", {"lora_down.weight": (3, 4), "lora_up.weight": (2, 3), "alpha": (), "dora_scale": (2, 1)}),
    ("linear", {"lora_A.weight": (3, 4), "lora_B.weight": (2, 3), "lora_magnitude_vector": (2,), "lora_B.bias": (2,)}),
    ("linear", {"hada_w1_a": (2, 3), "hada_w1_b": (3, 4), "hada_w2_a": (2, 3), "hada_w2_b": (3, 4), "alpha": ()}),
    ("linear", {"lokr_w1": (2, 2), "lokr_w2_a": (1, 3), "lokr_w2_b": (3, 2), "scalar": (), "dora_scale": (1, 4)}),
    ("linear", {"diff": (2, 4), "diff_b": (2,)}),
    ("norm", {"w_norm": (4,), "b_norm": (4,)}),
    ("conv", {"lora_down.weight": (3, 2, 3, 3), "lora_up.weight": (4, 3, 1, 1), "dora_scale": (1, 2, 1, 1)}),
    ("conv", {"lora_down.weight": (3, 2, 1, 1), "lora_up.weight": (4, 3, 1, 1), "lora_mid.weight": (3, 3, 3, 3)}),
    ("conv", {"hada_w1_a": (3, 4), "hada_w1_b": (3, 2), "hada_w2_a": (3, 4), "hada_w2_b": (3, 2)}
     | {"hada_t1": (3, 3, 3, 3), "hada_t2": (3, 3, 3, 3)}),
    ("conv", {"lokr_w1_a": (2, 3), "lokr_w1_b": (3, 1), "lokr_w2_a": (3, 2), "lokr_w2_b": (3, 2)}
     | {"lokr_t2": (3, 3, 3, 3)}),
    ("conv", {"lokr_w1": (2, 1), "lokr_w2_a": (2, 3), "lokr_w2_b": (3, 18), "alpha": ()}),
]  # fmt: skip
SHAPES = st.lists(st.sampled_from((0, 1, 2, 3, 4, 9)), max_size=4).map(tuple)


@st.composite
def nearly_fitting(draw: st.DrawFn) -> dict[str, tuple[int, ...]]:
    """Names of tensors and their shapes, with up to two faults."""
    layer, parts = draw(st.sampled_from(FITTING))
    shapes = dict(parts)
    for part in draw(st.lists(st.sampled_from(sorted(parts)), max_size=2)):
        shapes[part] = draw(SHAPES)
    for part in draw(st.lists(st.sampled_from(sorted(parts)), max_size=1)):
        del shapes[part]
    layer = draw(st.sampled_from((layer, layer, layer, "linear", "conv", "norm", "gone")))
    return {f"lora_unet_{layer}.{part}": shape for part, shape in shapes.items()}


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)
        self.conv = torch.nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = torch.nn.LayerNorm(4)

    def forward(self) -> Tensor:
        return self.conv(self.linear(self.norm(torch.ones(1, 2, 4, 4))).repeat(1, 1, 1, 2))


@settings(max_examples=120, deadline=None)
@given(shapes=nearly_fitting(), live=st.booleans())
def test_any_shapes_fit_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[int, ...]], live: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    written(path, {name: torch.full(shape, 0.5) for name, shape in shapes.items()})
    net = Small()
    before = snapshot(net)
    host = AdapterHost(net)
    try:
        host.apply([(read_adapter(path), 0.5)], live)
    except ValueError as error:
        assert "\n" not in str(error)
        event("refused")
    else:
        assert net().shape == (1, 4, 4, 4) and torch.isfinite(net()).all()
        event("applied")
    host.apply([])
    assert_untouched(before, net)
