"""Adapters: LoRA and its relatives on denoiser and text encoders, and learned words (textual inversion)."""

from sfumato.weights.adapters.host import AdapterHost
from sfumato.weights.adapters.inversion import Embedding, EmbeddingHost, Lexicon, read_embedding
from sfumato.weights.adapters.read import Adapter, read_adapter

__all__ = ["Adapter", "AdapterHost", "Embedding", "EmbeddingHost", "Lexicon", "read_adapter", "read_embedding"]
