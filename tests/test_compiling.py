"""What is compiled, that it says the same, and that it gives way to hooks, gradients and other weights.

All but one of these let PyTorch trace the blocks without generating code for them, which is the slow part.
"""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sfumato.compiling import BLOCKS, Compiled, compiled, is_compiled, keep_compiled
from sfumato.cond import Cond
from sfumato.models.layers import ResnetBlock2D
from sfumato.models.unet import UNet
from sfumato.pipelines.pipeline import Pipeline
from sfumato.prepare import prepare
from sfumato.runtime import Card, check_compile, choose, on_card

BOUND = 1e-5  # of the output's range


@pytest.fixture(autouse=True)
def folder(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code is kept with pytest's cache."""
    assert pytestconfig.cache is not None
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(pytestconfig.cache.mkdir("compiled")))


def asked(net: nn.Module, side: int = 8) -> Tensor:
    """What a network says to two pictures."""
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(size, generator=generator) for size in ((2, 4, side, side), (2, 7, 32)))
    with torch.inference_mode():
        return net(x, torch.tensor([400.0, 400.0]), Cond(context))


def difference(a: Tensor, b: Tensor) -> float:
    """The largest, of the range of b."""
    return float((a - b).abs().max() / (b.max() - b.min()))


def functions(net: nn.Module) -> dict[int, list[nn.Module]]:
    """The blocks that share what was compiled."""
    found: dict[int, list[nn.Module]] = {}
    for module in net.modules():
        way = module.__dict__.get("forward")
        if isinstance(way, Compiled):
            found.setdefault(id(way.function), []).append(module)
    return found


def test_blocks_of_the_same_shapes_share_what_was_compiled(tiny_pipe: Pipeline) -> None:
    net = tiny_pipe.unet
    plain, keys = asked(net), list(net.state_dict())
    undo = compiled(net, "blocks", "eager")
    shared = functions(net)
    blocks = [module for module in net.modules() if isinstance(module, BLOCKS)]
    assert sum(map(len, shared.values())) == len(blocks) > len(shared)
    for some in shared.values():
        assert len({(type(m), *(p.shape for p in m.parameters())) for m in some}) == 1
    assert list(net.state_dict()) == keys and is_compiled(net)
    compiled(net, "blocks", "eager")
    assert functions(net) == shared  # once is enough
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert not is_compiled(other) and difference(asked(other), plain) < BOUND
    undo()
    assert not is_compiled(net) and torch.equal(asked(net), plain)
    assert not any("forward" in module.__dict__ for module in net.modules())


def test_other_weights_hooks_and_gradients(tiny_pipe: Pipeline) -> None:
    net = tiny_pipe.unet
    block = next(module for module in net.modules() if isinstance(module, ResnetBlock2D))
    x, temb = torch.randn(1, 16, 8, 8), torch.randn(1, 64)

    def both() -> float:
        with torch.inference_mode():
            return difference(block(x, temb), type(block).forward(block, x, temb))

    compiled(net, "blocks", "eager")
    assert both() < BOUND
    own = block.conv1._parameters["weight"]
    assert own is not None
    block.conv1._parameters["weight"] = nn.Parameter(own.detach() + 0.1)  # as an adapter that is merged
    assert both() < BOUND
    block.conv1._parameters["weight"] = own
    handle = block.conv2.register_forward_hook(lambda module, args, out: out + 1.0)  # as one that is not
    with torch.inference_mode():
        heard = block(x, temb)
    handle.remove()
    with torch.inference_mode():
        found = float((heard - block(x, temb) - 1.0).abs().max())
    assert found < 1e-4, f"a hook changed the answer by 1 within {found:.1e}"
    block(x, temb).square().mean().backward()
    assert own.grad is not None


