"""Prompts to context: against transformers' tower, weights against their closed forms, chunks counted by hand."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from sfumato.cond import Cond
from sfumato.models.bert import LDMBertConfig, LDMBertModel
from sfumato.models.classes import ClassEmbedder, ClassEmbedderConfig
from sfumato.models.clip import CLIPTextConfig, CLIPTextModel
from sfumato.text.bert import BertTokenizer
from sfumato.text.encode import encode_prompt, encode_prompts, token_states
from sfumato.text.tokenizer import ClipTokenizer, train_vocabulary
from sfumato.text.towers import Cache, Towers

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
    model = CLIPTextModel(config).eval()
    torch.nn.init.normal_(model.text_model.final_layer_norm.bias)  # trained states have a mean
    return model


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


def context_of(cond: Cond) -> Tensor:
    """The context, which must be there."""
    assert cond.context is not None
    return cond.context


@pytest.fixture(scope="module")
def long() -> ClipTokenizer:
    """A tokenizer of CLIP's length, where each of these words and the comma is one token."""
    return train_vocabulary(["a red cat, dog"] * 8, 560, max_length=77)


@pytest.fixture(scope="module")
def reader() -> CLIPTextModel:
    """The smallest tower of CLIP's length."""
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=700, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=558, eos_token_id=559,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def rows_of(tokenizer: ClipTokenizer, model: CLIPTextModel, text: str) -> list[list[int]]:
    """The token ids of each chunk that the tower is given, without start, end and padding."""
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    context = context_of(encode_prompt(tokenizer, model, text, rule="none" if "(" in text else "a1111"))
    handle.remove()
    (ids,) = seen
    assert context.shape == (1, ids.numel(), 8)
    assert (ids[:, 0] == tokenizer.bos_id).all()
    rows = []
    for row in ids[:, 1:].tolist():
        end = row.index(tokenizer.eos_id)
        assert set(row[end + 1 :]) <= {tokenizer.pad_id}
        rows.append(row[:end])
    return rows


def test_unweighted_prompts_are_read_alike(tokenizer: ClipTokenizer, model: CLIPTextModel) -> None:
    """Bit for bit what diffusers reads, see the parity above, under each rule."""
    for text in PROMPTS:
        plain = context_of(encode_prompts(tokenizer, model, [text], 1))
        for rule in ("a1111", "comfy", "none"):
            assert torch.equal(context_of(encode_prompt(tokenizer, model, text, 1, rule)), plain), (text, rule)
    literal = context_of(encode_prompts(tokenizer, model, ["a (red) [cat"]))
    assert torch.equal(context_of(encode_prompt(tokenizer, model, "a (red) [cat", rule="none")), literal)
    assert torch.equal(context_of(encode_prompt(tokenizer, model, r"a \(red\) \[cat")), literal)
    assert not torch.equal(context_of(encode_prompt(tokenizer, model, "a (red) [cat")), literal)


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_weights_are_the_closed_forms(tokenizer: ClipTokenizer, model: CLIPTextModel, clip_skip: int) -> None:
    z, empty = token_states(model, tokenizer(["a red apple", ""]), clip_skip).double()
    w = torch.ones(12, 1, dtype=torch.float64)
    w[2], w[3] = 1.5, 1 / 1.1
    expected = {"a1111": z * w * z.mean() / (z * w).mean(), "comfy": empty + (z - empty) * w}
    for rule, theory in expected.items():
        (found,) = context_of(encode_prompt(tokenizer, model, "a (red:1.5) [apple]", clip_skip, rule))
        difference = (found - theory).abs().max().item()
        print(f"{rule}: largest difference {difference:.2e} of values up to {theory.abs().max():.2f}")
        assert difference < 1e-4 * theory.abs().max()
        assert (found - z).abs().max() > 0.01
        if rule == "comfy":
            assert torch.equal(found[[0, 1, 4, 11]], z[[0, 1, 4, 11]].float())


def test_a_mean_of_zero_is_not_restored(long: ClipTokenizer, reader: CLIPTextModel) -> None:
    """An untrained tower's final norm makes every state's mean 0, and rounding must not decide the scale."""
    plain = context_of(encode_prompt(long, reader, "a red cat"))
    weighted = context_of(encode_prompt(long, reader, "a (red:1.5) cat"))
    assert plain.mean().abs() < 1e-6
    assert torch.equal(weighted[:, 2], plain[:, 2] * 1.5)
    assert torch.equal(weighted[:, 3:], plain[:, 3:])


