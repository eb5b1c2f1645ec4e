"""Changes to a network's insides that some guidances ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sfumato.models.layers import Attention

IDENTITY = "identity_attention"


def self_attentions(network: nn.Module, layer: str) -> list[Attention]:
    """The self-attentions of a network whose names have `layer` in them, such as "mid" or "up_blocks.1".

    Raises ValueError when there is none.
    """
    named = {n: m for n, m in network.named_modules() if isinstance(m, Attention) and not m.crosses}
    found = [module for name, module in named.items() if layer and layer in name]
    if not found:
        blocks = sorted({name.partition(".attentions")[0] for name in named})
        raise ValueError(
            f"no self-attention has {layer!r} in its name; this network has some in {', '.join(blocks) or 'no block'}"
        )
    return found


@contextmanager
def perturbed(network: nn.Module, name: str | None) -> Iterator[None]:
    """A network with its insides changed for as long as the context lasts.

    name: "identity_attention:mid,up_blocks.1": in the self-attentions of these layers each token looks at itself
          alone (Ahn et al. 2024, eq. 14); None changes nothing.
    Raises ValueError for another change, and for a layer that the network does not have.
    """
    if name is None:
        yield
        return
    kind, _, layers = name.partition(":")
    if kind != IDENTITY:
        raise ValueError(f"unknown perturbation {kind!r}; known: {IDENTITY}")
    chosen = [module for layer in layers.split(",") for module in self_attentions(network, layer)]
    for module in chosen:
        module.identity = True
    try:
        yield
    finally:
        for module in chosen:
            module.identity = False
