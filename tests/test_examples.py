"""The examples run without a network, show what they say, and the notebooks are those of the scripts."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
MAKER = runpy.run_path(str(EXAMPLES / "make_notebooks.py"), run_name="make_notebooks")
SCRIPTS = {path.stem: path for path in sorted(EXAMPLES.glob("[0-9]*.py"))}
BLUE, RED, YELLOW = (90, 150, 220), (200, 30, 60), (250, 210, 50)


def difference(a: Image.Image, b: Image.Image) -> int:
    """The largest, in levels."""
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max())


def is_near(image: Image.Image, at: tuple[int, int], colour: tuple[int, int, int], bound: int = 90) -> bool:
    """Whether the picture has about this colour around a place."""
    x, y = at
    mean = np.asarray(image.crop((x - 6, y - 6, x + 6, y + 6)), np.float32).mean((0, 1))
    print(at, mean.round(), colour)
    return bool(np.abs(mean - colour).max() < bound)


def text_to_image(names: dict[str, Any]) -> None:
    assert names["again"] == names["result"].images[0]
    assert is_near(names["result"].images[0], (64, 75), RED) and is_near(names["result"].images[0], (12, 12), BLUE)
    pale, *_, glaring = (np.asarray(image, np.float32).std() for image in names["foxes"])
    assert pale < glaring


def components(names: dict[str, Any]) -> None:
    assert names["difference"] <= 2
    assert names["z"].shape == (1, 4, 16, 16)


def image_to_image(names: dict[str, Any]) -> None:
    sketch = np.asarray(names["sketch"], np.float32)
    away = [float(np.abs(np.asarray(image, np.float32) - sketch).mean()) for image in names["berries"]]
    print(away)
    assert away == sorted(away)


def inpainting(names: dict[str, Any]) -> None:
    assert all(
        difference(i.crop(names["corner"]), names["picture"].crop(names["corner"])) == 0 for i in names["changed"]
    )
    assert is_near(names["changed"][0], (64, 60), YELLOW)
    assert names["wide"].size == (256, 128)
    assert difference(names["wide"].crop((160, 0, 256, 128)), names["picture"].crop((32, 0, 128, 128))) == 0


def depth(names: dict[str, Any]) -> None:
    assert names["difference"] <= 2
    assert names["pipe"].unet.config.in_channels == 5
    assert names["told"].min() == -1 and names["told"].max() == 1


def restoration(names: dict[str, Any]) -> None:
    def error(image: Image.Image) -> float:
        return float(np.square(np.asarray(image, np.float32) - np.asarray(names["house"], np.float32)).mean())

    plain = names["small"].resize((128, 128), Image.Resampling.BICUBIC)
    spoilt = [names["noisy"], names["holed"], names["blurred"], plain]
    restored = [names["clean"].image, names["filled"], names["sharp"], names["enlarged"]]
    for before, after in zip(map(error, spoilt), map(error, restored), strict=True):
        print(f"mean squared error {before:.0f}, restored {after:.0f}")
        assert after < 0.7 * before


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "01_text_to_image": text_to_image,
    "02_components": components,
    "03_image_to_image": image_to_image,
    "04_inpainting": inpainting,
    "05_depth": depth,
    "06_restoration": restoration,
}


def test_each_example_is_checked() -> None:
    assert list(SCRIPTS) == list(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("an example went to the network"))
    names = runpy.run_path(str(SCRIPTS[name]), run_name="__main__")
    pictures = sorted((tmp_path / "outputs").glob(f"{name[:2]}_*.png"))
    assert pictures and pictures == sorted((tmp_path / "outputs").iterdir())
    for path in pictures:
        with Image.open(path) as image:
            assert np.asarray(image).std() > 10, path
    CHECKS[name](names)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_notebook_is_that_of_the_script(name: str) -> None:
    text = SCRIPTS[name].with_suffix(".ipynb").read_text()
    book = json.loads(text)
    outputs = [cell["outputs"] for cell in book["cells"] if cell["cell_type"] == "code"]
    mend = "run: python examples/make_notebooks.py"
    assert text == MAKER["written"](MAKER["notebook"](SCRIPTS[name].read_text(), outputs)), mend
    assert len(text) < 400_000
    pictures = [output for row in outputs for output in row if output["output_type"] == "display_data"]
    assert len(pictures) == SCRIPTS[name].read_text().count("\nshow("), mend


def test_the_gallery_shows_what_its_script_makes() -> None:
    docs = EXAMPLES.parent / "docs"
    shown = {docs / path for path in re.findall(r"\]\((images/gallery/[^)]+)\)", (docs / "gallery.md").read_text())}
    assert shown == set((docs / "images" / "gallery").iterdir())
    made = runpy.run_path(str(EXAMPLES.parent / "benchmarks" / "gallery.py"), run_name="gallery")["SHEETS"]
    assert {path.stem for path in shown} == set(made)
    assert sum(path.stat().st_size for path in shown) < 1_500_000


def test_cells_are_cut_and_run() -> None:
    script = "# %% [markdown]\n# # A title\n#\n# Text.\n\n# %%\nx = 2\nprint(x)\n\n# %%\nx\n"
    cells = MAKER["cells"](script)
    assert [(cell.kind, cell.text) for cell in cells] == [
        ("markdown", "# A title\n\nText."),
        ("code", "x = 2\nprint(x)"),
        ("code", "x"),
    ]
    outputs = list(MAKER["run"]([cell.text for cell in cells if cell.kind == "code"]))
    assert outputs == [[{"name": "stdout", "output_type": "stream", "text": ["2\n"]}], []]
    with pytest.raises(ValueError, match=r"'y = 1' stands before the first cell; put '# %%' above it"):
        MAKER["cells"]("y = 1\n# %%\n")
