"""Prompts to conditioning: what one CLIP tower makes of a text; `towers` takes all of a model's together.

B prompts, U distinct prompts, n chunks, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from sfumato.cond import Cond
from sfumato.models.clip import CLIPTextModel
from sfumato.text.prompt import Piece, check_rule, parse
from sfumato.text.tokenizer import ClipTokenizer

COMMA_REACH = 20  # tokens back from the end of a full chunk to a comma after which it may be broken


def encode_prompts(
    tokenizer: ClipTokenizer, model: CLIPTextModel, prompts: Sequence[str], clip_skip: int = 0, bare: bool = False
) -> Cond:
    """Cond(context (B, L, D)) of some plain texts, cut to one chunk each; equal texts are evaluated once.

    Brackets mean themselves here: captions are read in this way. `encode_prompt` reads prompts with their syntax.
    clip_skip: layers left out at the end; 0 reads the last one. The final layer norm applies in any case, as
               with diffusers' `clip_skip` (whose None is our 0).
    bare:      read one layer earlier and without the final norm, and pooled (B, P) where the tower projects.
    Raises TypeError when given a bare string, ValueError when clip_skip is not below the number of layers.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts is the string {prompts!r}; give a list of strings")
    distinct = list(dict.fromkeys(prompts))
    ids = tokenizer(distinct)  # (U, L)
    place = {prompt: i for i, prompt in enumerate(distinct)}
    states, pooled = _read(model, ids, clip_skip, bare)  # (U, L, D), (U, P)
    rows = torch.tensor([place[prompt] for prompt in prompts], dtype=torch.int64, device=states.device)
    return Cond(states[rows], None if pooled is None else pooled[rows])  # (B, L, D), (B, P)


def token_states(model: CLIPTextModel, ids: Tensor, clip_skip: int = 0) -> Tensor:
    """The states (B, L, D) that a U-Net reads, of token ids (B, L), `clip_skip` layers from the end."""
    return _read(model, ids, clip_skip, bare=False)[0]


@torch.no_grad()  # not inference_mode: a U-Net in training keeps the states for its backward pass
def _read(model: CLIPTextModel, ids: Tensor, clip_skip: int, bare: bool) -> tuple[Tensor, Tensor | None]:
    """The states (B, L, D) of token ids (B, L), and if bare the projected vectors (B, P) of a tower that projects."""
    layers = model.config.num_hidden_layers - bare
    if not 0 <= clip_skip < layers:
        which = "layers before the last" if bare else "layers"
        raise ValueError(
            f"clip_skip {clip_skip} is out of range; this text encoder has {layers} {which}: 0..{layers - 1}"
        )
    ids = ids.to(next(model.parameters()).device)
    if clip_skip == 0 and not bare:
        return model(ids).last_hidden_state, None
    out = model(ids, output_hidden_states=True)
    states = out.hidden_states[-1 - clip_skip - bare]
    return (states, out.text_embeds) if bare else (model.text_model.final_layer_norm(states), None)


def encode_prompt(
    tokenizer: ClipTokenizer,
    model: CLIPTextModel,
    text: str,
    clip_skip: int = 0,
    rule: str = "a1111",
    bare: bool = False,
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
    bare:      read one layer earlier and without the final norm, as towers are that are read together; then also
               pooled (1, P), what a tower that projects says of the first chunk, whatever the weights.
    Raises ValueError for a rule that is not known, a clip_skip out of range, or a weight that is no number (`parse`).
    """
    check_rule(rule)
    sections = ((Piece(text),),) if rule == "none" else parse(text)
    rows = list(_chunks(tokenizer, sections))
    ids = torch.tensor([row.ids for row in rows], dtype=torch.int64)  # (n, L)
    z, pooled = _read(model, ids, clip_skip, bare)  # (n, L, D), (n, P)
    if any(weight != 1 for row in rows for weight in row.weights):
        weights = torch.tensor([row.weights for row in rows], dtype=torch.float32, device=z.device)[..., None]
        if rule == "a1111":
            z = _scaled(z, weights)
        else:
            z = _drawn_out(z, weights, _read(model, tokenizer([""]), clip_skip, bare)[0])
    return Cond(z.flatten(0, 1)[None], None if pooled is None else pooled[:1])  # (1, n * L, D), (1, P)


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
