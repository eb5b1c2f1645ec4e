"""A model's text towers taken together: what a text tells its network, whichever towers there are.

B texts, L tokens, D width, P width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.cond import Cond
from sfumato.models.bert import LDMBertModel
from sfumato.models.classes import ClassEmbedder
from sfumato.models.clip import CLIPTextModel
from sfumato.models.t5 import T5EncoderModel
from sfumato.text.bert import BertTokenizer
from sfumato.text.encode import encode_prompt, encode_prompts
from sfumato.text.prompt import check_rule, parse, schedule
from sfumato.text.t5 import T5_LENGTH, T5Tokenizer
from sfumato.text.tokenizer import ClipTokenizer

TextEncoder = CLIPTextModel | LDMBertModel | ClassEmbedder | T5EncoderModel
Tokenizer = ClipTokenizer | BertTokenizer | T5Tokenizer
Cache = dict[tuple[str, int, str], Cond]
Clip = tuple[ClipTokenizer, CLIPTextModel]


@dataclass(frozen=True)
class Towers:
    """The text encoders of a model in their order, with their tokenizers; None where a place is empty.

    Their kinds decide how a text is read:
    none:            Cond(), of an unconditional model.
    ClassEmbedder:   Cond(context (1, 1, D)) of a class given by its number; the empty text is the last row, no class.
    LDMBertModel:    Cond(context (1, L, D)) of the text as it stands, cut to L tokens.
    CLIP, alone:     Cond(context (1, n * L, D)), see `encode_prompt`.
    CLIP, second:    as Stable Diffusion XL does, with the first one or without: the states of the last layer but one
                     side by side in width, without the final norm, and pooled (1, P), what the second one projects.
    T5EncoderModel:  after CLIP towers, as Stable Diffusion 3 does, see `joint`.
    joint:           the width of the context of a transformer, None for a U-Net. The CLIP towers, however many, are
                     read as in a pair and filled up with zeros to that width; what T5 says of the text without its
                     weights follows, zeros where it is missing; pooled (1, P) is what all towers project, side by
                     side. A context that the CLIP towers fill by themselves has no such second part.
    zeros_for_empty: an empty negative prompt gives zeros, not what the towers make of no words.
    """

    encoders: tuple[TextEncoder | None, ...] = ()
    tokenizers: tuple[Tokenizer | None, ...] = ()
    zeros_for_empty: bool = False
    joint: int | None = None

    @property
    def present(self) -> list[TextEncoder]:
        """Those that are there."""
        return [encoder for encoder in self.encoders if encoder is not None]

    @property
    def clips(self) -> list[Clip]:
        """The CLIP towers with their tokenizers; TypeError for a tokenizer of another kind."""
        found = []
        for encoder, tokenizer in zip_longest(self.encoders, self.tokenizers):
            if isinstance(encoder, CLIPTextModel):
                if not isinstance(tokenizer, ClipTokenizer):
                    raise TypeError(f"a CLIP text encoder with a {type(tokenizer).__name__}; give a ClipTokenizer")
                found.append((tokenizer, encoder))
        return found

    @property
    def paired(self) -> bool:
        """Whether they are read as Stable Diffusion XL's: there is a second one."""
        return any(encoder is not None for encoder in self.encoders[1:])

    @property
    def t5(self) -> tuple[T5Tokenizer, T5EncoderModel] | None:
        """T5 with its tokenizer, None where it is missing; TypeError for a tokenizer of another kind."""
        for encoder, tokenizer in zip_longest(self.encoders, self.tokenizers):
            if isinstance(encoder, T5EncoderModel):
                if not isinstance(tokenizer, T5Tokenizer):
                    raise TypeError(f"a T5 text encoder with a {type(tokenizer).__name__}; give a T5Tokenizer")
                return tokenizer, encoder
        return None

    @property
    def lacks_t5(self) -> bool:
        """Whether zeros stand for what T5 would say."""
        wide = sum(encoder.config.hidden_size for _, encoder in self.clips)
        return self.joint is not None and wide < self.joint and self.t5 is None

    def replaced(self, tokenizers: Sequence[ClipTokenizer]) -> Towers:
        """The same with other tokenizers for the CLIP towers, in their order."""
        others = iter(tokenizers)
        pairs = zip_longest(self.encoders, self.tokenizers)
        return replace(self, tokenizers=tuple(next(others) if isinstance(e, CLIPTextModel) else t for e, t in pairs))

    def condition(self, text: str, clip_skip: int = 0, rule: str = "a1111") -> Cond:
        """What one text tells the network; the empty text is the unconditional one.

        clip_skip, rule: see `encode_prompt`; in a pair, clip_skip counts from the layer that is read there.
        Raises ValueError for a text that is no class number, a text for an unconditional model, a clip_skip for
        another encoder than CLIP, and what `encode_prompt` refuses; TypeError for a tokenizer of another kind.
        """
        if self.clips:
            plain = text if rule == "none" else _unweighted(text)
            return self._read(lambda clip: encode_prompt(*clip, text, clip_skip, rule, self._bare), [plain], clip_skip)
        check_rule(rule)
        if clip_skip:
            raise ValueError(
                f"clip_skip = {clip_skip} is for CLIP text encoders, which this model has not; leave it at 0"
            )
        if not self.present:
            if text.strip():
                raise ValueError(f"this model is unconditional and takes no prompt; leave {text!r} out")
            return Cond()
        return _other(self.present[0], self.tokenizers[0] if self.tokenizers else None, text)

    def captions(self, texts: Sequence[str], clip_skip: int = 0) -> Cond:
        """What some plain texts tell the network, cut to one chunk each, one row a text; for CLIP towers.

        Brackets mean themselves here, see `encode_prompts`. ValueError for a model without CLIP towers.
        """
        if not self.clips:
            raise ValueError("this model has no CLIP text encoder; read its texts one by one with `condition`")
        return self._read(lambda clip: encode_prompts(*clip, texts, clip_skip, self._bare), texts, clip_skip)

    def along(
        self,
        text: str,
        steps: int,
        clip_skip: int = 0,
        rule: str = "a1111",
        cache: Cache | None = None,
        negative: bool = False,
    ) -> list[tuple[int, Cond]]:
        """The conditions of a prompt along `steps` steps: (last step, Cond), as `diffusion.guidance.Turns` takes them.

        Only prompts for CLIP have changes along the way, and not under the rule "none".
        cache: conditions by (text, clip_skip, rule), looked up and added to. It belongs to the caller, who empties it
               when an encoder changes. Equal texts are encoded once in any case, and give the same object.
        negative: it is the negative prompt, for which `zeros_for_empty` holds.
        Raises what `schedule` and `condition` raise.
        """
        literal = rule == "none" or not self.clips
        turns = [(steps, text)] if literal else schedule(text, steps)
        known: Cache = {} if cache is None else cache
        for _, words in turns:
            key = words, clip_skip, rule
            if key not in known:
                known[key] = self.condition(words, clip_skip, rule)
        conds = [(end, words, known[words, clip_skip, rule]) for end, words in turns]
        empty = negative and self.zeros_for_empty
        return [(end, zeros_like(cond) if empty and not words.strip() else cond) for end, words, cond in conds]

    @property
    def _bare(self) -> bool:
        """Whether the CLIP towers are read one layer earlier."""
        return self.paired or self.joint is not None

    def _read(self, encode: Callable[[Clip], Cond], texts: Sequence[str], clip_skip: int) -> Cond:
        """What the CLIP towers say, each read by `encode`, taken together; texts: as T5 is to read them."""
        conds = [encode(clip) for clip in self.clips]
        if not self._bare:
            return conds[0]
        length = max(_states(cond).shape[1] for cond in conds)
        columns = []
        for clip, cond in zip(self.clips, conds, strict=True):
            states = _states(cond)  # (B, n * L, D)
            if states.shape[1] < length:  # one tokenizer's chunks are fewer: empty ones follow
                empty = _states(encode_prompt(*clip, "", clip_skip, "none", bare=True))  # (1, L, D)
                more = (length - states.shape[1]) // empty.shape[1]
                states = torch.cat([states, empty.expand(len(states), -1, -1).repeat(1, more, 1)], dim=1)
            columns.append(states)
        context = torch.cat(columns, dim=-1)
        if self.joint is None:
            return Cond(context, conds[-1].pooled)
        vectors = [cond.pooled for cond in conds if cond.pooled is not None]
        if len(vectors) < len(conds):
            raise ValueError(
                "a transformer reads what its CLIP text encoders project, but one of them has no projection"
            )
        return Cond(self.joined(context, texts), torch.cat(vectors, dim=-1))

    def joined(self, context: Tensor, texts: Sequence[str], length: int = T5_LENGTH) -> Tensor:
        """CLIP's states (B, L, D) at the joint width, and T5's, or zeros for these, after them; length: of the latter.

        Raises ValueError where they are too wide for the transformer.
        """
        assert self.joint is not None
        rest, t5 = self.joint - context.shape[-1], self.t5
        if rest < 0 or (t5 is not None and t5[1].config.d_model != self.joint):
            wide = context.shape[-1] if t5 is None else (context.shape[-1], t5[1].config.d_model)
            raise ValueError(f"text encoders {wide} wide; the transformer reads {self.joint}: take those of its model")
        if rest == 0 and t5 is None:
            return context
        context = F.pad(context, (0, rest))
        if t5 is None:
            return torch.cat([context, context.new_zeros(len(context), length, self.joint)], dim=1)
        tokenizer, encoder = T5Tokenizer(t5[0].backend, length), t5[1]
        with torch.no_grad():
            states = encoder(tokenizer(texts).to(encoder.device)).last_hidden_state
        return torch.cat([context, states.to(context)], dim=1)


