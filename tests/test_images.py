from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import images
from sfumato.pipelines.request import parse


def noise(size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_every_level_survives_the_tensor() -> None:
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    x = images.to_tensor([levels, levels])
    assert x.shape == (2, 3, 16, 16) and float(x.min()) == -1 and float(x.max()) == 1
    assert all(back.tobytes() == levels.tobytes() for back in images.to_pil(x))


def test_what_lies_outside_is_clipped() -> None:
    (image,) = images.to_pil(torch.tensor([-9.0, 0.0, 9.0]).view(1, 3, 1, 1))
    assert image.getpixel((0, 0)) == (0, 128, 255)


def test_pictures_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sizes \[\(4, 4\), \(8, 6\)\]"):
        images.to_tensor([noise(), noise((4, 4))])


def test_the_recipe_comes_back(tmp_path: Path) -> None:
    request = parse(prompt='a "käfer" 🐞\n2nd line', seed=3, width=8, height=8, num_inference_steps=2)
    images.save(noise(), tmp_path / "new" / "a.png", request, {"precision": "float32"})
    assert images.read_recipe(tmp_path / "new" / "a.png") == request
    assert images.read_made_with(tmp_path / "new" / "a.png") == {"precision": "float32"}
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.tobytes() == noise().tobytes()
        assert "Steps: 2, " in image.text["parameters"] and image.text["parameters"].startswith(request.prompt)


def test_files_without_a_recipe_say_so(tmp_path: Path) -> None:
    images.save(noise(), tmp_path / "plain.png")
    assert images.read_made_with(tmp_path / "plain.png") == {}
    (tmp_path / "text.png").write_text("no picture")
    for name, message in (("plain.png", "carries no recipe"), ("text.png", "is not a picture")):
        with pytest.raises(ValueError, match=message):
            images.read_recipe(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no picture"):
        images.read_recipe(tmp_path / "gone.png")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown picture suffix '\.docx'"):
        images.save(noise(), tmp_path / "a.docx")
    with pytest.raises(OSError, match="cannot write mode"):
        images.save(Image.new("CMYK", (2, 2)), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_free_names_count_on(tmp_path: Path) -> None:
    assert images.next_path(tmp_path / "none").name == "00000.png"
    for name in ("00003.png", "00007.jpg", "00009-grid.png", "123.png", "note.txt"):
        (tmp_path / name).touch()
    assert images.next_path(tmp_path).name == "00008.png"


@pytest.mark.parametrize(("count", "size"), [(1, (8, 6)), (2, (20, 6)), (5, (32, 16))])
def test_grids_are_as_square_as_they_go(count: int, size: tuple[int, int]) -> None:
    sheet = images.grid([noise()] * count)
    assert sheet.size == size
    assert sheet.crop((0, 0, 8, 6)).tobytes() == noise().tobytes()
