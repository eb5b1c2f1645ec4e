"""Adapters and learned words that stay on a model until they are taken off, under the names that notebooks use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from sfumato.models.clip import CLIPTextModel
from sfumato.text.tokenizer import ClipTokenizer
from sfumato.text.towers import TextEncoder
from sfumato.weights.adapters import Adapter, AdapterHost, EmbeddingHost, read_adapter, read_embedding
from sfumato.weights.adapters.inversion import Embedding
from sfumato.weights.hub import Kind, fetch, find_file, parse_id
from sfumato.weights.parts import Denoiser

Strengths = Mapping[str, float]


class Adapted:
    """What a denoiser, a text encoder and its tokenizer wear; `encoders` are all that there are, by place, or one.

    loaded: adapters by name; active: those that count, with their strengths; fused: what stays on whatever is active.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        text_encoder: CLIPTextModel,
        tokenizer: ClipTokenizer,
        encoders: Sequence[TextEncoder | None] = (),
    ) -> None:
        self.parts = denoiser, text_encoder, tokenizer
        self.host = AdapterHost(denoiser, *(encoders or (text_encoder,)))
        self.words = EmbeddingHost(tokenizer, text_encoder)
        self.loaded: dict[str, Adapter] = {}
        self.active: dict[str, float] = {}
        self.fused: dict[str, tuple[Adapter, float]] = {}
        self.enabled = True
        self.learned: tuple[Embedding, ...] = ()

    @property
    def tokenizer(self) -> ClipTokenizer:
        """The tokenizer that knows the learned words."""
        return self.words.tokenizer

    def wear(self, scale: float = 1.0) -> None:
        """Put on what is fused, and what is active with its strengths times `scale`."""
        live = self.active if self.enabled else {}
        shares = [(self.loaded[name], strength * scale) for name, strength in live.items() if name not in self.fused]
        self.host.apply([*self.fused.values(), *shares])

    @contextmanager
    def scaled(self, scale: float | None) -> Iterator[None]:
        """The same for a while, with another scale; None changes nothing."""
        if scale is None or scale == 1:
            yield
            return
        self.wear(scale)
        try:
            yield
        finally:
            self.wear()

    @contextmanager
    def bare(self) -> Iterator[None]:
        """For a while nothing but what is fused, and no learned words: the model as it is saved."""
        self.host.apply(list(self.fused.values()))
        self.words.apply([])
        try:
            yield
        finally:
            self.words.apply(self.learned)
            self.wear()

    def load(self, path: Path, name: str | None) -> str:
        """Read an adapter, and let it alone be active, as diffusers does; returns its name.

        Raises FileNotFoundError, or ValueError for a name that is taken or a file that does not fit; then nothing
        changes.
        """
        name = f"default_{len(self.loaded)}" if name is None else name
        if name in self.loaded:
            raise ValueError(f"the adapter name {name!r} is in use; give another, or delete_adapters({name!r}) first")
        before = dict(self.active)
        self.loaded[name] = read_adapter(path, name)
        self.active = {name: 1.0}
        try:
            self.wear()
        except BaseException:
            del self.loaded[name]
            self.active = before
            raise
        return name

    def choose(self, strengths: Strengths) -> None:
        """Let these adapters be active; ValueError for a name that is not loaded."""
        self.known(strengths)
        self.active = dict(strengths)
        self.wear()

    def known(self, names: Sequence[str] | Strengths) -> None:
        """ValueError unless all of these adapters are loaded."""
        missing = [name for name in names if name not in self.loaded]
        if missing:
            raise ValueError(f"no adapter {missing[0]!r} is loaded; loaded: {', '.join(self.loaded) or 'none'}")

    def fuse(self, names: Sequence[str] | None, scale: float) -> None:
        """Let adapters stay on, whatever becomes active: the named ones, or all active ones."""
        self.known(names or ())
        for name in self.active if names is None else names:
            self.fused[name] = self.loaded[name], self.active.get(name, 1.0) * scale
        self.wear()

    def unfuse(self) -> None:
        """Take off what was fused."""
        self.fused.clear()
        self.wear()

    def unload(self) -> None:
        """Forget all adapters; what is fused stays."""
        self.loaded.clear()
        self.active.clear()
        self.wear()

    def delete(self, names: Sequence[str]) -> None:
        """Forget some adapters; ValueError for a name that is not loaded."""
        self.known(names)
        for name in names:
            del self.loaded[name]
            self.active.pop(name, None)
        self.wear()

    def learn(self, path: Path, name: str | None) -> None:
        """Know a learned word; name: its trigger, by default the file's."""
        learned = (*self.learned, read_embedding(path, name))
        self.words.apply(learned)
        self.learned = learned

    def forget(self, names: Sequence[str] | None) -> None:
        """Forget learned words, or all; ValueError for one that is not known."""
        missing = [name for name in names or () if name not in self.words.applied]
        if missing:
            raise ValueError(f"no word {missing[0]!r} was learned; learned: {', '.join(self.words.applied) or 'none'}")
        self.learned = tuple(word for word in self.learned if names is not None and word.name not in names)
        self.words.apply(self.learned)


def located(
    kind: Kind,
    place: str | Path,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    cache: str | Path | None = None,
) -> Path:
    """The file (or folder) of an adapter or a learned word: a path, a name in the models folder, or a hub id.

    Raises FileNotFoundError or ValueError in one line.
    """
    inside = "/".join(part for part in (subfolder, weight_name) if part)
    path = Path(place).expanduser()
    if path.exists():
        found = path / inside if inside else path
        if not found.exists():
            raise FileNotFoundError(f"{path} has no {inside}")
        return found
    if parse_id(str(place)) is None or not (inside or revision):
        try:
            return find_file(kind, str(place))
        except FileNotFoundError:
            if parse_id(str(place)) is None:
                raise
    name = f"{place}/{inside}" if inside else str(place)
    return fetch(f"{name}@{revision}" if revision else name, cache=cache)
