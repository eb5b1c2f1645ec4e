"""The T5 encoder beside transformers' T5EncoderModel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from sfumato.models.t5 import T5Config, T5EncoderModel, buckets

from .parity import assert_close, count, exchange

TINY: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 12,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 3,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 40,
}


def theirs_of(raw: dict[str, Any]) -> Any:
    config = transformers.T5Config(**{k: v for k, v in raw.items() if k not in ("is_gated_act", "dense_act_fn")})
    return transformers.T5EncoderModel(config)


def pair(**changes: Any) -> tuple[T5EncoderModel, Any]:
    c = T5Config.from_dict({**TINY, **changes})
    ours, theirs = T5EncoderModel(c), theirs_of(c.to_dict())
    tied = theirs.state_dict()
    tied.pop("encoder.embed_tokens.weight", None)
    theirs.state_dict = lambda: dict(tied)  # the tied name is in no file
    load = theirs.load_state_dict
    theirs.load_state_dict = lambda state, strict: load(
        {**state, "encoder.embed_tokens.weight": state["shared.weight"]}, strict=strict
    )
    exchange(ours, theirs)
    return ours, theirs


def ids(length: int) -> Tensor:
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [1, 7, 77])
@torch.no_grad()
def test_same_as_transformers(length: int) -> None:
    ours, theirs = pair()
    tokens = ids(length)
    assert_close(f"{length} tokens", ours(tokens)[0], theirs(tokens)[0])
    mask = torch.ones_like(tokens)
    mask[0, (length + 1) // 2 :] = 0
    assert_close("with a mask", ours(tokens, mask)[0], theirs(tokens, attention_mask=mask)[0])


@pytest.mark.parametrize(("count_", "furthest"), [(32, 128), (16, 40), (8, 20)])
def test_buckets_are_transformers(count_: int, furthest: int) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    place = torch.arange(300)
    config = T5Config(relative_attention_num_buckets=count_, relative_attention_max_distance=furthest)
    theirs = T5Attention._relative_position_bucket(place[None] - place[:, None], True, count_, furthest)
    assert torch.equal(buckets(300, config), theirs)


@torch.no_grad()
def test_half_precisions_stay_near_and_finite() -> None:
    ours, _ = pair()
    wide = ours(ids(20))[0]
    for dtype, bound in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        assert_close(str(dtype), ours.to(dtype)(ids(20))[0].float(), wide, bound)
        ours.float()
    for block in ours.encoder.block:
        block.layer[1].DenseReluDense.wo.weight *= 1e5  # type: ignore[union-attr,operator]
    ours.half()
    for block in ours.encoder.block:
        block.layer[1].DenseReluDense.wo.weight.clamp_(-6e4, 6e4)  # type: ignore[union-attr,operator]
    states = ours(ids(20))[0]
    assert states.dtype == torch.float16 and states.isfinite().all()


def test_the_xxl_encoder_has_the_published_parameter_count() -> None:
    c = T5Config()
    with torch.device("meta"):
        ours, theirs = T5EncoderModel(c), theirs_of(c.to_dict())
    assert count(ours) == count(theirs) == 4_762_310_656
    names = {name: p.shape for name, p in theirs.named_parameters()}
    assert {name: p.shape for name, p in ours.named_parameters()} == names


def test_config_survives_the_round_trip_through_transformers() -> None:
    c = T5Config.from_dict(TINY)
    assert T5Config.from_dict(c.to_dict()) == c
    assert T5Config.from_dict(theirs_of(c.to_dict()).config.to_dict()) == c
    with pytest.raises(ValueError, match="feed_forward_proj = 'relu' is not supported; allowed: 'gated-gelu'"):
        T5Config.from_dict({**TINY, "feed_forward_proj": "relu"})
