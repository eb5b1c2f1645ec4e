"""Reading recipes: a wrong name is refused before any work is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.cli import main
from sfumato.train.recipe import read_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "mini.yaml"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prediction: v_predicton", r"unet\.loss: .*unknown prediction 'v_predicton'; did you mean 'v_prediction'"),
        ("density: unifrom", r"unet\.loss: .*unknown density 'unifrom'; did you mean 'uniform'"),
        ("weighting: flatt", r"unet\.loss: .*unknown weighting 'flatt'; did you mean 'flat'"),
    ],
)
def test_a_name_that_is_in_no_table_is_refused(tmp_path: Path, name: str, message: str) -> None:
    lines = RECIPE.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("  loss: {prediction:"))
    lines[place] = f"  loss: {{{name}}}"
    bad = tmp_path / "bad.yaml"
    bad.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_recipe(bad)


def test_an_extra_that_is_missing_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sfumato.train

    def run(*args: object) -> None:
        raise ModuleNotFoundError("the teacher is not installed; install it with: pip install 'sfumato[train]'")

    monkeypatch.setattr(sfumato.train, "run", run)
    code = main(["train", str(RECIPE)])
    assert code == 2 and capsys.readouterr().err.startswith("sfumato: the teacher is not installed")
