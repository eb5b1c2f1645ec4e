"""Teach the built-in CLIP text tower what words mean, by distillation from a sentence model.

The tower starts from the teacher's word vectors (reduced to its width by principal components) and learns
  * sentence: the state at the end token, through a linear head, is the teacher's vector of the whole text;
  * similarity: which texts of a batch resemble which, as a cross-entropy of softened similarity rows;
  * word: the state at each word, through a second head, is the teacher's vector of that word alone;
  * previous: the state at each word, through a third head, is the vector of the content word before it,
    so that the noun's own state knows its colour.
The heads are dropped afterwards: a U-Net reads the states. Hinton et al. 2015 (distillation), Park et al.
2019 (relational distillation).

B texts, L tokens, D tower width, T = 384 teacher width, N texts of the corpus, W words.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.files import replacing, write_json
from sfumato.models.clip import CLIPTextConfig, CLIPTextModel
from sfumato.text.tokenizer import WORD_END, ClipTokenizer, train_vocabulary
from sfumato.train.loop import atomic_save
from sfumato.train.phrases import EMPTY_WORDS, Corpus, build_corpus, emoji_names, foreign_names, whole_words
from sfumato.train.teacher import SentenceModel, teacher_folder
from sfumato.weights.safe import write_tensors

Progress = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class DistillConfig:
    """What to teach, to which tower, and how; the `text:` part of a recipe."""

    packages: str = "node_modules"  # folder that holds the npm packages emojibase-data and emojilib
    vocabulary_size: int = 12_000
    max_length: int = 32  # tokens
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    phrases_per_name: int = 2  # captions for each emoji label or search word
    phrases_per_word: int = 2  # captions for each word near an emoji label
    pairs: int = 6_000  # captions of two things
    languages: tuple[str, ...] = ()  # whose emoji names are taught besides; folders of emojibase-data
    typos_per_name: int = 0  # misspellings of each emoji label
    common_words: int = 16_000  # how many of the teacher's words are taught, the most common first
    near_words: int = 4_000  # how many of these count as near an emoji label
    steps: int = 1_000
    batch: int = 128
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    temperature: float = 0.05
    similarity_weight: float = 0.2
    word_weight: float = 0.5
    previous_weight: float = 0.25
    full_length_share: float = 0.04  # batches in which the padding states are taught as well
    checkpoint_every: int = 250
    seed: int = 0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DistillConfig:
        """Read the `text:` part of a recipe; raises ValueError naming an option that does not exist."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(raw) - set(known))
        if unknown:
            raise ValueError(f"unknown options {unknown} of the text part; known: {known}")
        return cls(**{**raw, "languages": tuple(raw.get("languages", ()))})


@dataclass(frozen=True)
class Lessons:
    """The corpus as tensors.

    ids:      (N, L) token ids, padded.
    lengths:  (N,) tokens of each text, start and end included.
    own:      (N, L) the word that ends at this token, -1 for none.
    previous: (N, L) the content word before that word, -1 for none.
    targets:  (N, T) the teacher's vectors of the texts.
    words:    (W, T) the teacher's vectors of the words alone.
    """

    ids: Tensor
    lengths: Tensor
    own: Tensor
    previous: Tensor
    targets: Tensor
    words: Tensor

    def __getitem__(self, rows: Tensor) -> Lessons:
        """The texts `rows`, all words."""
        ids, lengths, own = self.ids[rows], self.lengths[rows], self.own[rows]
        return Lessons(ids, lengths, own, self.previous[rows], self.targets[rows], self.words)