def _unweighted(text: str) -> str:
    """A prompt without its brackets and weights."""
    return " ".join("".join(piece.text for piece in section) for section in parse(text))


def zeros_like(cond: Cond) -> Cond:
    """A condition of zeros in the shape of another."""
    return Cond(*(None if part is None else torch.zeros_like(part) for part in cond.parts))


def _states(cond: Cond) -> Tensor:
    assert cond.context is not None
    return cond.context


def _other(encoder: TextEncoder, tokenizer: Tokenizer | None, text: str) -> Cond:
    """What an encoder of another kind than CLIP says of a text."""
    device = next(encoder.parameters()).device
    with torch.no_grad():
        if isinstance(encoder, ClassEmbedder):
            label = torch.tensor([_label(text, encoder.config.num_classes)], device=device)  # (1,)
            return Cond(context=encoder(label))
        if not isinstance(tokenizer, BertTokenizer):
            raise TypeError(f"a BERT text encoder with a {type(tokenizer).__name__}; give a BertTokenizer")
        assert isinstance(encoder, LDMBertModel)
        return Cond(context=encoder(tokenizer([text]).to(device)).last_hidden_state)


def _label(text: str, classes: int) -> int:
    """The row of the class table that a text names."""
    number = text.strip()
    if not number:
        return classes - 1
    if not number.isdecimal() or int(number) > classes - 2:
        raise ValueError(f"{text!r} is not a class of this model; give a number from 0 to {classes - 2} as the prompt")
    return int(number)