def test_the_generated_code_says_the_same() -> None:
    """A block through inductor, which leaves the code in the folder; half a minute of g++ the first time."""
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("there is no C++ compiler, which torch.compile needs on a CPU")
    torch.manual_seed(0)
    block = ResnetBlock2D(8, 8, 4, 1e-5, 16).to(memory_format=torch.channels_last).eval()
    net, temb = nn.ModuleList([block]), torch.randn(2, 16)
    x = torch.randn(2, 8, 8, 8).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        plain = block(x, temb)
        undo = compiled(net, "blocks")
        found = difference(block(x, temb), plain)
        print(f"largest difference {found:.1e} of the range")
        assert found < BOUND
        undo()
        assert torch.equal(block(x, temb), plain)
    assert any(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).iterdir())


def test_a_pipeline_compiles_its_denoiser_and_takes_it_back(tiny_pipe: Pipeline) -> None:
    ways: list[str] = []

    def trace(net: UNet, how: str) -> object:
        ways.append(how)
        return compiled(net, how, "eager")

    def draw() -> Tensor:
        images = tiny_pipe("a red apple", num_inference_steps=2, seed=0, output_type="pt").images
        assert isinstance(images, Tensor)
        return images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfumato.pipelines.keeping.compiled", trace)
        plain = draw()
        tiny_pipe.set_compile("blocks")
        found = float((draw() - plain).abs().max()) * 255
        print(f"largest difference {found:.4f} of 255 levels")
        assert found < 1 and is_compiled(tiny_pipe.unet) and not is_compiled(tiny_pipe.vae) and set(ways) == {"blocks"}
        assert tiny_pipe.made_with()["compile"] == "blocks"
        with pytest.raises(ValueError, match="compile = 'blocks' is for weights that stay"):
            tiny_pipe.set_memory("low")
        tiny_pipe.set_compile("off")
        assert torch.equal(draw(), plain) and not is_compiled(tiny_pipe.unet)
        assert "compile" not in tiny_pipe.made_with()


def test_what_cannot_be_compiled() -> None:
    net = UNet.__new__(UNet)
    with pytest.raises(ValueError, match="unknown way to compile 'all'; known: off, blocks, graphs"):
        compiled(net, "all")
    block = nn.Sequential(ResnetBlock2D(8, 8, 4, 1e-5))
    undo = prepare(block)
    if any("forward" in module.__dict__ for module in block.modules()):
        with pytest.raises(ValueError, match="a prepared network is not compiled"):
            compiled(block, "blocks", "eager")
    undo()
    compiled(block, "off")
    assert not is_compiled(block)


def test_the_choice_for_a_device() -> None:
    for how, kind in (("off", "cpu"), ("blocks", "cpu"), ("blocks", "cuda"), ("graphs", "cuda")):
        check_compile(how, kind, lambda name: object())
    check_compile("off", "cuda", lambda name: None)
    for how, kind, words in (
        ("graphs", "cpu", "'graphs' is for CUDA devices, and this one is cpu"),
        ("blocks", "cuda", "'blocks' needs triton"),
        ("max", "cpu", "unknown way to compile 'max'"),
    ):
        with pytest.raises(ValueError, match=words):
            check_compile(how, kind, lambda name: None)
    assert choose("cpu").compile == "off" and choose("cpu", compile="blocks").compile == "blocks"


@pytest.mark.parametrize(
    ("name", "capability", "dtype"),
    [("Tesla T4", (7, 5), torch.float16), ("A100", (8, 0), torch.bfloat16), ("H200", (9, 0), torch.bfloat16)],
)
def test_the_dtype_of_a_gpu(name: str, capability: tuple[int, int], dtype: torch.dtype) -> None:
    runtime = on_card(torch.device("cuda"), Card(name, capability))
    assert runtime.dtype == dtype and runtime.channels_last and runtime.reason.startswith(name)


def test_the_folder_of_compiled_code(tmp_path: Path) -> None:
    named = {"TORCHINDUCTOR_CACHE_DIR": "/there"}
    assert keep_compiled(named) == Path("/there") and named == {"TORCHINDUCTOR_CACHE_DIR": "/there"}
    unnamed = {"XDG_CACHE_HOME": str(tmp_path)}
    assert keep_compiled(unnamed) == tmp_path / "sfumato" / "compiled"
    assert unnamed["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "sfumato" / "compiled")
