"""Prompts to conditioning: what a network is told of a text, for each kind of text encoder.

B prompts, U distinct prompts, n chunks, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from sfumato.cond import Cond
from sfumato.models.bert import LDMBertModel
from sfumato.models.classes import ClassEmbedder
from sfumato.models.clip import CLIPTextModel
from sfumato.text.bert import BertTokenizer
from sfumato.text.prompt import Piece, check_rule, parse, schedule
from sfumato.text.tokenizer import ClipTokenizer

COMMA_REACH = 20  # tokens back from the end of a full chunk to a comma after which it may be broken
Cache = dict[tuple[str, int, str], Cond]


def encode_prompts(tokenizer: ClipTokenizer, model: CLIPTextModel, prompts: Sequence[str], clip_skip: int = 0) -> Cond:
    """Cond(context (B, L, D)) of some plain texts, cut to one chunk each; equal texts are evaluated once.

    Brackets mean themselves here: captions are read in this way. `encode_prompt` reads prompts with their syntax.
    clip_skip: layers left out at the end; 0 reads the last one. The final layer norm applies in any case, as
               with diffusers' `clip_skip` (whose None is our 0).
    Raises TypeError when given a bare string, ValueError when clip_skip is not below the number of layers.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts is the string {prompts!r}; give a list of strings")
    distinct = list(dict.fromkeys(prompts))
    ids = tokenizer(distinct)  # (U, L)
    place = {prompt: i for i, prompt in enumerate(distinct)}
    states = token_states(model, ids, clip_skip)  # (U, L, D)
    rows = torch.tensor([place[prompt] for prompt in prompts], dtype=torch.int64, device=states.device)
    return Cond(context=states[rows])  # (B, L, D)


@torch.no_grad()  # not inference_mode: a U-Net in training keeps the states for its backward pass
def token_states(model: CLIPTextModel, ids: Tensor, clip_skip: int = 0) -> Tensor:
    """The states (B, L, D) that a U-Net reads, of token ids (B, L), `clip_skip` layers from the end."""
    layers = model.config.num_hidden_layers
    if not 0 <= clip_skip < layers:
        raise ValueError(
            f"clip_skip {clip_skip} is out of range; this text encoder has {layers} layers: 0..{layers - 1}"
        )
    ids = ids.to(next(model.parameters()).device)
    if clip_skip == 0:
        return model(ids).last_hidden_state
    states = model(ids, output_hidden_states=True).hidden_states
    return model.text_model.final_layer_norm(states[-1 - clip_skip])


def encode_prompt(
    tokenizer: ClipTokenizer, model: CLIPTextModel, text: str, clip_skip: int = 0, rule: str = "a1111"
) -> Cond:
    """Cond(context (1, n * L, D)) of one prompt of any length, read in n chunks of L tokens side by side.

    clip_skip: layers left out at the end, in diffusers' count: 0 reads the last layer, and the web interface's
               "Clip skip 2" is 1 here. The text encoders of Stable Diffusion 2 folders end at the layer that the
               denoiser was trained with, one before the original's last: 0 is right for them.
    rule:      how weights act on the states z of a chunk. "a1111" multiplies them by the weights and then scales the
               chunk so that its mean is what it was; "comfy" moves them along the line from the empty prompt's
               states, z_empty + weight * (z - z_empty), and leaves alone what has weight 1; "none" takes the text
               literally, brackets and all. The syntax is one for both: ComfyUI's own has no square brackets and no
               BREAK, and there an inner (word:1.2) replaces the weight of what is around it.
    Raises ValueError for a rule that is not known, a clip_skip out of range, or a weight that is no number (`parse`).
    """
    check_rule(rule)
    sections = ((Piece(text),),) if rule == "none" else parse(text)
    rows = list(_chunks(tokenizer, sections))
    ids = torch.tensor([row.ids for row in rows], dtype=torch.int64)  # (n, L)
    z = token_states(model, ids, clip_skip)  # (n, L, D)
    if any(weight != 1 for row in rows for weight in row.weights):
        weights = torch.tensor([row.weights for row in rows], dtype=torch.float32, device=z.device)[..., None]
        if rule == "a1111":
            z = _scaled(z, weights)
        else:
            z = _drawn_out(z, weights, token_states(model, tokenizer([""]), clip_skip))
    return Cond(context=z.flatten(0, 1)[None])  # (1, n * L, D)


