"""Prompts to context: against transformers' tower, with clip skip, equal prompts once."""

from __future__ import annotations

import pytest
import torch
import transformers

from sfumato.models.clip import CLIPTextConfig, CLIPTextModel
from sfumato.text.encode import encode_prompts
from sfumato.text.tokenizer import ClipTokenizer, train_vocabulary

PROMPTS = ["a red apple", "", "a cat left of a red apple", "a red apple"]


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return train_vocabulary(PROMPTS * 4, 560, max_length=12)


@pytest.fixture(scope="module")
def model(tokenizer: ClipTokenizer) -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
        num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=12,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_parity_with_transformers(tokenizer: ClipTokenizer, model: CLIPTextModel, clip_skip: int) -> None:
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)).eval()
    names = dict.fromkeys(theirs.state_dict())
    weights = {k if k in names else k.removeprefix("text_model."): v for k, v in model.state_dict().items()}
    theirs.load_state_dict(weights)
    with torch.no_grad():
        out = theirs(tokenizer(PROMPTS), output_hidden_states=True)
        # What diffusers does: hidden_states[-(clip_skip + 1)], then the final norm.
        norm = theirs.final_layer_norm if hasattr(theirs, "final_layer_norm") else theirs.text_model.final_layer_norm
        expected = norm(out.hidden_states[-(clip_skip + 1)]) if clip_skip else out.last_hidden_state
    ours = encode_prompts(tokenizer, model, PROMPTS, clip_skip).context
    assert ours is not None
    difference = (ours - expected).abs().max().item()
    print(f"clip_skip {clip_skip}: largest difference {difference:.2e}")
    assert difference < 1e-5


def test_equal_prompts_are_evaluated_once(tokenizer: ClipTokenizer, model: CLIPTextModel) -> None:
    sizes = []
    handle = model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    context = encode_prompts(tokenizer, model, PROMPTS).context
    handle.remove()
    assert sizes == [3]
    assert context is not None
    assert context.shape == (4, 12, 32)
    assert torch.equal(context[0], context[3])
    assert not context.requires_grad


def test_the_context_can_train_a_network(tokenizer: ClipTokenizer, model: CLIPTextModel) -> None:
    context = encode_prompts(tokenizer, model, PROMPTS).context
    assert context is not None
    layer = torch.nn.Linear(32, 1)
    layer(context).sum().backward()
    assert layer.weight.grad is not None


def test_errors_say_what_to_do(tokenizer: ClipTokenizer, model: CLIPTextModel) -> None:
    with pytest.raises(ValueError, match=r"clip_skip 3 is out of range.*0\.\.2"):
        encode_prompts(tokenizer, model, PROMPTS, clip_skip=3)
    with pytest.raises(TypeError, match="list of strings"):
        encode_prompts(tokenizer, model, "a red apple")
