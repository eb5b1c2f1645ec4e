"""What the adapter tests share: random adapters for a tiny model in the layouts of the programs that write them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.cond import Cond
from sfumato.models.clip import CLIPTextConfig, CLIPTextModel
from sfumato.models.unet import UNet, UNetConfig

TOLERANCE = 1e-5  # of the reference's range


def tiny_unet(linear: bool = False) -> UNet:
    """A U-Net with every kind of layer; `linear` has SD 2's projections, otherwise they are convolutions."""
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
        use_linear_projection=linear,
    )
    return UNet(config).eval()


def tiny_tower() -> CLIPTextModel:
    """A text tower of two layers, 24 wide."""
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=540,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=539,
    )
    return CLIPTextModel(config).eval()


def layers(module: nn.Module, *endings: str) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Linear layers and convolutions whose names end so; all of them without endings."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | nn.Conv2d) and name.endswith(endings or ("",)):
            yield name, part


def factors(part: nn.Linear | nn.Conv2d, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random down and up of a LoRA, in the shapes that the layer's own kind has."""
    generator = torch.Generator().manual_seed(seed)
    weight = part.weight
    ones = (1,) * (weight.ndim - 2)
    down = torch.randn((rank, *weight.shape[1:]), generator=generator) / weight[0].numel() ** 0.5
    up = torch.randn((weight.shape[0], rank, *ones), generator=generator) / rank**0.5
    return down, up


def kohya(prefix: str, module: nn.Module, *endings: str, rank: int = 4, alpha: float = 2.0) -> dict[str, Tensor]:
    """A LoRA as kohya's programs write it."""
    tensors = {}
    for seed, (name, part) in enumerate(layers(module, *endings)):
        down, up = factors(part, rank, seed)
        raw = prefix + name.replace(".", "_")
        tensors |= {f"{raw}.lora_down.weight": down, f"{raw}.lora_up.weight": up}
        tensors[f"{raw}.alpha"] = torch.tensor(alpha)
    return tensors


def peft(prefix: str, module: nn.Module, *endings: str, rank: int = 4, start: int = 100) -> dict[str, Tensor]:
    """A LoRA as diffusers and PEFT write it."""
    tensors = {}
    for seed, (name, part) in enumerate(layers(module, *endings), start):
        down, up = factors(part, rank, seed)
        tensors |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
    return tensors


def written(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of these tensors."""
    save_file(dict(tensors), path, metadata=metadata)
    return path


def unet_answer(unet: UNet) -> Tensor:
    """What the network says of a fixed input."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((2, 4, 8, 8), generator=generator)
    context = torch.randn((2, 5, unet.config.cross_attention_dim), generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([3.0, 700.0]), Cond(context=context))


def tower_answer(tower: CLIPTextModel) -> Tensor:
    """The states of a fixed text."""
    ids = torch.arange(2 * 12).reshape(2, 12) * 7 % tower.config.vocab_size
    with torch.no_grad():
        return tower(ids).last_hidden_state


def snapshot(*modules: nn.Module) -> list[tuple[nn.Parameter, int, Tensor, int]]:
    """Each parameter with its address and a copy of its numbers, and the number of hooks of each module."""
    hooks = sum(len(part._forward_hooks) for module in modules for part in module.modules())
    return [(p, p.data_ptr(), p.detach().clone(), hooks) for module in modules for p in module.parameters()]


def assert_untouched(before: Iterable[tuple[nn.Parameter, int, Tensor, int]], *modules: nn.Module) -> None:
    """The same parameters, at the same addresses, with the same numbers, and no hooks."""
    after = snapshot(*modules)
    for (p, address, numbers, hooks), (q, address_now, numbers_now, hooks_now) in zip(before, after, strict=True):
        assert p is q and address == address_now and hooks == hooks_now == 0
        assert numbers.dtype == numbers_now.dtype and torch.equal(numbers, numbers_now)


def assert_near(what: str, ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    """Largest absolute difference relative to the reference's range, printed."""
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    span = float(theirs.max() - theirs.min())
    difference = float((ours - theirs).abs().max()) / span
    print(f"{what}: largest difference {difference:.2e} of the range {span:.3g}")
    assert difference <= tolerance, f"{what}: {difference:.2e}"
