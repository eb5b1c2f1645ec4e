"""The text encoder of latent diffusion beside diffusers' LDMBertModel."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as peer

from sfumato.models.bert import LDMBertConfig, LDMBertModel

from .parity import assert_close, count, exchange

TINY = LDMBertConfig(
    vocab_size=100,
    max_position_embeddings=16,
    encoder_layers=3,
    encoder_ffn_dim=48,
    encoder_attention_heads=3,
    head_dim=8,
    d_model=32,
)


def theirs_of(c: LDMBertConfig) -> torch.nn.Module:
    return peer.LDMBertModel(peer.LDMBertConfig(**{k: v for k, v in c.to_dict().items() if k[0] != "_"}))


@torch.no_grad()
def test_same_as_diffusers() -> None:
    ours, theirs = LDMBertModel(TINY), theirs_of(TINY)
    exchange(ours, theirs)
    for length in (12, 16):
        ids = torch.randint(0, 100, (3, length), generator=torch.Generator().manual_seed(3))
        a, b = ours(ids), theirs(ids)
        assert_close(f"last_hidden_state of {length} tokens", a.last_hidden_state, b.last_hidden_state)
        assert a[0] is a.last_hidden_state


def test_published_parameter_count() -> None:
    with torch.device("meta"):
        assert count(LDMBertModel(LDMBertConfig())) == count(theirs_of(LDMBertConfig())) == 581_994_042


def test_config_survives_the_round_trip_through_transformers() -> None:
    written = theirs_of(TINY).config.to_dict()
    assert LDMBertConfig.from_dict(written) == TINY
    assert LDMBertConfig.from_dict(TINY.to_dict()) == TINY
    assert LDMBertConfig.from_dict(peer.LDMBertConfig().to_dict()) == LDMBertConfig()


def test_errors_name_the_value_and_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"activation_function = 'relu'.*'gelu'"):
        LDMBertConfig.from_dict({"activation_function": "relu"})
    with pytest.raises(ValueError, match=r"model_type = 'bert'.*'ldmbert'"):
        LDMBertConfig.from_dict({"model_type": "bert"})
    with pytest.raises(ValueError, match="17 tokens; this text encoder reads at most 16"):
        LDMBertModel(TINY)(torch.zeros(1, 17, dtype=torch.long))
