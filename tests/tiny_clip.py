"""The configuration of a small CLIP tower for a tokenizer."""

from __future__ import annotations

from sfumato.models.clip import CLIPTextConfig
from sfumato.text.tokenizer import ClipTokenizer


def tiny_clip(tokenizer: ClipTokenizer, width: int, layers: int) -> CLIPTextConfig:
    """Two heads, `layers` layers and a projection of `width`."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
