from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import sfumato
from sfumato.cond import Cond, Converted
from sfumato.models.layers import GEGLU, Attention
from sfumato.models.unet import UNet
from sfumato.pipelines.pipeline import Pipeline
from sfumato.prepare import WAYS, prepare
from sfumato.prepare.tokens import Gated

BOUND = 1e-5  # of the output's range


def asked(net: UNet, same_time: bool = True) -> Tensor:
    """What a network says to two pictures."""
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(size, generator=generator).to(net.dtype) for size in ((2, 4, 8, 8), (2, 7, 32)))
    with torch.inference_mode():
        return net(x, torch.tensor([400.0, 400.0 if same_time else 20.0]), Cond(context)).float()


def difference(a: Tensor, b: Tensor) -> float:
    """The largest, of the range of b."""
    return float((a - b).abs().max() / (b.max() - b.min()))


@pytest.mark.parametrize("same_time", [True, False])
@pytest.mark.parametrize("name", [*WAYS, "all"])
def test_a_prepared_network_says_the_same(tiny_pipe: Pipeline, name: str, same_time: bool) -> None:
    net = tiny_pipe.unet.to(memory_format=torch.channels_last)
    keys, plain = list(net.state_dict()), asked(net, same_time)
    undo = prepare(net, None if name == "all" else [name])
    assert sum(len({"forward", "_time"} & module.__dict__.keys()) for module in net.modules()) > 0
    for _ in range(2):
        found = difference(asked(net, same_time), plain)
        print(f"{name}: {found:.1e}")
        assert found < BOUND
    assert list(net.state_dict()) == keys and list(copy.deepcopy(net).state_dict()) == keys
    assert difference(asked(pickle.loads(pickle.dumps(net)), same_time), plain) < BOUND
    undo()
    assert not any("forward" in module.__dict__ for module in net.modules())
    assert torch.equal(asked(net, same_time), plain)


def test_a_prepared_network_in_bfloat16_is_as_near_to_float32(tiny_pipe: Pipeline) -> None:
    exact = asked(tiny_pipe.unet)
    net = copy.deepcopy(tiny_pipe.unet).to(torch.bfloat16, memory_format=torch.channels_last)
    plain = difference(asked(net), exact)
    prepare(net)
    found = difference(asked(net), exact)
    print(f"bfloat16: {plain:.1e}, prepared {found:.1e}")
    assert 0 < found < 1.5 * plain


def test_other_weights_are_noticed(tiny_pipe: Pipeline) -> None:
    """Replaced, changed in place, or moved, as adapters and training do; and hooks are heard."""
    net = tiny_pipe.unet.to(memory_format=torch.channels_last)
    prepare(net)
    asked(net)
    places = [
        (module, name)
        for module in net.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim > 1
    ]
    for module, name in places:
        weight = getattr(module, name)
        kept = weight.detach().clone()
        for change in ("replaced", "in place", "data"):
            with torch.no_grad():
                if change == "replaced":
                    module._parameters[name] = nn.Parameter(weight + 0.1)
                elif change == "in place":
                    weight.add_(0.1)
                else:
                    weight.data = kept.clone().add_(0.1)
            ready = asked(net)
            undo = [(m, m.__dict__.pop(a)) for m in net.modules() for a in ("forward",) if a in m.__dict__]
            assert difference(ready, asked(net)) < BOUND, f"{type(module).__name__}.{name} {change}"
            for m, way in undo:
                object.__setattr__(m, "forward", way)
            module._parameters[name] = weight
            weight.data = kept.clone()
        break_at = places.index((module, name))
        if break_at > 12:
            break
    heard = []
    for part in (m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)):
        part.register_forward_hook(lambda module, args, out: heard.append(module))
    asked(net)
    assert len({id(m) for m in heard}) == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in net.modules())


def test_a_context_is_read_once(tiny_pipe: Pipeline) -> None:
    calls = []
    net = tiny_pipe.unet
    cross = next(m for m in net.modules() if isinstance(m, Attention) and m.crosses)
    own = type(cross.to_k).forward
    cross.to_k.forward = lambda x: (calls.append(1), own(cross.to_k, x))[1]  # type: ignore[method-assign]
    tiny_pipe("a red apple", num_inference_steps=4, seed=0)
    assert len(calls) == 1, calls
    tiny_pipe("a red apple", num_inference_steps=4, seed=0, num_images_per_prompt=2)
    assert len(calls) == 2, calls
    cond = Cond(torch.zeros(1, 2, 3))
    convert = Converted()
    first = convert(cond, torch.bfloat16)
    assert convert(cond, torch.bfloat16) is first and convert(cond, torch.float64) is not first


def test_gradients_see_the_plain_network(tiny_pipe: Pipeline) -> None:
    net = tiny_pipe.unet
    prepare(net)
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    net(x, torch.tensor([5.0]), Cond(torch.randn(1, 7, 32))).square().mean().backward()
    assert x.grad is not None and all(p.grad is not None for p in net.parameters())


def test_geglu_in_two_products() -> None:
    """What AMX is given, in float32."""
    torch.manual_seed(0)
    module, x = GEGLU(24, 40), torch.randn(2, 9, 24)
    with torch.inference_mode():
        way = Gated(module)
        if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            pytest.skip("this PyTorch has no oneDNN")
        for _ in range(2):
            assert difference(way.in_tiles(x), module(x)) < BOUND
            module.proj.bias.data = torch.randn(80)


def test_the_built_in_model_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "a red apple on a blue background"
    pictures = []
    for way in ("off", "on"):
        monkeypatch.setenv("SFUMATO_PREPARE", way)
        pipe = sfumato.load(precision="float32", device="cpu")
        pictures.append(pipe(prompt, seed=3, num_inference_steps=8, output_type="pt").images)
    found = float((pictures[0] - pictures[1]).abs().max()) * 255
    print(f"largest difference {found:.4f} of 255 levels")
    assert found < 1


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown preparation 'linears'; known: convolutions, residuals"):
        prepare(nn.Linear(2, 2), ["linears"])
