"""Where models are found by name: the models folder, and the hub with its cache on disk.

A path is always taken as it is. A bare name is looked for in the models folder. The network is used for one thing
only: an id such as "owner/name" that neither lies on the disk nor in the hub's cache.
"""

from __future__ import annotations

import difflib
import glob
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sfumato.diffusion.config import CONFIG_NAME
from sfumato.presets import BUILT_IN
from sfumato.weights.folder import ADAPTER, CONFIG, INDEX, WEIGHTS, choose, read_index, shards
from sfumato.weights.layouts import LAYOUTS

Kind = Literal["model", "lora", "embedding", "vae"]
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
PREFERRED = (".safetensors", ".ckpt")  # of a repository's single files, the kinds to choose from
MODELS = "SFUMATO_MODELS"
# What other programs call the folders for each kind, in lower case.
FOLDERS: Mapping[str, Kind] = {
    "checkpoints": "model",
    "stable-diffusion": "model",
    "diffusers": "model",
    "unet": "model",
    "diffusion_models": "model",
    "lora": "lora",
    "loras": "lora",
    "lycoris": "lora",
    "embedding": "embedding",
    "embeddings": "embedding",
    "textual_inversion": "embedding",
    "vae": "vae",
    "vaes": "vae",
}
HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<inside>[^@\\]+))?(?:@(?P<revision>[^@\\]+))?", re.ASCII)
TEXTS = (".json", ".txt", ".model")  # of a part's files, those that are not weights and are small
SECONDS = 20.0  # for the hub to answer with a list of files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubId:
    """A place on the hub: "owner/name", then optionally "/file or folder" and "@revision"."""

    repo: str
    inside: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Plan:
    """What of a repository is needed: names to fetch, and the file or folder among them to open."""

    names: tuple[str, ...]
    place: str


def models_folder() -> Path:
    """The folder for models of one's own: $SFUMATO_MODELS, else `sfumato/models` among the user's data files."""
    chosen = os.environ.get(MODELS)
    if chosen:
        return Path(chosen).expanduser()
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "sfumato" / "models"


def find_model(name: str, kind: Kind = "model", dtype: torch.dtype | None = None) -> Path:
    """The file or folder of a model: a path, a name in the models folder, or else a hub id, which is fetched.

    dtype: the precision that it is wanted in, see `folder.choose`.
    Raises FileNotFoundError or ValueError in one line.
    """
    try:
        return find_file(kind, name)
    except FileNotFoundError:
        # A text that begins with a folder of the disk is a path with a slip in it, no id.
        if parse_id(name) is None or Path(name).parts[0] in os.listdir():
            raise
    return fetch(name, dtype=dtype)


def find_file(kind: Kind, name: str) -> Path:
    """A path as it is, else the file (or model folder) called `name` below the models folder.

    Names are compared without suffix and in lower case. What lies in a folder that other programs keep for one kind
    ("Lora", "embeddings", "VAE", "Stable-diffusion"...) is of that kind; elsewhere anything may lie.
    Raises FileNotFoundError with near misses, ValueError when several files are meant.
    """
    path = Path(name).expanduser()
    if path.is_file() or (path.is_dir() and (path.name != name or is_whole(os.listdir(path)))):
        return path
    root = models_folder()
    found = [place for place in stored(root) if kind_of(place, root) in (kind, None)]
    wanted = name.lower().replace("\\", "/")
    same = [place for place in found if wanted in _names(place, root)]
    same = [place for place in same if kind_of(place, root) == kind] or same
    if len(same) == 1:
        return same[0]
    if same:
        raise ValueError(f"{name!r} may be {' or '.join(map(str, same))}; give the path, or more of it")
    what = f"no {kind} {name!r}: it is no path, and not below {root}"
    known = {_stem(place): place.name for place in found}
    hub = ""
    if kind == "model":
        what = f"no model {name!r}: it is no path, no built-in model ({', '.join(BUILT_IN)}), and not below {root}"
        known |= {title: title for title in BUILT_IN}
        hub = ", or give a hub id (owner/name)"
    near = difflib.get_close_matches(_stem(Path(name)), known, n=3, cutoff=0.6)
    if near:
        raise FileNotFoundError(f"{what}; did you mean {' or '.join(_shown(known[n]) for n in near)}?")
    raise FileNotFoundError(f"{what}; put it there, or name the folder that has it in ${MODELS}{hub}")


def stored(root: Path) -> Iterator[Path]:
    """The model folders and weight files below a folder, sorted; links are followed, hidden folders are not.

    Parts of a model folder and of a file in shards are not listed.
    """
    seen: set[Path] = set()
    for here, folders, files in os.walk(root, followlinks=True):
        place = Path(here)
        if place.resolve() in seen:
            folders.clear()
            continue
        seen.add(place.resolve())
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if is_whole(files) and place != root:
            folders.clear()
            yield place
            continue
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith(".") and not re.search(r"-\d{5}-of-\d{5}", name):
                yield place / name


