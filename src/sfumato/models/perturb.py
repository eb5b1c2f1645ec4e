"""Changes to a network's insides that some guidances ask for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sfumato.models.layers import Attention
from sfumato.models.mmdit import JointAttention, JointTransformerBlock

IDENTITY = "identity_attention"
SKIP = "skip_layers"


def self_attentions(network: nn.Module, layer: str) -> list[Attention | JointAttention]:
    """The self-attentions of a network whose names have `layer` in them, such as "mid" or "up_blocks.1".

    In a transformer's the picture sees itself and the text; a block is meant whole: "blocks.1" is not block 12.
    Raises ValueError when there is none.
    """
    named = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, JointAttention) or (isinstance(module, Attention) and not module.crosses)
    }
    wanted = re.compile(re.escape(layer) + (r"(?!\d)" if layer[-1:].isdigit() else ""))
    found = [module for name, module in named.items() if layer and wanted.search(name)]
    if not found:
        blocks = sorted({name.partition(".attentions")[0].partition(".attn")[0] for name in named})
        raise ValueError(
            f"no self-attention has {layer!r} in its name; this network has some in {', '.join(blocks) or 'no block'}"
        )
    return found


def blocks(network: nn.Module, numbers: str) -> list[JointTransformerBlock]:
    """The blocks of a transformer with the numbers "7,8,9", counted from 0.

    Raises ValueError for a network without such blocks and for a number that it does not have.
    """
    there = [module for module in network.modules() if isinstance(module, JointTransformerBlock)]
    known = {str(i): block for i, block in enumerate(there)}
    for number in numbers.split(","):
        if number not in known:
            has = f"has 0 to {len(there) - 1}" if there else "is no transformer and has none"
            raise ValueError(f"no block {number!r} to skip; this network {has}")
    return [known[number] for number in numbers.split(",")]


@contextmanager
def perturbed(network: nn.Module, name: str | None) -> Iterator[None]:
    """A network with its insides changed for as long as the context lasts.

    name: "identity_attention:mid,up_blocks.1": in the self-attentions of these layers each token looks at itself
          alone (Ahn et al. 2024, eq. 14), in a transformer at the text as well; "skip_layers:7,8,9": these blocks of
          a transformer are left out; None changes nothing.
    Raises ValueError for another change, and for a layer that the network does not have.
    """
    if name is None:
        yield
        return
    kind, _, layers = name.partition(":")
    chosen: list[nn.Module] = []
    if kind == IDENTITY:
        switch = "identity"
        for layer in layers.split(","):
            chosen += self_attentions(network, layer)
    elif kind == SKIP:
        switch = "skipped"
        chosen += blocks(network, layers)
    else:
        raise ValueError(f"unknown perturbation {kind!r}; known: {IDENTITY}, {SKIP}")
    for module in chosen:
        setattr(module, switch, True)
    try:
        yield
    finally:
        for module in chosen:
            setattr(module, switch, False)
