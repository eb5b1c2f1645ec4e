"""Networks too large to be held twice, at full size beside those of diffusers and transformers.

A layer has its weights while it is called and no longer, so that a network of any size takes the memory of its largest
layer. The numbers are those that its name says, rounded to bfloat16: they are the same in both programs, in bfloat16
and in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from zlib import crc32

import torch
from full_size import BY_NAME, machine, scaled
from torch import Tensor, nn

from sfumato.cond import Cond
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.mmdit import MMDiTConfig
from sfumato.models.t5 import T5Config
from sfumato.models.unet import UNetConfig
from sfumato.weights.parts import NETWORKS, network

LARGE: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "sdxl": ("sdxl", ("denoiser", "text", "text_2")),
    "sdxl-inpaint": ("sdxl-inpaint", ("denoiser",)),
    "sdxl-refiner": ("sdxl-refiner", ("denoiser",)),
    "sd3-medium": ("sd3-medium", ("denoiser",)),
    "sd35-medium": ("sd35-medium", ("denoiser",)),
    "sd35-large": ("sd35-large", ("denoiser",)),
    "t5-xxl": ("sd3-medium", ("text_3",)),
}
"""What is compared by name: the preset and its networks; those that come up elsewhere are left out."""
DEFAULT = ("sdxl", "sd3-medium", "t5-xxl")
TITLES = {"text": "text tower", "text_2": "second text tower", "text_3": "T5"}
SIDE, TOKENS = 16, 77  # of a latent picture, and of a prompt
EXACT, ROUNDED = 1e-4, 0.05  # the bounds in float32 and in bfloat16, shares of the range
PERIOD, SMALL = 2**24 - 3, 2**18
WIDE, HALF = torch.float32, torch.bfloat16
Add = Callable[[str, str, float, Callable[[], tuple[float, str]]], None]


def relative(ours: Tensor, theirs: Tensor) -> tuple[float, str]:
    """The largest absolute difference by the range of theirs."""
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes differ: {tuple(ours.shape)} and {tuple(theirs.shape)}")
    spread = float(theirs.max() - theirs.min())
    return float((ours.float() - theirs.float()).abs().max()) / spread, f"range {spread:.3g}"


class Numbers:
    """Normal random numbers by name: each tensor is a stretch of one long row that begins where its name says."""

    def __init__(self) -> None:
        self._row = torch.randn(PERIOD, generator=torch.Generator().manual_seed(0))

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        """The values of a parameter, float32 that bfloat16 has as well."""
        name = name.removeprefix("text_model.").replace("encoder.embed_tokens.", "shared.")
        count, begin = shape.numel(), crc32(name.encode()) % PERIOD
        values = torch.empty(count, dtype=HALF)
        scale, shift = scaled(name, shape)
        done = 0
        while done < count:
            part = self._row[begin : begin + count - done]
            values[done : done + len(part)] = part * scale + shift
            done, begin = done + len(part), 0
        return values.view(shape).float()


class Fleeting:
    """A layer's own large parameters, there while it is called; small ones are held."""

    def __init__(self, path: str, layer: nn.Module, numbers: Numbers, dtype: torch.dtype) -> None:
        self._path, self._numbers, self._dtype = path, numbers, dtype
        shapes = {name: p.shape for name, p in layer._parameters.items() if p is not None}
        self._large = {name: shape for name, shape in shapes.items() if shape.numel() >= SMALL}
        self._place(layer, {name: shape for name, shape in shapes.items() if shape.numel() < SMALL})
        if self._large:
            self._leave(layer)
            layer.register_forward_pre_hook(lambda layer, args: self._place(layer, self._large))
            layer.register_forward_hook(lambda layer, args, out: self._leave(layer))

    def _place(self, layer: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
        for name, shape in shapes.items():
            values = self._numbers(f"{self._path}.{name}", shape)
            layer._parameters[name] = nn.Parameter(values.to(self._dtype), requires_grad=False)

    def _leave(self, layer: nn.Module) -> None:
        for name, shape in self._large.items():
            nothing = torch.zeros((), dtype=self._dtype).expand(shape)  # its shape and dtype, no memory
            layer._parameters[name] = nn.Parameter(nothing, requires_grad=False)


def fleeting(make: Callable[[Any], nn.Module], config: Any, numbers: Numbers, dtype: torch.dtype) -> Any:
    """A network of this configuration with such layers; tables that are no parameters are held."""
    with torch.device("meta"):
        net = make(config).eval()
    tables = {name: buffer for name, buffer in net.named_buffers() if buffer.is_meta}
    if tables:
        one: dict[str, Any] = {"num_hidden_layers" if isinstance(config, CLIPTextConfig) else "num_layers": 1}
        if isinstance(config, MMDiTConfig):
            one["dual_attention_layers"] = ()
        for name, buffer in make(replace(config, **one)).named_buffers():
            path, _, leaf = name.rpartition(".")
            net.get_submodule(path)._buffers[leaf] = buffer.to(dtype) if buffer.is_floating_point() else buffer
    for path, layer in net.named_modules():
        Fleeting(path, layer, numbers, dtype)
    return net


def peer(config: Any) -> nn.Module:
    """The network of diffusers or transformers for one of our configurations."""
    import diffusers
    import transformers

    raw = {name: value for name, value in config.to_dict().items() if name not in ("_class_name", "architectures")}
    if isinstance(config, UNetConfig):
        return diffusers.UNet2DConditionModel.from_config(raw)
    if isinstance(config, MMDiTConfig):
        return diffusers.SD3Transformer2DModel.from_config(raw)
    if isinstance(config, T5Config):
        known = {name: value for name, value in raw.items() if name not in ("is_gated_act", "dense_act_fn")}
        return transformers.T5EncoderModel(transformers.T5Config(**known))
    kind = transformers.CLIPTextModelWithProjection if config.projected else transformers.CLIPTextModel
    return kind(transformers.CLIPTextConfig(**raw))


Outputs = Mapping[str, Tensor]
Question = tuple[Callable[[Any], Outputs], Callable[[Any], Outputs]]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def denoising(config: Any, dtype: torch.dtype) -> Question:
    """How ours and theirs are asked for one step."""
    x = drawn(1, config.in_channels, SIDE, SIDE, seed=1).to(dtype)
    t = torch.tensor([601.0])
    if isinstance(config, MMDiTConfig):
        context = drawn(1, TOKENS, config.joint_attention_dim, seed=2).to(dtype)
        pooled = drawn(1, config.pooled_projection_dim, seed=3).to(dtype)
        told = {"encoder_hidden_states": context, "pooled_projections": pooled}
        return (
            lambda net: {"": net(x, t, Cond(context, pooled))},
            lambda net: {"": net(x, timestep=t, **told).sample},
        )
    context = drawn(1, TOKENS, config.cross_attention_dim, seed=2).to(dtype)
    sizes = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]])
    lifted = config.projection_class_embeddings_input_dim
    count = 5 if lifted == 2560 else 6  # the refiner has a score in place of two sizes
    text = drawn(1, lifted - count * config.addition_time_embed_dim, seed=3).to(dtype)
    sizes = sizes[:, :count]
    added = {"text_embeds": text, "time_ids": sizes}
    return (
        lambda net: {"": net(x, t, Cond(context, torch.cat([text.float(), sizes], dim=1)))},
        lambda net: {"": net(x, t, encoder_hidden_states=context, added_cond_kwargs=added).sample},
    )


