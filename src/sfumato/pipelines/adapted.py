"""Adapters and learned words that stay on a model until they are taken off, under the names that notebooks use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from sfumato.text.tokenizer import ClipTokenizer
from sfumato.text.towers import Clip, Towers
from sfumato.weights.adapters import Adapter, AdapterHost, Lexicon, read_adapter
from sfumato.weights.adapters.inversion import Embedding, share
from sfumato.weights.hub import Kind, fetch, find_file, parse_id
from sfumato.weights.parts import Denoiser

Strengths = Mapping[str, float]


class Adapted:
    """What a denoiser, the text encoders and their tokenizers wear.

    loaded:  adapters by name; active: those that count, with their strengths; fused: what stays on whatever is active.
    learned: words, each with the place of the text encoder that knows it.
    """

    def __init__(self, denoiser: Denoiser, towers: Towers) -> None:
        self.parts = denoiser, towers
        self.host = AdapterHost(denoiser, *towers.encoders)
        self.words = Lexicon(towers)
        self.loaded: dict[str, Adapter] = {}
        self.active: dict[str, float] = {}
        self.fused: dict[str, tuple[Adapter, float]] = {}
        self.enabled = True
        self.learned: tuple[tuple[int, Embedding], ...] = ()

    def tokenizer(self, place: int = 0) -> ClipTokenizer | None:
        """The tokenizer that knows the learned words of the text encoder at a place; None where that is no CLIP."""
        host = self.words.hosts.get(place)
        return None if host is None else host.tokenizer

    @property
    def clips(self) -> list[Clip]:
        """The CLIP text encoders with the tokenizers that know their learned words."""
        return self.parts[1].replaced(self.words.tokenizers).clips

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
            self._know(self.learned)
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

    def learn(self, word: Embedding, place: int | None = None) -> None:
        """Know a learned word, in all text encoders or in the one at a place.

        Raises ValueError for one that does not fit; then nothing changes.
        """
        there = list(self.words.hosts)
        places = there if place is None else [place]
        whole = there == [0] or (word.second is None and len(places) == 1)  # nothing to part among towers
        fresh = [(one, word if whole else share(word, one)) for one in places]
        self._know((*self.learned, *fresh))
        self.learned = (*self.learned, *fresh)

    def forget(self, names: Sequence[str] | None) -> None:
        """Forget learned words, or all; ValueError for one that is not known."""
        known = list(dict.fromkeys(word.name for _, word in self.learned))
        missing = [name for name in names or () if name not in known]
        if missing:
            raise ValueError(f"no word {missing[0]!r} was learned; learned: {', '.join(known) or 'none'}")
        self.learned = tuple(one for one in self.learned if names is not None and one[1].name not in names)
        self._know(self.learned)

    def _know(self, words: Sequence[tuple[int, Embedding]]) -> None:
        """Have each text encoder know its words and no others; as before where one does not fit."""
        before = self.learned
        try:
            for place, host in self.words.hosts.items():
                host.apply([word for one, word in words if one == place])
        except ValueError:
            for place, host in self.words.hosts.items():
                host.apply([word for one, word in before if one == place])
            raise


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
