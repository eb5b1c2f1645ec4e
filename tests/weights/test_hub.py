from __future__ import annotations

import hashlib
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from sfumato.weights.folder import load_folder, load_vae_folder
from sfumato.weights.hub import HubId, fetch, find_file, find_model, models_folder, parse_id, plan_for
from sfumato.weights.safe import read_tensors, write_tensors

COMMIT = "0123456789" * 4
REPO = "somebody/tiny-model"


@pytest.fixture(autouse=True)
def unplugged(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every use of the network fails, but to this machine itself; the list says where it was tried."""
    tried: list[object] = []
    connect = socket.socket.connect

    def refused(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] != "127.0.0.1":
            tried.append(address)
            raise OSError("the network is unplugged")
        connect(self, address)

    def lookup(host: Any, *rest: Any, **more: Any) -> Any:
        if host != "127.0.0.1":
            tried.append(host)
            raise socket.gaierror("the network is unplugged")
        return found(host, *rest, **more)

    found = socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return tried


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def put(cache: Path, files: dict[str, Path], repo: str = REPO, commit: str = COMMIT, ref: str = "main") -> Path:
    """Files in the layout of the hub's cache: blobs by digest, and links to them in a snapshot."""
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / ref).write_text(commit)
    for name, file in files.items():
        blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        link = home / "snapshots" / commit / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not blob.exists():
            shutil.copy(file, blob)
        link.symlink_to(blob)
    return home / "snapshots" / commit


