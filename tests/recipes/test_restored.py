"""The recipe of a restored picture: written, read, and refused where it is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sfumato.recipes.restored import Restored, is_restored


def test_it_comes_back_as_it_was() -> None:
    made = Restored("noisy.png", "blur", 0.01, blur=1.5, seed=3)
    assert is_restored(made.entry())
    assert "mask" not in made.entry()
    assert Restored.of(made.entry()) == made


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({}, "names no picture"),
        ({"picture": "a.png", "colour": 1}, "unknown field 'colour'"),
        ({"picture": "a.png", "seed": "1"}, "seed = '1'; it should be int"),
        ({"picture": "a.png", "steps": True}, "steps = True; it should be int | None"),
    ],
)
def test_what_is_none_is_refused(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        Restored.of({"task": "restore", **recipe})
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_files_are_found_where_they_were_or_beside(tmp_path: Path) -> None:
    (tmp_path / "noisy.png").touch()
    asked = Restored("elsewhere/noisy.png")
    assert asked.found(tmp_path).picture == str(tmp_path / "noisy.png")
    with pytest.raises(FileNotFoundError, match=r"the mask holes\.png is not there"):
        Restored("noisy.png", mask="holes.png").found(tmp_path)
    with pytest.raises(FileNotFoundError, match="in memory"):
        Restored("").found(tmp_path)