class Heads(nn.Module):
    """The linear maps from states to the teacher's space; used in training only."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        self.sentence = nn.Linear(width, teacher_width)
        self.word = nn.Linear(width, teacher_width)
        self.previous = nn.Linear(width, teacher_width)


def distill(config: DistillConfig, out: Path | str, progress: Progress | None = None) -> Path:
    """Teach a tower and write out/tokenizer and out/text_encoder (float32); returns `out`.

    A run that was interrupted continues from out/checkpoint.pt and ends with the same weights as an
    uninterrupted one. out/lessons.safetensors keeps the teacher's answers and out/heads.safetensors the
    heads. progress receives (step, steps, {"loss": ..., "texts_per_s": ...}) after every step. Raises
    ValueError when `out` holds a run of another config.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    teacher = SentenceModel(teacher_folder())
    tokenizer, lessons = prepare(config, teacher, out, progress)
    model, heads = new_tower(config, tokenizer, teacher)
    optimizer = _optimizer(config, model, heads)
    first = _restore(config, out / "checkpoint.pt", model, heads, optimizer)
    started, seen = time.perf_counter(), 0
    for step in range(first, config.steps):
        rows, full = batch_rows(config, lessons.lengths, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        losses = losses_of(config, model, heads, lessons[rows], full, step)
        total = losses["loss"]
        total.backward()
        torch.nn.utils.clip_grad_norm_([*model.parameters(), *heads.parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += len(rows)
        if progress is not None:
            speed = {"texts_per_s": seen / (time.perf_counter() - started)}
            progress(step + 1, config.steps, {name: part.item() for name, part in losses.items()} | speed)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            _checkpoint(config, out / "checkpoint.pt", model, heads, optimizer, step + 1)
    save_tower(model, tokenizer, out)
    write_tensors(out / "heads.safetensors", heads.state_dict())
    return out


def learning_rate(config: DistillConfig, step: int) -> float:
    """Linear warm-up, then a cosine to a hundredth of the full rate."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def batch_rows(config: DistillConfig, lengths: Tensor, step: int) -> tuple[Tensor, bool]:
    """The texts of a step, of similar length, and whether they are padded in full.

    A function of seed and step alone, which is what makes resuming exact.
    """
    per_epoch = max(1, len(lengths) // config.batch)
    epoch, place = divmod(step, per_epoch)
    draw = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
    order = torch.randperm(len(lengths), generator=draw)
    pools = [pool[lengths[pool].argsort(stable=True)] for pool in order.split(32 * config.batch)]
    batches = torch.cat(pools)[: per_epoch * config.batch].split(config.batch)
    turn = torch.randperm(len(batches), generator=draw)
    full = torch.rand(len(batches), generator=draw) < config.full_length_share
    return batches[int(turn[place])], bool(full[place])


def losses_of(
    config: DistillConfig, model: CLIPTextModel, heads: Heads, batch: Lessons, full: bool, step: int
) -> dict[str, Tensor]:
    """The weighted loss of a batch under "loss", and its four parts."""
    size = len(batch.ids)
    length = batch.ids.shape[1] if full else int(batch.lengths.max())
    states = model(batch.ids[:, :length]).last_hidden_state  # (B, L, D)
    place = batch.lengths - 1
    if full:  # any of the padding tokens must know the text, since a U-Net reads them all
        draw = torch.Generator().manual_seed(step)
        place = place + (torch.rand(size, generator=draw) * (length - place)).long()
    sentence = F.normalize(heads.sentence(states[torch.arange(size), place]), dim=-1)  # (B, T)
    targets = batch.targets.float()
    alike = F.softmax(targets @ targets.T / config.temperature, dim=-1)  # (B, B)
    guess = F.log_softmax(sentence @ targets.T / config.temperature, dim=-1)  # (B, B)
    parts = {
        "sentence": 1 - (sentence * targets).sum(-1).mean(),
        "similarity": F.kl_div(guess, alike, reduction="batchmean"),
        "word": _word_loss(heads.word, states, batch.own[:, :length], batch.words),
        "previous": _word_loss(heads.previous, states, batch.previous[:, :length], batch.words),
    }
    weights = (1.0, config.similarity_weight, config.word_weight, config.previous_weight)
    total = torch.stack([weight * part for weight, part in zip(weights, parts.values(), strict=True)]).sum()
    return {"loss": total, **{name: part.detach() for name, part in parts.items()}}


def _word_loss(head: nn.Linear, states: Tensor, index: Tensor, words: Tensor) -> Tensor:
    here = index >= 0  # (B, L)
    if not bool(here.any()):
        return states.new_zeros(())
    guess = F.normalize(head(states[here]), dim=-1)  # (M, T)
    return 1 - (guess * words[index[here].long()].float()).sum(-1).mean()


def prepare(
    config: DistillConfig, teacher: SentenceModel, out: Path, progress: Progress | None = None
) -> tuple[ClipTokenizer, Lessons]:
    """The vocabulary and the lessons, read from out/tokenizer and out/lessons.safetensors, or made there."""
    path = out / "lessons.safetensors"
    mark = _fingerprint(config)
    if path.exists():
        with safe_open(path, framework="pt") as file:
            if file.metadata().get("config") != mark:
                raise ValueError(f"{path} belongs to another configuration; give another folder or delete it")
            parts = {f.name: file.get_tensor(f.name) for f in dataclasses.fields(Lessons)}
        return ClipTokenizer.from_folder(out / "tokenizer"), Lessons(**parts)
    pieces = sorted(teacher.tokenizer.get_vocab().items(), key=lambda item: item[1])
    common = whole_words(piece for piece, _ in pieces)[: config.common_words]
    labels, tags = emoji_names(Path(config.packages))
    corpus = build_corpus(
        labels,
        tags,
        common,
        nearest(common, labels, teacher, config.near_words),
        config.phrases_per_name,
        config.phrases_per_word,
        config.pairs,
        config.seed,
        foreign_names(Path(config.packages), config.languages),
        config.typos_per_name,
    )
    repeated = (word for word, weight in corpus.words for _ in range(weight))
    tokenizer = train_vocabulary(repeated, config.vocabulary_size, config.max_length)
    tokenizer.save(out / "tokenizer")
    lessons = make_lessons(corpus, tokenizer, teacher, progress)
    tensors = {f.name: getattr(lessons, f.name) for f in dataclasses.fields(lessons)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"config": mark})
    return tokenizer, lessons


def nearest(words: Sequence[str], labels: Sequence[str], teacher: SentenceModel, count: int) -> list[str]:
    """The `count` of `words` that most resemble one of `labels` under the teacher, the nearest first.

    Words that stand in a label, and their plurals, are left out.
    """
    taken = {part for label in labels for part in label.split()}
    free = [word for word in words if word not in taken and word.removesuffix("s") not in taken]
    alike = (teacher.embed(free) @ teacher.embed(labels).T).amax(1)  # (W,)
    return [free[i] for i in alike.argsort(descending=True, stable=True)[:count].tolist()]


def make_lessons(
    corpus: Corpus, tokenizer: ClipTokenizer, teacher: SentenceModel, progress: Progress | None = None
) -> Lessons:
    """Token ids, word places and the teacher's vectors of a corpus; vectors are kept in float16."""
    index: dict[str, int] = {}
    own = torch.full((len(corpus.texts), tokenizer.max_length), -1, dtype=torch.int32)
    previous = own.clone()
    lengths = torch.empty(len(corpus.texts), dtype=torch.int64)
    for row, (text, encoding) in enumerate(zip(corpus.texts, tokenizer.pieces(corpus.texts), strict=True)):
        kept = min(len(encoding.ids), tokenizer.max_length - 2)
        lengths[row] = kept + 2
        before, start = -1, 0
        for i in range(kept):
            if not encoding.tokens[i].endswith(WORD_END):
                continue
            word, start = text[encoding.offsets[start][0] : encoding.offsets[i][1]], i + 1
            if word in EMPTY_WORDS or not word.isalnum():
                continue
            number = index.setdefault(word, len(index))
            own[row, i + 1], previous[row, i + 1] = number, before
            before = number

    def report(done: int, count: int) -> None:
        if progress is not None:
            progress(done, count, {"teacher": done / count})

    targets = teacher.embed([corpus.meant.get(text, text) for text in corpus.texts], progress=report)
    words = teacher.embed([corpus.meant.get(word, word) for word in index])
    return Lessons(tokenizer.tokenize(corpus.texts).ids, lengths, own, previous, targets.half(), words.half())


def new_tower(config: DistillConfig, tokenizer: ClipTokenizer, teacher: SentenceModel) -> tuple[CLIPTextModel, Heads]:
    """A tower whose token embeddings are the principal components of the teacher's vectors of the pieces.

    The sentence and word heads start as the way back, so the untaught tower is already a bag of word vectors.
    """
    torch.manual_seed(config.seed)
    width = config.hidden_size
    model = CLIPTextModel(tower_config(config, tokenizer))
    heads = Heads(width, teacher.width)
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "fc2.weight")):
            nn.init.normal_(parameter, std=(width * 2 * config.num_hidden_layers) ** -0.5)
        elif name.endswith("position_embedding.weight"):
            nn.init.normal_(parameter, std=0.1)
        elif name.endswith("token_embedding.weight"):
            embedding = parameter
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
    ordered = sorted(tokenizer.vocabulary, key=tokenizer.vocabulary.__getitem__)
    vectors = teacher.embed([tokenizer.decode([tokenizer.vocabulary[piece]]) for piece in ordered])  # (V, T)
    mean = vectors.mean(0)
    centred = vectors - mean
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :width]  # (T, D), largest first
    scale = (centred @ axes).square().mean().sqrt()
    with torch.no_grad():
        embedding.copy_(centred @ axes / scale)
        for head in (heads.sentence, heads.word):
            head.weight.copy_(axes * scale)
            head.bias.copy_(mean)
    return model, heads