def files_of(folder: Path) -> dict[str, Path]:
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder."""
    root = tmp_path / "library"
    root.mkdir()
    monkeypatch.setenv("SFUMATO_MODELS", str(root))
    monkeypatch.chdir(tmp_path)
    return root


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


# Names in the models folder ---------------------------------------------------------------------------


def test_where_the_models_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_MODELS", "~/pictures/models")
    assert models_folder() == Path.home() / "pictures" / "models"
    monkeypatch.delenv("SFUMATO_MODELS")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert models_folder() == tmp_path / "sfumato" / "models"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert models_folder() == Path.home() / ".local" / "share" / "sfumato" / "models"


def test_files_are_found_by_name(library: Path, tiny_folder: Path) -> None:
    names = (
        "models/Lora/People/Ink.safetensors",
        "embeddings/ink.pt",
        "VAE/soft.ckpt",
        "models/Stable-diffusion/v1.5.ckpt",
    )
    for name in (*names, "loose.gguf", ".hidden/secret.pt", "notes.txt"):
        touch(library / name)
    shutil.copytree(tiny_folder, library / "diffusers" / "Tiny")
    for kind, name, found in (
        ("lora", "ink", names[0]),
        ("lora", "INK.safetensors", names[0]),
        ("lora", "people/ink", names[0]),
        ("embedding", "ink", names[1]),
        ("vae", "soft", names[2]),
        ("model", "v1.5", names[3]),
        ("model", "tiny", "diffusers/Tiny"),
        ("model", "loose", "loose.gguf"),
        ("vae", "loose", "loose.gguf"),
    ):
        assert find_file(kind, name) == library / found, name  # type: ignore[arg-type]
    assert find_model("v1.5") == library / names[3]
    for kind, name in (("vae", "ink"), ("model", "soft"), ("model", "secret"), ("model", "unet"), ("lora", "notes")):
        with pytest.raises(FileNotFoundError, match=f"no {kind} '{name}'"):
            find_file(kind, name)  # type: ignore[arg-type]


def test_parts_that_stand_alone_are_found_by_their_folders(library: Path, tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder / "vae", library / "vae" / "sharp")
    touch(library / "loras" / "ink" / "adapter_config.json", library / "loras" / "ink" / "adapter_model.safetensors")
    assert find_file("vae", "sharp") == library / "vae" / "sharp"
    assert find_file("lora", "ink") == library / "loras" / "ink"


def test_ambiguous_and_unknown_names_say_what_there_is(library: Path) -> None:
    touch(library / "a" / "dreamy_8.safetensors", library / "b" / "Dreamy_8.ckpt", library / "loras" / "dreamy.pt")
    with pytest.raises(ValueError, match=r"'dreamy_8' may be .*a/dreamy_8\.safetensors or .*b/Dreamy_8\.ckpt; give"):
        find_file("model", "dreamy_8")
    assert find_file("model", "b/dreamy_8") == library / "b" / "Dreamy_8.ckpt"
    assert find_file("model", "dreamy_8.ckpt") == library / "b" / "Dreamy_8.ckpt"
    with pytest.raises(FileNotFoundError, match=r"no model 'dreami_8': .* did you mean '[dD]reamy_8'"):
        find_model("dreami_8")
    with pytest.raises(FileNotFoundError, match=r"put it there, or name the folder that has it in \$SFUMATO_MODELS"):
        find_model("something-else")


def test_a_file_in_the_folder_of_its_kind_comes_first(library: Path) -> None:
    touch(library / "ink.safetensors", library / "loras" / "ink.safetensors")
    assert find_file("lora", "ink") == library / "loras" / "ink.safetensors"
    assert find_file("embedding", "ink") == library / "ink.safetensors"


def test_links_in_a_circle_end(library: Path) -> None:
    touch(library / "a" / "ink.pt")
    (library / "a" / "again").symlink_to(library)
    assert find_file("lora", "ink") == library / "a" / "ink.pt"


def test_paths_come_before_names_and_never_use_the_network(
    library: Path, tiny_folder: Path, online: None, unplugged: list[object]
) -> None:
    touch(library / "model.safetensors", Path("model.safetensors"), Path("somebody/tiny-model"), Path("ink/readme.md"))
    touch(library / "loras" / "ink.pt")
    assert find_model("model.safetensors") == Path("model.safetensors")
    assert find_model(REPO) == Path(REPO)
    assert find_model(str(tiny_folder)) == tiny_folder
    assert find_file("lora", "ink") == library / "loras" / "ink.pt"  # a folder of that name is no adapter
    for slip in ("somebody/tiny-modle", "./owner/name", "models/a.safetensors", "../a/b", "a\\b"):
        with pytest.raises(FileNotFoundError, match="no model"):
            find_model(slip)
    assert unplugged == []


# The hub's cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("owner/name", HubId("owner/name")),
        ("owner/name@fp16", HubId("owner/name", None, "fp16")),
        ("owner/name@refs/pr/1", HubId("owner/name", None, "refs/pr/1")),
        ("owner/some.name/file.safetensors", HubId("owner/some.name", "file.safetensors")),
        ("owner/name/sub/vae/@main", HubId("owner/name", "sub/vae", "main")),
        *(
            (text, None)
            for text in ("name", "/owner/name", "./owner/name", "~/name", "owner/../name", "a\\b/c", "a b/c")
        ),
        ("folder/model.safetensors", None),
    ],
)
def test_what_looks_like_a_hub_id(text: str, place: HubId | None) -> None:
    assert parse_id(text) == place


def test_what_is_in_the_cache_needs_no_network(
    tiny_folder: Path, tmp_path: Path, online: None, unplugged: list[object]
) -> None:
    snapshot = put(tmp_path, files_of(tiny_folder))
    assert fetch(REPO, cache=tmp_path) == snapshot
    assert fetch(f"{REPO}@main", cache=tmp_path) == snapshot
    assert fetch(f"{REPO}@{COMMIT}", cache=tmp_path) == snapshot
    assert fetch(f"{REPO}/vae", cache=tmp_path) == snapshot / "vae"
    file = "unet/diffusion_pytorch_model.safetensors"
    assert fetch(f"{REPO}/{file}", cache=tmp_path) == snapshot / file
    assert load_folder(snapshot).unet.config == load_folder(tiny_folder).unet.config
    load_vae_folder(fetch(f"{REPO}/vae", cache=tmp_path))
    assert unplugged == []


def test_offline_is_respected_and_said(tiny_folder: Path, tmp_path: Path, unplugged: list[object]) -> None:
    with pytest.raises(FileNotFoundError, match=r"tiny-model is not in the hub's cache .*HF_HUB_OFFLINE is set; unset"):
        fetch(REPO, cache=tmp_path)
    files = files_of(tiny_folder)
    for missing in (
        "tokenizer/merges.txt",
        "vae/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ):
        cache = tmp_path / missing
        put(cache, {name: file for name, file in files.items() if name != missing})
        with pytest.raises(FileNotFoundError, match="tiny-model is not complete in the hub's cache"):
            fetch(REPO, cache=cache)
    assert unplugged == []


def test_an_unreachable_hub_is_one_line(tmp_path: Path, online: None, unplugged: list[object]) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"could not be fetched: .*unplugged; give a local path instead"
    ) as caught:
        fetch(REPO, cache=tmp_path)
    assert "\n" not in str(caught.value) and unplugged != []


def test_one_checkpoint_in_the_cache(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    for file in (one, two):
        file.write_bytes(file.name.encode())
    snapshot = put(tmp_path / "a", {"v1.safetensors": one, "v1.ckpt": two, "README.md": one})
    assert fetch(REPO, cache=tmp_path / "a") == snapshot / "v1.safetensors"
    put(tmp_path / "b", {"v1.safetensors": one, "v2.safetensors": two})
    with pytest.raises(ValueError, match=r"has several files; name one: somebody/tiny-model/\{v1\.saf.*,v2\.saf.*\}"):
        fetch(REPO, cache=tmp_path / "b")
    put(tmp_path / "c", {"README.md": one})
    with pytest.raises(FileNotFoundError, match="is not complete"):
        fetch(REPO, cache=tmp_path / "c")


# Fetching, from a hub on this machine -----------------------------------------------------------------

WEIGHTS = [
    f"{part}/{stem}{variant}.{suffix}"
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model"))
    for variant in ("", ".fp16", ".non_ema")
    for suffix in ("safetensors", "bin")
]
ALL = [
    "model_index.json",
    "README.md",
    "v1-5-pruned.ckpt",
    "unet/config.json",
    "unet/flax_model.msgpack",
    "unet/diffusion_pytorch_model.onnx",
    "text_encoder/config.json",
    "text_encoder/pytorch_model.bin",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors.index.json",
    "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
    "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    *WEIGHTS,
]


@pytest.mark.parametrize(
    ("variant", "dtype", "mark"),
    [(None, torch.float32, ""), (None, torch.float16, ".fp16"), ("non_ema", None, ".non_ema")],
)
def test_of_a_repository_only_what_is_needed_is_planned(
    variant: str | None, dtype: torch.dtype | None, mark: str
) -> None:
    plan = plan_for(HubId(REPO), ALL, variant, dtype)
    assert plan is not None and plan.place == "."
    assert sorted(plan.names) == sorted(
        [
            "model_index.json",
            "unet/config.json",
            f"unet/diffusion_pytorch_model{mark}.safetensors",
            "text_encoder/config.json",
            f"text_encoder/model{mark}.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors.index.json",
            "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
            "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
            "tokenizer/vocab.json",
            "tokenizer/merges.txt",
            "scheduler/scheduler_config.json",
        ]
    )


class Hub:
    """A hub with one repository, on this machine."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files
        self.asked: list[str] = []
        self.error: tuple[int, str] | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.split("?")[0]
        headers = {"X-Repo-Commit": COMMIT}
        status, content = 200, b""
        if self.error is not None:
            status, headers["X-Error-Code"] = self.error
        elif path.startswith(f"/api/models/{REPO}/tree/"):
            rows = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": digest(file)}
                for name, file in self.files.items()
            ]
            content = json.dumps(rows).encode()
        elif path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()
        else:
            name = path.split("/", 5)[-1]
            self.asked.append(name)
            content = self.files[name].read_bytes()
            headers["ETag"] = f'"{digest(self.files[name])}"'
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(key, value)
        request.end_headers()
        if body:
            request.wfile.write(content)


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tiny_folder: Path, tmp_path: Path, online: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The tiny model on a hub, with half-precision files, pickles and a checkpoint that nobody needs."""
    repository = shutil.copytree(tiny_folder, tmp_path / "repository")
    for file in list(repository.rglob("*.safetensors")):
        write_tensors(file.with_suffix(".fp16.safetensors"), read_tensors(file), torch.float16)
        file.with_suffix(".bin").write_bytes(b"not to be fetched")
    (repository / "v1.ckpt").write_bytes(b"not to be fetched")
    hub = Hub(files_of(repository))
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_a_model_is_fetched_once_and_without_what_nobody_needs(
    hub: Hub, tiny_folder: Path, tmp_path: Path, unplugged: list[object]
) -> None:
    place = fetch(REPO, dtype=torch.float32, cache=tmp_path / "cache")
    assert sorted(files_of(place)) == sorted(files_of(tiny_folder))
    assert set(hub.asked) == set(files_of(tiny_folder))
    a, b = load_folder(place).unet.state_dict(), load_folder(tiny_folder).unet.state_dict()
    worst = max(float((a[name] - b[name]).abs().max()) for name in b)
    assert worst == 0, worst
    hub.error = (500, "Down")
    assert fetch(REPO, dtype=torch.float32, cache=tmp_path / "cache") == place
    assert unplugged == []


def test_half_precision_fetches_half(hub: Hub, tmp_path: Path) -> None:
    place = fetch(REPO, dtype=torch.float16, cache=tmp_path / "cache")
    assert [p.name for p in (place / "unet").glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert fetch(REPO, dtype=torch.float32, cache=tmp_path / "cache") == place  # what is there will do
    fetch(REPO, variant="bin-only", dtype=torch.float32, cache=tmp_path / "cache")  # asked for by name: looked for
    assert len(list((place / "unet").glob("*.safetensors"))) == 2
    assert fetch(f"{REPO}/v1.ckpt", cache=tmp_path / "cache").read_bytes() == b"not to be fetched"


def test_what_cannot_be_opened_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    index = hub.files["model_index.json"]
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))
    with pytest.raises(ValueError, match="describes a 'FluxPipeline'"):
        fetch(REPO, cache=tmp_path / "cache")
    assert set(hub.asked) == {"model_index.json"}


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "RepoNotFound", "no model 'somebody/tiny-model' on the hub, and no such path; if it is private, log in"),
        (404, "RepoNotFound", "no model 'somebody/tiny-model' on the hub"),
        (403, "GatedRepo", "is gated: accept its terms at http.*then log in with `hf auth login` or set HF_TOKEN"),
        (404, "RevisionNotFound", "has no revision 'nowhere'; see http"),
        (401, "", r"no model 'somebody/tiny-model'|the hub refused .* \(401\): log in"),
    ],
)
def test_answers_of_the_hub_are_one_line(hub: Hub, tmp_path: Path, status: int, code: str, message: str) -> None:
    hub.error = (status, code)
    with pytest.raises(FileNotFoundError, match=message) as caught:
        fetch(f"{REPO}@nowhere", cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_are_said(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no 'v2\.ckpt'; did you mean 'v1\.ckpt'"):
        fetch(f"{REPO}/v2.ckpt", cache=tmp_path / "cache")
