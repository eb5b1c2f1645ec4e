"""Fits the linear map from latents to colours that previews of the built-in model use; prints it as source code.

    python benchmarks/preview_factors.py

The latents are those of pictures that the model makes of its own prompts, against what its autoencoder makes of them.
"""

from __future__ import annotations

import torch

import sfumato
from sfumato.evaluate.prompts import read_prompts, thinned
from sfumato.pipelines.request import parse
from sfumato.previews import fit

COUNT = 96


def main() -> None:
    """Print the map and its error."""
    pipe = sfumato.load("mini", "float32", "cpu", batch=8)
    prompts = thinned(read_prompts(), COUNT)
    requests = [parse(prompt=p.text, seed=i, num_inference_steps=10) for i, p in enumerate(prompts)]
    z = pipe.generate(requests, output_type="latent").images
    assert isinstance(z, torch.Tensor)
    factors, error = fit(z, pipe.decode(z).clamp(-1, 1))
    rows = ", ".join("(" + ", ".join(f"{v:.3f}" for v in row) + ")" for row in factors.rows)
    offset = ", ".join(f"{v:.3f}" for v in factors.offset)
    print(f"MINI = Factors(({rows}), ({offset}))  # RMS error {error:.3f} of {len(requests)} pictures")


if __name__ == "__main__":
    main()
