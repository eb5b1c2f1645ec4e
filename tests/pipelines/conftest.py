"""Folders of Stable Diffusion XL and diffusers' pipelines on them, made once for all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.models.unet import UNet
from sfumato.weights.folder import load_folder, save_folder

from ..models.parity import scramble
from ..tiny_xl import TINY_XL, tiny_xl

Folders = dict[str, Path]
Peer = Callable[..., Any]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A folder of each class, with texts that matter: random numbers for every parameter of the networks."""
    root = tmp_path_factory.mktemp("xl")
    for seed, family in enumerate(TINY_XL):
        parts = tiny_xl(family)
        for part in (parts.denoiser, *parts.towers.present):
            scramble(part, seed)
        if seed > 0:
            parts.vae.load_state_dict(load_folder(root / next(iter(TINY_XL))).vae.state_dict())
        save_folder(parts, root / family)
    return {family: root / family for family in TINY_XL}


@pytest.fixture(scope="session")
def peer(folders: Folders) -> Peer:
    """diffusers' pipeline of a class on the folder of a class, with the named scheduler."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    known: dict[tuple[str, str], Any] = {}

    def make(name: str, family: str, scheduler: str = "EulerDiscreteScheduler") -> Any:
        if (name, family) not in known:
            theirs = getattr(diffusers, name).from_pretrained(str(folders[family]), local_files_only=True)
            theirs.set_progress_bar_config(disable=True)
            known[name, family] = theirs
        theirs = known[name, family]
        theirs.scheduler = getattr(diffusers, scheduler).from_config(dict(theirs.scheduler.config))
        return theirs

    return make


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of a U-Net, in order."""
    seen: list[int] = []
    forward = UNet.forward

    def counted(self: UNet, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        seen.append(len(x))
        return forward(self, x, *rest, **named)

    monkeypatch.setattr(UNet, "forward", counted)
    return seen
