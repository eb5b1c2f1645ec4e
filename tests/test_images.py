from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import images
from sfumato.pipelines.request import parse
from sfumato.recipes import embed, recipe


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


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_every_format_carries_the_recipe(tmp_path: Path, suffix: str) -> None:
    request = parse(prompt='a "käfer" 🐞\n2nd line', seed=3, width=8, height=8, num_inference_steps=2)
    path = tmp_path / f"a{suffix}"
    images.save(noise(), path, request, {"precision": "float32", "model_hash": "0123456789"})
    found = recipe.read(path)
    assert (found.program, found.request, found.notes) == ("sfumato", request, ())
    assert found.made_with == {"precision": "float32", "model_hash": "0123456789"} == images.read_made_with(path)
    assert found.text.startswith(request.prompt) and "Seed: 3, Size: 8x8, Model hash: 0123456789, " in found.text


def test_other_programs_read_the_comment_of_a_jpeg(tmp_path: Path) -> None:
    images.save(noise(), tmp_path / "a.jpg", parse(prompt="ein käfer", seed=3))
    with Image.open(tmp_path / "a.jpg") as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0") and comment[8:].decode("utf-16-be").startswith("ein käfer\n")


@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
def test_pictures_of_other_programs(tmp_path: Path, order: str) -> None:
    text = "ein käfer\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x512, Model: foo"
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode(order)
    noise().save(tmp_path / "a.jpg", exif=exif.tobytes())
    noise().save(tmp_path / "a.png", pnginfo=embed.png({"parameters": text}))
    for name in ("a.jpg", "a.png"):
        found = recipe.read(tmp_path / name)
        assert (found.program, found.request.sampler, found.request.seed) == ("A1111", "euler_a", 5)
        assert found.request.prompt == "ein käfer" and "another generator" in found.notes[0]


def test_a_recipe_too_long_for_a_jpeg_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    request = parse(prompt="ß" * 18_000, seed=3)
    images.save(noise(), tmp_path / "a.jpg", request)
    assert "too long" in caplog.text
    images.save(noise(), tmp_path / "a.png", request)
    assert images.read_recipe(tmp_path / "a.png") == request


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    images.save(noise(), tmp_path / "a.png", overwrite=False)
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(FileExistsError, match=r"a\.png exists and is not overwritten"):
        images.save(Image.new("RGB", (2, 2)), tmp_path / "a.png", overwrite=False)
    with pytest.raises(NotADirectoryError):
        images.save(noise(), tmp_path / "a.png" / "b.png", overwrite=False)
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("keep", [0, 20, 60, 200])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, keep: int) -> None:
    images.save(noise((64, 64)), tmp_path / "a.png", parse(prompt="a cat"))
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"is not a picture|cannot be read|carries no recipe"):
        recipe.read(tmp_path / "a.png")