def test_weights_keep_the_dtype(long: ClipTokenizer, reader: CLIPTextModel) -> None:
    half = CLIPTextModel(reader.config).eval().to(torch.bfloat16)
    for rule in ("a1111", "comfy", "none"):
        context = context_of(encode_prompt(long, half, "a (red:1.5) cat", rule=rule))
        assert context.dtype == torch.bfloat16 and context.isfinite().all() and not context.requires_grad


def test_only_weighted_chunks_change(tokenizer: ClipTokenizer, model: CLIPTextModel) -> None:
    """The mean is restored chunk by chunk."""
    plain = context_of(encode_prompt(tokenizer, model, "a red apple BREAK a cat"))
    for rule in ("a1111", "comfy"):
        weighted = context_of(encode_prompt(tokenizer, model, "a red apple BREAK a (cat:2)", rule=rule))
        means = [context[:, 12:].mean().item() for context in (weighted, plain)]
        print(f"{rule}: means of the weighted chunk {means}")
        assert torch.equal(weighted[:, :12], plain[:, :12])
        assert (weighted[:, 12:] - plain[:, 12:]).abs().max() > 0.01
        assert rule == "comfy" or means[0] == pytest.approx(means[1], rel=1e-4)


def test_long_prompts_are_read_in_chunks(long: ClipTokenizer, reader: CLIPTextModel) -> None:
    red, cat, comma = (long.vocabulary[word] for word in ("red</w>", "cat</w>", ",</w>"))
    assert rows_of(long, reader, "") == [[]]
    assert rows_of(long, reader, "red " * 75) == [[red] * 75]
    assert rows_of(long, reader, "red " * 75 + "cat") == [[red] * 75, [cat]]
    assert rows_of(long, reader, "red " * 160) == [[red] * 75, [red] * 75, [red] * 10]
    # A comma among the last 20 tokens: what follows it moves on. One before them is too far away.
    assert rows_of(long, reader, "red " * 55 + "," + "cat " * 30) == [[red] * 55 + [comma], [cat] * 30]
    assert rows_of(long, reader, "red " * 54 + "," + "cat " * 30) == [[red] * 54 + [comma] + [cat] * 20, [cat] * 10]
    assert rows_of(long, reader, "red " * 60 + "," + "cat " * 14) == [[red] * 60 + [comma] + [cat] * 14]
    # A comma that does not fit takes nothing along.
    assert rows_of(long, reader, "red " * 60 + "," + "cat " * 14 + ",") == [[red] * 60 + [comma] + [cat] * 14, [comma]]
    assert rows_of(long, reader, "red " * 75 + ", cat") == [[red] * 75, [comma, cat]]
    assert len(rows_of(long, reader, "(" + "red " * 80)) == 2  # under "none", too, nothing is cut off


def test_chunks_side_by_side_are_each_read_alone(long: ClipTokenizer, reader: CLIPTextModel) -> None:
    both = context_of(encode_prompt(long, reader, "red " * 75 + "a (cat:1.2)", 1))
    apart = [context_of(encode_prompt(long, reader, text, 1)) for text in ("red " * 75, "a (cat:1.2)")]
    difference = (both - torch.cat(apart, 1)).abs().max().item()
    print(f"largest difference {difference:.2e}")
    assert difference < 1e-5


def test_break_pads_the_chunk(long: ClipTokenizer, reader: CLIPTextModel) -> None:
    red, cat = (long.vocabulary[word] for word in ("red</w>", "cat</w>"))
    assert rows_of(long, reader, "red BREAK cat") == [[red], [cat]]
    assert rows_of(long, reader, "BREAK red BREAK BREAK cat BREAK") == [[], [red], [], [cat]]
    assert rows_of(long, reader, "red " * 75 + "BREAK cat") == [[red] * 75, [cat]]


def test_the_vectors_of_a_trigger_stay_together(long: ClipTokenizer, reader: CLIPTextModel) -> None:
    red, comma = (long.vocabulary[word] for word in ("red</w>", ",</w>"))
    learned = long.expanded({"sks": [600, 601, 602], "many": range(600, 676)})
    assert rows_of(learned, reader, "red " * 72 + "sks") == [[red] * 72 + [600, 601, 602]]
    assert rows_of(learned, reader, "red " * 73 + "sks red") == [[red] * 73, [600, 601, 602, red]]
    assert rows_of(learned, reader, "sks " * 26) == [[600, 601, 602] * 25, [600, 601, 602]]
    moved = rows_of(learned, reader, "red " * 68 + ", sks sks red")
    assert moved == [[red] * 68 + [comma], [600, 601, 602] * 2 + [red]]
    with pytest.raises(ValueError, match="a word stands for 76 tokens, but a chunk holds 75"):
        encode_prompt(learned, reader, "many")


