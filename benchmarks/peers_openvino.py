"""OpenVINO as a contender of `bench.py`: diffusers' networks converted once, then run with shapes that are fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peers import OPENVINO_BF16, OPENVINO_INT8, THEIRS, opened
from torch import Tensor, nn


class Called(nn.Module):
    """One way to call a network of diffusers, with its answer as a plain tensor."""

    def __init__(self, net: Any, part: str) -> None:
        super().__init__()
        self.net, self.part = net, part

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """x and, of a U-Net, times and context."""
        if self.part == "unet":
            return self.net(x, *others, return_dict=False)[0]
        if self.part == "decoder":
            return self.net.decode(x, return_dict=False)[0]
        return self.net.encode(x, return_dict=False)[0].mean


def convert(folder: Path, target: Path, compressed: bool) -> None:
    """Write a model folder's networks as OpenVINO's; compressed: the U-Net in int8 as well, by nncf."""
    import openvino as ov

    pipe = opened(THEIRS, folder)
    target.mkdir(parents=True, exist_ok=True)
    width, channels = pipe.unet.config.cross_attention_dim, pipe.unet.config.in_channels
    x, t, context = torch.randn(2, channels, 16, 16), torch.full((2,), 5.0), torch.randn(2, 77, width)
    examples = {"unet": (x, t, context), "decoder": (x[:1],), "encoder": (torch.randn(1, 3, 64, 64),)}
    for part, inputs in examples.items():
        if (target / f"{part}.xml").exists():
            continue
        net = pipe.unet if part == "unet" else pipe.vae
        model = ov.convert_model(Called(net.eval(), part), example_input=inputs if len(inputs) > 1 else inputs[0])
        ov.save_model(model, target / f"{part}.xml", compress_to_fp16=False)
    if compressed and not (target / "unet-int8.xml").exists():
        import nncf

        model = nncf.compress_weights(ov.Core().read_model(target / "unet.xml"))
        ov.save_model(model, target / "unet-int8.xml", compress_to_fp16=False)


class Compiled:
    """A converted network; compiled for the shapes of a call, and kept for as long as they stay the same."""

    def __init__(self, name: str, place: Path, part: str) -> None:
        import openvino as ov

        self.core = ov.Core()
        self.shapes: tuple[tuple[int, ...], ...] = ()
        self.request: Any = None
        self.file = place / f"{part}{'-int8' if name == OPENVINO_INT8 and part == 'unet' else ''}.xml"
        self.config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "bf16" if name == OPENVINO_BF16 else "f32",
        }

    def ready(self, *shapes: tuple[int, ...]) -> Any:
        """What computes inputs of these shapes; compiled when they are others than before."""
        if self.request is None or shapes != self.shapes:
            self.request = None
            model = self.core.read_model(self.file)
            model.reshape({i: list(shape) for i, shape in enumerate(shapes)})
            self.request = self.core.compile_model(model, "CPU", self.config).create_infer_request()
            self.shapes = shapes
        return self.request

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The answer, float32; a buffer that the next call writes to."""
        request = self.ready(*(tuple(x.shape) for x in inputs))
        arrays = [x.detach().float().contiguous().numpy() for x in inputs]
        return torch.from_numpy(request.infer(arrays, share_inputs=True, share_outputs=True)[0])


class Denoiser:
    """A converted U-Net in the place of diffusers'."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, net: Compiled, config: Any) -> None:
        self.net, self.config = net, config

    def __call__(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        return (self.net(x, t.float().expand(len(x)), encoder_hidden_states),)


class Decoder:
    """A converted decoder in the place of diffusers' autoencoder."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, net: Compiled, config: Any) -> None:
        self.net, self.config = net, config

    def decode(self, z: Tensor, **_: Any) -> tuple[Tensor]:
        return (self.net(z),)


def pipeline(name: str, folder: Path, place: Path, size: int) -> Any:
    """Diffusers' pipeline around networks compiled for pictures of a size; its text tower is PyTorch's, in float32."""
    import diffusers
    import transformers

    with torch.device("meta"):  # for the configurations only
        unet, vae = (
            kind.from_config(kind.load_config(folder / part)).config
            for kind, part in ((diffusers.UNet2DConditionModel, "unet"), (diffusers.AutoencoderKL, "vae"))
        )
    denoiser, decoder = Compiled(name, place, "unet"), Compiled(name, place, "decoder")
    side = size // (2 ** (len(vae.block_out_channels) - 1))
    denoiser.ready((2, unet.in_channels, side, side), (2,), (2, 77, unet.cross_attention_dim))
    decoder.ready((1, vae.latent_channels, side, side))
    scheduler = diffusers.DiffusionPipeline.load_config(folder)["scheduler"][1]
    pipe = diffusers.StableDiffusionPipeline(
        vae=Decoder(decoder, vae),
        text_encoder=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        unet=Denoiser(denoiser, unet),
        scheduler=getattr(diffusers, scheduler).from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
