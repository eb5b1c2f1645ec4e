"""How files name the tensors of the T5 encoder."""

from __future__ import annotations

from sfumato.models.t5 import T5Config
from sfumato.weights.keymap import KeyMap, Row
from sfumato.weights.parts import network


def t5_map(config: T5Config) -> KeyMap:
    """T5's encoder as transformers names it; some files hold the table of tokens twice, and whole T5's a decoder."""
    names = network(config).state_dict()
    extras = ("encoder.embed_tokens.weight", "decoder.*", "lm_head.weight")
    return KeyMap(tuple(Row((name,), name) for name in names), extras)