def is_whole(files: Collection[str]) -> bool:
    """Whether a folder with these files is one thing: a model, a part of one with its configuration, an adapter."""
    return INDEX in files or ADAPTER in files or (CONFIG in files and choose(files) is not None)


def kind_of(place: Path, root: Path) -> Kind | None:
    """The kind that the nearest folder between `root` and a file stands for; None where none says."""
    parts = place.relative_to(root).parts[:-1]
    return next((FOLDERS[part.lower()] for part in reversed(parts) if part.lower() in FOLDERS), None)


def parse_id(text: str) -> HubId | None:
    """A text as a place on the hub, or None when it does not look like one (a path, a file name)."""
    match = HUB_ID.fullmatch(text)
    if match is None or match["repo"].lower().endswith(SUFFIXES) or ".." in text or "--" in match["repo"]:
        return None
    return HubId(match["repo"], (match["inside"] or "").strip("/") or None, match["revision"])


def fetch(
    name: str, *, variant: str | None = None, dtype: torch.dtype | None = None, cache: Path | str | None = None
) -> Path:
    """The folder or file of a hub id in the hub's cache, downloaded when it is not there or not complete.

    What is in the cache is used as it is, without asking whether the hub has something newer. Only what is needed
    is fetched: of a model its configurations and one file of weights for each network.

    variant, dtype: which files are preferred, see `folder.choose`.
    cache: the hub's cache; None for the usual place (HF_HOME, HF_HUB_CACHE). HF_HUB_OFFLINE=1 forbids the network.
    Raises FileNotFoundError or ValueError in one line: no such model, not allowed, not reachable, nothing to open.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
    from huggingface_hub.utils import HfHubHTTPError, LocalEntryNotFoundError

    wanted = parse_id(name)
    if wanted is None:
        raise ValueError(f"{name!r} is no hub id; give owner/name, owner/name/file or owner/name@revision")
    folder = cached(wanted, cache)
    try:
        place = None if folder is None else ready(folder, wanted, variant, dtype)
    except ValueError:
        if constants.HF_HUB_OFFLINE:
            raise
        place = None
    if place is not None:
        return place
    if constants.HF_HUB_OFFLINE:
        there = "is not" if folder is None else "is not complete"
        where = cache or constants.HF_HUB_CACHE
        raise FileNotFoundError(f"{name} {there} in the hub's cache ({where}), and HF_HUB_OFFLINE is set; unset it")
    # The base of every complaint of the HTTP library, whichever this version of the hub's client uses.
    network: type[Exception] = HfHubHTTPError.__mro__[1]
    try:
        info = HfApi().model_info(wanted.repo, revision=wanted.revision, timeout=SECONDS)
        names = [file.rfilename for file in info.siblings or ()]
        plan = plan_for(wanted, names, variant, dtype)
        if plan is None:
            raise FileNotFoundError(nothing(wanted, names))
        index = f"{plan.place}/{INDEX}".removeprefix("./")
        if index in plan.names:  # what cannot be opened is not fetched
            read_index(Path(hf_hub_download(wanted.repo, index, revision=wanted.revision, cache_dir=cache)).parent)
        log.info("fetching %d files of %s", len(plan.names), wanted.repo)
        only = [glob.escape(file) for file in plan.names]
        root = snapshot_download(wanted.repo, revision=wanted.revision, cache_dir=cache, allow_patterns=only)
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(unreachable(name, error)) from None
    except FileNotFoundError:
        raise
    except (network, OSError) as error:
        raise FileNotFoundError(refused(name, wanted, error)) from None
    return Path(root) / plan.place


def cached(wanted: HubId, cache: Path | str | None = None) -> Path | None:
    """The folder of a repository's files in the hub's cache, complete or not; the network is not used."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import LocalEntryNotFoundError

    try:  # no patterns: no file in particular is demanded
        found = snapshot_download(
            wanted.repo, revision=wanted.revision, cache_dir=cache, local_files_only=True, allow_patterns=[]
        )
    except LocalEntryNotFoundError:
        return None
    return Path(found)