def tower_config(config: DistillConfig, tokenizer: ClipTokenizer) -> CLIPTextConfig:
    """The tower's `config.json` as a dataclass."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_length,
        hidden_act="quick_gelu",
        projection_dim=config.hidden_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )


def save_tower(model: CLIPTextModel, tokenizer: ClipTokenizer, out: Path) -> None:
    """Write out/text_encoder/{config.json, model.safetensors} in float32 and out/tokenizer."""
    folder = out / "text_encoder"
    tokenizer.save(out / "tokenizer")
    write_json(folder / "config.json", model.config.to_dict())
    write_tensors(folder / "model.safetensors", model.state_dict(), torch.float32)


def _optimizer(config: DistillConfig, model: CLIPTextModel, heads: Heads) -> torch.optim.AdamW:
    named = [*model.named_parameters(), *heads.named_parameters()]
    matrices = [p for name, p in named if p.ndim == 2 and "embedding" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embedding" in name]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def _fingerprint(config: DistillConfig) -> str:
    """Of the options that decide the vocabulary and the lessons."""
    names = (
        "vocabulary_size",
        "max_length",
        "phrases_per_name",
        "phrases_per_word",
        "pairs",
        "common_words",
        "near_words",
        "seed",
    )
    values: list[object] = [getattr(config, name) for name in names]
    if config.languages or config.typos_per_name:
        values += [config.languages, config.typos_per_name]
    return hashlib.sha256(repr(values).encode()).hexdigest()


def _checkpoint(
    config: DistillConfig,
    path: Path,
    model: CLIPTextModel,
    heads: Heads,
    optimizer: torch.optim.AdamW,
    step: int,
) -> None:
    state = {
        "step": step,
        "config": dataclasses.asdict(config),
        "model": model.state_dict(),
        "heads": heads.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    atomic_save(state, path)


def _restore(
    config: DistillConfig, path: Path, model: CLIPTextModel, heads: Heads, optimizer: torch.optim.AdamW
) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    free = ("packages", "checkpoint_every")
    now = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    changed = sorted(k for k, v in now.items() if state["config"].get(k) != v)
    if changed:
        raise ValueError(f"{path} was made with other values of {changed}; restore them, or give another folder")
    model.load_state_dict(state["model"])
    heads.load_state_dict(state["heads"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
