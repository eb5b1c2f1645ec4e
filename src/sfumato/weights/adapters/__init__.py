"""Adapters: LoRA and its relatives on U-Net and text encoder, and learned words (textual inversion)."""

from sfumato.weights.adapters.host import AdapterHost
from sfumato.weights.adapters.inversion import Embedding, EmbeddingHost, read_embedding
from sfumato.weights.adapters.read import Adapter, read_adapter

__all__ = ["Adapter", "AdapterHost", "Embedding", "EmbeddingHost", "read_adapter", "read_embedding"]