def test_schedules_read_each_text_once(long: ClipTokenizer, reader: CLIPTextModel) -> None:
    calls: list[Tensor] = []
    handle = reader.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    cache: Cache = {}
    turns = Towers((reader,), (long,)).along("a [cat|dog]", 5, cache=cache)
    again = Towers((reader,), (long,)).along("a [cat:dog:2]", 5, cache=cache)
    other = Towers((reader,), (long,)).along("a cat", 5, clip_skip=1, cache=cache)
    literal = Towers((reader,), (long,)).along("a [cat:dog:2]", 5, rule="none")
    handle.remove()
    assert [end for end, _ in turns] == [1, 2, 3, 4, 5]
    assert [end for end, _ in again] == [2, 5] and [end for end, _ in literal] == [end for end, _ in other] == [5]
    cat, dog = turns[0][1], turns[1][1]
    assert [cond is cat for _, cond in turns] == [True, False, True, False, True]
    assert again[0][1] is cat and again[1][1] is dog
    assert len(calls) == 4 and set(cache) == {("a cat", 0, "a1111"), ("a dog", 0, "a1111"), ("a cat", 1, "a1111")}
    assert torch.equal(context_of(cat), context_of(encode_prompts(long, reader, ["a cat"])))


BERT = BertTokenizer({word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "("))}, 8)


def test_condition_of_each_text_encoder(long: ClipTokenizer, reader: CLIPTextModel) -> None:
    clip = Towers((reader,), (long,)).condition("a (cat:1.2)", 1, "comfy")
    assert torch.equal(context_of(clip), context_of(encode_prompt(long, reader, "a (cat:1.2)", 1, "comfy")))

    torch.manual_seed(0)
    shape = LDMBertConfig(7, 8, encoder_layers=1, encoder_ffn_dim=8, encoder_attention_heads=2, head_dim=4, d_model=8)
    bert = LDMBertModel(shape).eval()
    context = context_of(Towers((bert,), (BERT,)).condition("A (cat"))
    assert context.shape == (1, 8, 8) and not context.requires_grad
    assert torch.equal(context, bert(torch.tensor([[2, 4, 6, 5, 3, 0, 0, 0]])).last_hidden_state)
    assert len(Towers((bert,), (BERT,)).along("[a:cat:0.5]", 4)) == 1

    table = ClassEmbedder(ClassEmbedderConfig(num_classes=11, embed_dim=4))
    rows = {text: context_of(Towers((table,), (None,)).condition(text)) for text in ("0", " 9 ", "")}
    for text, row in (("0", 0), (" 9 ", 9), ("", 10)):
        assert rows[text].shape == (1, 1, 4)
        assert torch.equal(rows[text][0, 0], table.embedding.weight[row])
    assert Towers((None,), (None,)).condition("") == Cond()


def test_conditions_that_make_no_sense_are_refused(long: ClipTokenizer, reader: CLIPTextModel) -> None:
    table = ClassEmbedder(ClassEmbedderConfig(num_classes=1001, embed_dim=4))
    for text in ("1000", "-1", "a cat", "1.5", "²"):
        with pytest.raises(ValueError, match=r"is not a class of this model; give a number from 0 to 999"):
            Towers((table,), (None,)).condition(text)
    with pytest.raises(ValueError, match="unconditional and takes no prompt; leave 'a cat' out"):
        Towers((None,), (None,)).condition("a cat")
    with pytest.raises(ValueError, match="clip_skip = 2 is for CLIP"):
        Towers((table,), (None,)).condition("1", clip_skip=2)
    with pytest.raises(TypeError, match="give a ClipTokenizer"):
        Towers((reader,), (BERT,)).condition("a cat")
    for towers in (Towers((reader,), (long,)), Towers((table,), (None,))):
        with pytest.raises(ValueError, match="unknown weighting rule 'compel'"):
            towers.condition("0", rule="compel")
    with pytest.raises(ValueError, match=r"weight '1\.\.2' is not a number"):
        encode_prompt(long, reader, "a (cat:1..2)")