def plan_for(
    wanted: HubId, names: Collection[str], variant: str | None = None, dtype: torch.dtype | None = None
) -> Plan | None:
    """What to fetch of a repository that has these files; None when there is nothing to open.

    A file that is named is taken as it is. A model folder needs its parts' texts and one file of weights each; a
    part alone (an autoencoder) likewise; otherwise there must be a single checkpoint.
    Raises ValueError when several files may be meant, or shards are missing.
    """
    if wanted.inside is not None and wanted.inside in names:
        return Plan((wanted.inside,), wanted.inside)
    prefix = f"{wanted.inside}/" if wanted.inside else ""
    place = wanted.inside or "."
    below = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    if INDEX in below:
        roles = {role for layout in LAYOUTS.values() for role in layout.known}
        chosen = [INDEX]
        for folder in sorted({name.split("/")[0] for name in below if "/" in name} & roles):
            own = [name.split("/")[1] for name in below if name.startswith(f"{folder}/") and name.count("/") == 1]
            chosen += [f"{folder}/{name}" for name in needed(own, variant, dtype)]
        return Plan(tuple(prefix + name for name in chosen), place)
    top = [name for name in below if "/" not in name]
    if CONFIG in top and choose(top) is not None:
        return Plan(tuple(prefix + name for name in needed(top, variant, dtype)), place)
    for suffixes in (PREFERRED[:1], PREFERRED[1:], SUFFIXES):
        files = sorted(name for name in top if name.lower().endswith(suffixes))
        if len(files) == 1:
            return Plan((prefix + files[0],), prefix + files[0])
        if files:
            raise ValueError(f"{wanted.repo} has several files; name one: {wanted.repo}/{prefix}{{{','.join(files)}}}")
    return None


def needed(names: Collection[str], variant: str | None, dtype: torch.dtype | None) -> list[str]:
    """Of the files of one part, those to fetch: its texts, and one set of weights where it has any."""
    texts = [name for name in names if name.endswith(TEXTS) and not WEIGHTS.fullmatch(name)]
    main = choose(names, variant, dtype)
    if main is None:
        return sorted(texts)
    return sorted([*texts, main, *(shards(main, names) if main.endswith(".json") else ())])


def ready(folder: Path, wanted: HubId, variant: str | None, dtype: torch.dtype | None) -> Path | None:
    """What to open of a repository's files in the cache; None unless all that this takes is there."""
    plan = plan_for(wanted, _files(folder), variant, dtype)
    if plan is None or (variant is not None and not any(f".{variant}" in name for name in plan.names)):
        return None
    place = folder / plan.place
    if place.is_file() or not (place / INDEX).is_file():
        return place
    layout = LAYOUTS[read_index(place)[1]]
    for part in layout.folders:
        own = set(os.listdir(place / part)) if (place / part).is_dir() else set()
        if part in layout.networks:
            there = CONFIG in own and choose(own) is not None
        elif part in layout.tokenizers:
            whole = {"vocab.json", "merges.txt"} <= own or bool({"vocab.txt", "tokenizer.json"} & own)
            there = whole and "tokenizer_config.json" in own
        else:
            there = CONFIG_NAME in own
        if not there:
            return None
    return place


def nothing(wanted: HubId, names: Collection[str]) -> str:
    """Why a repository cannot be opened."""
    if wanted.inside:
        near = difflib.get_close_matches(wanted.inside, list(names), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        return f"{wanted.repo} has no {wanted.inside!r}{hint}"
    return f"{wanted.repo} holds no model that can be opened: neither {INDEX} nor a file of weights"


def unreachable(name: str, error: Exception) -> str:
    """What to do when a download did not come through, in one line."""
    first = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    return f"{name} is not in the hub's cache and could not be fetched: {first[0]}; give a local path instead"


def refused(name: str, wanted: HubId, error: Exception) -> str:
    """What to do about an answer of the hub, in one line."""
    from huggingface_hub import constants
    from huggingface_hub.utils import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"{constants.ENDPOINT}/{wanted.repo}"
    if isinstance(error, GatedRepoError):
        return f"{wanted.repo} is gated: accept its terms at {page}, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"{wanted.repo} has no revision {wanted.revision!r}; see {page}/tree/main"
    if isinstance(error, RepositoryNotFoundError):
        return f"no model {wanted.repo!r} on the hub, and no such path; if it is private, log in with `hf auth login`"
    if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code == 401:
        return f"the hub refused {name} (401): log in with `hf auth login`, or set HF_TOKEN to a valid token"
    return unreachable(name, error)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _names(place: Path, root: Path) -> set[str]:
    """What a place may be called: its name or the end of its path, with suffix or without."""
    parts = [part.lower() for part in place.relative_to(root).parts]
    names = {"/".join(parts[i:]) for i in range(len(parts))}
    return names | {name[: -len(place.suffix)] for name in names if place.suffix.lower() in SUFFIXES}


def _stem(path: Path) -> str:
    return (path.stem if path.suffix.lower() in SUFFIXES else path.name).lower()


def _shown(name: str) -> str:
    return repr(Path(name).stem if name.lower().endswith(SUFFIXES) else name)
