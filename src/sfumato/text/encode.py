"""Prompts to conditioning: token states of the CLIP tower, the context of Stable Diffusion 1.x and 2.x.

B prompts, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.cond import Cond
from sfumato.models.clip import CLIPTextModel
from sfumato.text.tokenizer import ClipTokenizer


def encode_prompts(tokenizer: ClipTokenizer, model: CLIPTextModel, prompts: Sequence[str], clip_skip: int = 0) -> Cond:
    """Cond(context (B, L, D)) of some prompts; equal prompts are evaluated once.

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
