"""Pictures: tensors to PIL and back, contact sheets, and files that carry their recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sfumato.files import creating, replacing
from sfumato.pipelines.request import Request
from sfumato.recipes import embed, recipe
from sfumato.recipes.restored import Restored

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def to_pil(x: Tensor) -> list[Image.Image]:
    """Pictures (B, 3, H, W) in [-1, 1] as 8-bit RGB; what lies outside is clipped."""
    levels = ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round()  # (B, 3, H, W)
    rows = levels.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)  # (B, H, W, 3)
    return [Image.fromarray(row) for row in rows]


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as a float32 tensor (B, 3, H, W) in [-1, 1]; other modes are converted to RGB."""
    import torch

    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"pictures of the sizes {sorted(sizes)} cannot share a tensor; resize them first")
    rows = np.stack([np.asarray(image.convert("RGB")) for image in images])  # (B, H, W, 3)
    return torch.from_numpy(rows).permute(0, 3, 1, 2).float() / 127.5 - 1.0  # (B, 3, H, W)


def to_unit(pictures: Tensor) -> Tensor:
    """uint8 pictures (B, H, W, 3) as float32 (B, 3, H, W) in [-1, 1], channels last in memory."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """A contact sheet, row by row, as square as it goes unless `columns` says otherwise; `gap` in pixels."""
    if not images:
        raise ValueError("a grid needs at least one picture")
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    width, height = (max(image.size[side] for image in images) for side in (0, 1))
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def save(
    image: Image.Image,
    path: Path | str,
    request: Request | Restored | None = None,
    made_with: Mapping[str, Any] | None = None,
    overwrite: bool = True,
) -> None:
    """Write a picture in one step, with its recipe inside: as PNG text, or as EXIF in JPEG and WebP.

    made_with: versions, precision and fingerprints, kept beside the recipe.
    Raises ValueError for a suffix that is no picture format, FileExistsError without `overwrite` where there is a file.
    """
    path = Path(path)
    check_suffix(path)
    entries = recipe.entries_of(request, made_with or {})
    with (replacing if overwrite else creating)(path) as temporary:
        if path.suffix.lower() == ".png":
            image.save(temporary, format="PNG", pnginfo=embed.png(entries))
        else:
            image.save(temporary, quality=95, exif=embed.exif(entries))


def check_suffix(path: Path) -> None:
    """ValueError unless the name says a picture format that can be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: unknown picture suffix {path.suffix!r}; use one of {', '.join(SUFFIXES)}")


def read_recipe(path: Path | str) -> Request:
    """The request that a picture was made from; of other programs' pictures, what could be understood.

    Raises FileNotFoundError, or ValueError when the file is no picture or does not say.
    """
    return recipe.read(path).request


def read_made_with(path: Path | str) -> dict[str, Any]:
    """The versions, device and precision that a picture was made with; empty when it does not say."""
    return recipe.made_with(path, embed.read(path))


def next_path(folder: Path | str, suffix: str = ".png") -> Path:
    """The first free numbered name in a folder, one above the highest: 00000.png, 00001.png..."""
    folder = Path(folder)
    names = [p.stem for p in folder.iterdir()] if folder.is_dir() else []
    taken = [int(name) for name in names if re.fullmatch(r"\d{5,}", name)]
    return folder / f"{max(taken, default=-1) + 1:05d}{suffix}"
