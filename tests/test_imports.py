"""Imports run one way: each part of the package knows only what lies below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sfumato

ROOT = Path(sfumato.__file__).parent
LEAVES = {"cond", "files"}
# What each part may import, besides itself.
ALLOWED: dict[str, set[str]] = {
    "cond": set(),
    "files": set(),
    "diffusion": LEAVES,
    "models": LEAVES,
    "text": LEAVES | {"models"},
    "allocator": set(),
    "machine": set(),
    "kernels": set(),
    "runtime": {"allocator", "machine"},
    "prepare": LEAVES | {"allocator", "kernels", "models", "runtime"},
    "approximate": LEAVES | {"models", "prepare"},
    "compiling": LEAVES | {"models", "runtime"},
    "presets": LEAVES | {"models"},
    "weights": LEAVES | {"diffusion", "models", "presets", "text"},
    "pipelines": LEAVES
    | {"diffusion", "models", "text", "weights", "images", "presets", "runtime", "sfumato"}
    | {"allocator", "approximate", "compiling", "machine", "prepare"},
    "images": {"files", "pipelines", "recipes"},
    "recipes": LEAVES | {"diffusion", "pipelines", "sfumato"},
    "previews": {"images", "models"},
    "sfumato": {"diffusion", "pipelines"},
}
ALLOWED["data"] = set(ALLOWED)
# What stands on top; the evaluation trains its judge with the training loop.
ALLOWED["train"] = set(ALLOWED)
ALLOWED["serve"] = set(ALLOWED) - {"train"}
ALLOWED["evaluate"] = ALLOWED["train"] | {"train"}
ALLOWED["cli"] = ALLOWED["serve"]
ALLOWED["__main__"] = {"cli"}
TOPS = {"train", "serve", "cli"}
# The command line calls these, but only from inside its functions.
LAZY = {"cli": {"train", "evaluate"}}


def part(name: str) -> str:
    """The first component below the package: `sfumato.diffusion.path` -> `diffusion`."""
    return name.split(".")[1] if "." in name else name


def imported(path: Path) -> list[tuple[str, bool]]:
    """Each part of the package that a file imports, and whether it does so on being imported itself."""
    package = ["sfumato", *path.relative_to(ROOT).with_suffix("").parts][:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    on_top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module or ""]))
            # `from sfumato import train` names a part; `from sfumato import __version__` the package itself.
            names = [f"{module}.{alias.name}" if module == "sfumato" else module for alias in node.names]
        for name in names:
            if name.split(".")[0] == "sfumato":
                known = (ROOT / part(name)).is_dir() or (ROOT / f"{part(name)}.py").is_file()
                found.append((part(name) if known else "sfumato", id(node) in on_top))
    return found


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    place = path.relative_to(ROOT).parts
    owner = place[0].removesuffix(".py") if place != ("__init__.py",) else "sfumato"
    allowed = ALLOWED[owner] | {owner}
    for name, on_top in imported(path):
        lazily = not on_top and name in LAZY.get(owner, set())
        assert name in allowed or lazily, f"{'/'.join(place)} must not import sfumato.{name}"


def test_the_rule_sees_violations(tmp_path: Path) -> None:
    assert {name for name, _ in imported(ROOT / "pipelines" / "pipeline.py")} >= {"diffusion", "models", "weights"}
    assert ("train", False) in imported(ROOT / "cli" / "train.py")
    assert not any(TOPS & (ALLOWED[name] - {name}) for name in (*TOPS, "pipelines", "weights", "diffusion", "data"))
