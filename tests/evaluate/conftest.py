"""Fixtures of the evaluation's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.data.icons import IconSet

from .drawn import icon_folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a little icon set of plain shapes; do not write into it."""
    return icon_folder(tmp_path_factory.mktemp("shapes"))


@pytest.fixture
def shape_set(shapes: Path) -> IconSet:
    """That icon set, opened."""
    return IconSet(shapes)