def reading(config: Any) -> Question:
    """How ours and theirs are asked for a prompt: the states that are read, and the projected vector."""
    ids = torch.randint(1000, config.vocab_size - 2, (1, TOKENS), generator=torch.Generator().manual_seed(4))

    def states(net: Any) -> Outputs:
        if not isinstance(config, CLIPTextConfig):
            return {"states": net(ids)[0]}
        out = net(ids, output_hidden_states=True)
        found = {"states": out.hidden_states[-2]}
        return found | ({"projected": out.text_embeds} if config.projected else {})

    return states, states


def worst(ours: Outputs, theirs: Outputs) -> tuple[float, str]:
    """The largest of the relative differences, and the ranges."""
    found = {name: relative(value, theirs[name]) for name, value in ours.items()}
    note = ", ".join(f"{name} {about}".strip() for name, (_, about) in found.items())
    return max(value for value, _ in found.values()), note


@torch.inference_mode()
def compare(add: Add, title: str, config: Any, numbers: Numbers) -> None:
    """One network in float32 and in bfloat16 beside its peer's, which in float32 is the measure of all."""

    def answers(make: Callable[[Any], nn.Module], which: int, dtype: torch.dtype) -> Outputs:
        ask = denoising(config, dtype) if isinstance(config, UNetConfig | MMDiTConfig) else reading(config)
        return ask[which](fleeting(make, config, numbers, dtype))

    exact: dict[str, Outputs] = {}
    half: dict[str, Outputs] = {}
    size = sum(p.numel() for p in network(config).parameters())

    def in_float32() -> tuple[float, str]:
        exact.update(ours=answers(NETWORKS[type(config)], 0, WIDE), theirs=answers(peer, 1, WIDE))
        value, note = worst(exact["ours"], exact["theirs"])
        return value, f"{size:,} parameters, {note}"

    def in_bfloat16() -> tuple[float, str]:
        half.update(ours=answers(NETWORKS[type(config)], 0, HALF), theirs=answers(peer, 1, HALF))
        return worst(half["ours"], half["theirs"])

    def against_float32() -> tuple[float, str]:
        own, others = (worst(half[name], exact["theirs"])[0] for name in ("ours", "theirs"))
        return own, f"the peer's own {others:.2g}"

    add(f"{title}, float32", "of range", EXACT, in_float32)
    add(f"{title}, bfloat16", "of range", ROUNDED, in_bfloat16)
    add(f"{title}, bfloat16 from float32", "of range", ROUNDED, against_float32)


def compare_large(add: Add, name: str) -> dict[str, Any]:
    """All networks under one name of LARGE; gives the settings."""
    (preset, parts), numbers = LARGE[name], Numbers()
    for part in parts:
        config = getattr(BY_NAME[preset], part)
        title = TITLES.get(part) or ("U-Net" if isinstance(config, UNetConfig) else "transformer")
        compare(add, title, config, numbers)
    return {"latent": SIDE, "tokens": TOKENS, **machine()}
