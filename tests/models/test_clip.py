"""The text tower beside transformers' CLIPTextModel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from sfumato.models.clip import CLIPTextConfig, CLIPTextModel
from sfumato.presets.classic import CLIP_L
from sfumato.presets.xl import OPENCLIP_G

from .parity import assert_close, count, exchange, scramble

TINY: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 98,
    "eos_token_id": 99,
}


class Reference(torch.nn.Module):
    """transformers' tower under `text_model`, as in Stable Diffusion folders, whichever the version writes."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        tower = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
        self.text_model = getattr(tower, "text_model", tower)


def prompts() -> torch.Tensor:
    ids = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(3))
    ids[0, 5:] = 99  # padded with end-of-text, as SD 1.x does
    ids[1, 11] = 99
    ids[2, 7], ids[2, 8:] = 99, 0  # padded with something else
    return ids


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [99, 2])
@torch.no_grad()
def test_same_as_transformers(act: str, eos: int) -> None:
    raw = {**TINY, "hidden_act": act, "eos_token_id": eos}
    ours, theirs = CLIPTextModel(CLIPTextConfig.from_dict(raw)), Reference(raw)
    exchange(ours, theirs)
    a = ours(prompts(), output_hidden_states=True)
    b = theirs.text_model(prompts(), output_hidden_states=True)
    assert_close("last_hidden_state", a.last_hidden_state, b.last_hidden_state)
    assert_close("pooled", a.pooled, b.pooler_output)
    assert a.hidden_states is not None
    assert len(a.hidden_states) == len(b.hidden_states) == 4
    for i, (mine, other) in enumerate(zip(a.hidden_states, b.hidden_states, strict=True)):
        assert_close(f"hidden_states[{i}]", mine, other)
    assert a[0] is a.last_hidden_state
    assert a.pooler_output is a.pooled
    assert ours(prompts()).hidden_states is None


@torch.no_grad()
def test_a_projection_is_that_of_transformers() -> None:
    raw = {**TINY, "hidden_act": "gelu", "eos_token_id": 2, "projection_dim": 20}
    c = CLIPTextConfig.from_dict({**raw, "_class_name": "CLIPTextModelWithProjection"})
    assert c.projected and CLIPTextConfig.from_dict(c.to_dict()) == c
    ours = CLIPTextModel(c)
    theirs = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**raw))
    exchange(ours, theirs)
    a, b = ours(prompts(), output_hidden_states=True), theirs(prompts(), output_hidden_states=True)
    assert a.text_embeds is not None and a.text_embeds.shape == (3, 20)
    assert_close("text_embeds", a.text_embeds, b.text_embeds)
    assert_close("hidden_states[-2]", a.hidden_states[-2], b.hidden_states[-2])
    assert a[0] is a.text_embeds and a[1] is a.last_hidden_state and a[-1] is a.hidden_states


@torch.no_grad()
def test_transformers_opens_the_folder_that_our_names_make(tmp_path: Path) -> None:
    ours = CLIPTextModel(CLIPTextConfig.from_dict(TINY)).eval()
    scramble(ours)
    (tmp_path / "config.json").write_text(json.dumps(ours.config.to_dict()))
    save_file(ours.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, notes = transformers.CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    assert_close("folder", ours(prompts()).last_hidden_state, theirs.eval()(prompts()).last_hidden_state)


@torch.no_grad()
def test_a_token_sees_only_those_before_it() -> None:
    net = CLIPTextModel(CLIPTextConfig.from_dict(TINY)).eval()
    a, b = prompts()[:1], prompts()[:1].clone()
    b[0, 4] = 50
    same = (net(a)[0] - net(b)[0]).abs().amax(dim=(0, 2)) == 0
    assert same.tolist() == [True] * 4 + [False] * 8


@pytest.mark.parametrize(("config", "published"), [(CLIP_L, 123_060_480), (OPENCLIP_G, 694_659_840)])
def test_published_parameter_counts(config: CLIPTextConfig, published: int) -> None:
    kind = transformers.CLIPTextModelWithProjection if config.projected else transformers.CLIPTextModel
    raw = {name: value for name, value in config.to_dict().items() if name not in ("_class_name", "architectures")}
    with torch.device("meta"):
        assert count(CLIPTextModel(config)) == count(kind(transformers.CLIPTextConfig(**raw))) == published


def test_config_survives_the_round_trip_through_transformers() -> None:
    c = CLIPTextConfig.from_dict({**TINY, "hidden_act": "gelu"})
    written = transformers.CLIPTextConfig(**{k: v for k, v in c.to_dict().items() if k[0] != "_"}).to_dict()
    assert CLIPTextConfig.from_dict(written) == c
    assert c.to_dict()["_class_name"] == "CLIPTextModel"


def test_errors_name_the_value_and_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"hidden_act = 'relu'.*'quick_gelu', 'gelu'"):
        CLIPTextConfig.from_dict({**TINY, "hidden_act": "relu"})
    with pytest.raises(ValueError, match=r"model_type = 't5'.*clip_text_model"):
        CLIPTextConfig.from_dict({**TINY, "model_type": "t5"})
    with pytest.raises(ValueError, match="num_attention_heads = 5 does not divide"):
        CLIPTextConfig.from_dict({**TINY, "num_attention_heads": 5})
    with pytest.raises(ValueError, match="17 tokens; this text encoder reads at most 16"):
        CLIPTextModel(CLIPTextConfig.from_dict(TINY))(torch.zeros(1, 17, dtype=torch.long))