def _scaled(z: Tensor, weights: Tensor) -> Tensor:
    """States (n, L, D) times weights (n, L, 1), each chunk scaled back to its mean (the web interface's rule).

    A mean that is zero but for rounding, as an untrained tower's is, says nothing; such a chunk is not scaled back.
    """
    old = z.float()
    new = old * weights
    before, after = (t.mean(dim=(1, 2), keepdim=True) for t in (old, new))  # (n, 1, 1)
    means_something = torch.minimum(before.abs(), after.abs()) > 1e-5 * old.abs().mean(dim=(1, 2), keepdim=True)
    return (new * torch.where(means_something, before / after, 1.0)).to(z.dtype)


def _drawn_out(z: Tensor, weights: Tensor, empty: Tensor) -> Tensor:
    """States (n, L, D) moved from the empty prompt's (1, L, D) by weights (n, L, 1) (ComfyUI's rule)."""
    moved = (empty.float() + weights * (z.float() - empty.float())).to(z.dtype)
    return torch.where(weights == 1, z, moved)


@dataclass(frozen=True)
class _Chunk:
    """Ids and weights of one row for the tower, start, end and padding included."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class _Unit:
    """Token ids that stay together: one piece of a word, or all vectors of a textual inversion."""

    ids: tuple[int, ...]
    weight: float


def _units(tokenizer: ClipTokenizer, section: Sequence[Piece]) -> Iterator[_Unit]:
    """The tokens of a section in order; what shares its place in the text is one unit."""
    for piece, encoding in zip(section, tokenizer.pieces([piece.text for piece in section]), strict=True):
        for _, group in groupby(zip(encoding.offsets, encoding.ids, strict=True), key=lambda pair: pair[0]):
            yield _Unit(tuple(i for _, i in group), piece.weight)


def _chunks(tokenizer: ClipTokenizer, sections: Sequence[Sequence[Piece]]) -> Iterator[_Chunk]:
    """Rows of tokens: sections begin new ones, and a section that is too long is broken.

    Where a comma stands among the last 20 tokens of a full row, what follows it moves on to the next row, as in the
    web interface. A section without tokens makes a row of padding, but not at the end.
    """
    room = tokenizer.max_length - 2
    for number, section in enumerate(sections):
        units = list(_units(tokenizer, section))
        rows = list(_broken(units, room, tokenizer.vocabulary.get(",</w>")))
        last = number == len(sections) - 1
        for row in rows or ([] if last and number > 0 else [[]]):
            ids = [i for unit in row for i in unit.ids]
            weights = [unit.weight for unit in row for _ in unit.ids]
            padding = room - len(ids)
            yield _Chunk(
                [tokenizer.bos_id, *ids, tokenizer.eos_id, *[tokenizer.pad_id] * padding],
                [1.0, *weights, 1.0, *[1.0] * padding],
            )


def _broken(units: Sequence[_Unit], room: int, comma: int | None) -> Iterator[list[_Unit]]:
    """Rows of at most `room` tokens."""
    row: list[_Unit] = []
    taken = 0
    after: tuple[int, int] | None = None  # units and tokens of the row up to its last comma, which is counted in
    for unit in units:
        if len(unit.ids) > room:
            raise ValueError(f"a word stands for {len(unit.ids)} tokens, but a chunk holds {room}; use a shorter one")
        is_comma = unit.ids == (comma,)
        if taken == room and after is not None and not is_comma and taken - after[1] < COMMA_REACH:
            yield row[: after[0]]
            row, taken, after = row[after[0] :], taken - after[1], None
        if taken + len(unit.ids) > room:
            yield row
            row, taken, after = [], 0, None
        row.append(unit)
        taken += len(unit.ids)
        if is_comma:
            after = len(row), taken
    if row:
        yield row


def condition(
    tokenizer: ClipTokenizer | BertTokenizer | None,
    text_encoder: CLIPTextModel | LDMBertModel | ClassEmbedder | None,
    text: str,
    clip_skip: int = 0,
    rule: str = "a1111",
) -> Cond:
    """What one text tells the network, whichever the model's text encoder; the empty text is the unconditional one.

    CLIP:           `encode_prompt`.
    LDMBertModel:   Cond(context (1, L, D)) of the text as it stands, cut to L tokens.
    ClassEmbedder:  Cond(context (1, 1, D)) of a class given by its number; the empty text is the last row, no class.
    None:           Cond(), of an unconditional model.
    Raises ValueError for a text that is no class number, a text for an unconditional model, a clip_skip for another
    encoder than CLIP, and what `encode_prompt` refuses; TypeError when tokenizer and encoder are of two kinds.
    """
    if isinstance(text_encoder, CLIPTextModel):
        if not isinstance(tokenizer, ClipTokenizer):
            raise TypeError(f"a CLIP text encoder with a {type(tokenizer).__name__}; give a ClipTokenizer")
        return encode_prompt(tokenizer, text_encoder, text, clip_skip, rule)
    check_rule(rule)
    if clip_skip:
        raise ValueError(f"clip_skip = {clip_skip} is for CLIP text encoders, which this model has not; leave it at 0")
    if text_encoder is None:
        if text.strip():
            raise ValueError(f"this model is unconditional and takes no prompt; leave {text!r} out")
        return Cond()
    device = next(text_encoder.parameters()).device
    with torch.no_grad():
        if isinstance(text_encoder, ClassEmbedder):
            label = torch.tensor([_label(text, text_encoder.config.num_classes)], device=device)  # (1,)
            return Cond(context=text_encoder(label))
        if not isinstance(tokenizer, BertTokenizer):
            raise TypeError(f"a BERT text encoder with a {type(tokenizer).__name__}; give a BertTokenizer")
        return Cond(context=text_encoder(tokenizer([text]).to(device)).last_hidden_state)


def _label(text: str, classes: int) -> int:
    """The row of the class table that a text names."""
    number = text.strip()
    if not number:
        return classes - 1
    if not number.isdecimal() or int(number) > classes - 2:
        raise ValueError(f"{text!r} is not a class of this model; give a number from 0 to {classes - 2} as the prompt")
    return int(number)


def encode_schedule(
    tokenizer: ClipTokenizer | BertTokenizer | None,
    text_encoder: CLIPTextModel | LDMBertModel | ClassEmbedder | None,
    text: str,
    steps: int,
    clip_skip: int = 0,
    rule: str = "a1111",
    cache: Cache | None = None,
) -> list[tuple[int, Cond]]:
    """The conditions of a prompt along `steps` steps: (last step, Cond), as `diffusion.guidance.Turns` takes them.

    Only prompts for CLIP have changes along the way, and not under the rule "none".
    cache: conditions by (text, clip_skip, rule), looked up and added to. It belongs to the caller, who empties it when
           the text encoder changes. Equal texts are encoded once in any case, and give the same object.
    Raises what `schedule` and `condition` raise.
    """
    literal = rule == "none" or not isinstance(text_encoder, CLIPTextModel)
    turns = [(steps, text)] if literal else schedule(text, steps)
    known: Cache = {} if cache is None else cache
    for _, words in turns:
        key = words, clip_skip, rule
        if key not in known:
            known[key] = condition(tokenizer, text_encoder, words, clip_skip, rule)
    return [(end, known[words, clip_skip, rule]) for end, words in turns]
