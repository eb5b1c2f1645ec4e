"""Pictures: tensors to PIL and back, contact sheets, and PNG files that carry their recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from sfumato.files import replacing
from sfumato.pipelines.request import Request, parse

if TYPE_CHECKING:
    from torch import Tensor

RECIPE = "sfumato"  # PNG text entry with the request as JSON
MADE_WITH = "sfumato-runtime"  # PNG text entry with versions, device and precision as JSON
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
INFOTEXT = "parameters"  # PNG text entry that other programs read


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
    request: Request | None = None,
    made_with: Mapping[str, Any] | None = None,
) -> None:
    """Write a picture in one step, as PNG with its recipe inside; .jpg and .webp drop the recipe.

    made_with: versions and precision, kept beside the recipe.
    Raises ValueError for a suffix that is no picture format.
    """
    path = Path(path)
    check_suffix(path)
    with replacing(path) as temporary:
        if path.suffix.lower() == ".png":
            image.save(temporary, format="PNG", pnginfo=_text(request, made_with or {}))
        else:
            image.save(temporary, quality=95)


def check_suffix(path: Path) -> None:
    """ValueError unless the name says a picture format that can be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: unknown picture suffix {path.suffix!r}; use one of {', '.join(SUFFIXES)}")


def read_recipe(path: Path | str) -> Request:
    """The request that a PNG was made from.

    Raises FileNotFoundError, or ValueError when the file is no PNG of this package.
    """
    entries = _entries(path)
    if RECIPE not in entries:
        raise ValueError(f"{path} carries no recipe: it has no PNG text entry {RECIPE!r}")
    return parse(**_json(path, entries[RECIPE]))


def read_made_with(path: Path | str) -> dict[str, Any]:
    """The versions, device and precision that a PNG was made with; empty when it does not say."""
    entries = _entries(path)
    return _json(path, entries[MADE_WITH]) if MADE_WITH in entries else {}


def next_path(folder: Path | str, suffix: str = ".png") -> Path:
    """The first free numbered name in a folder, one above the highest: 00000.png, 00001.png..."""
    folder = Path(folder)
    names = [p.stem for p in folder.iterdir()] if folder.is_dir() else []
    taken = [int(name) for name in names if re.fullmatch(r"\d{5,}", name)]
    return folder / f"{max(taken, default=-1) + 1:05d}{suffix}"


def infotext(request: Request) -> str:
    """The request as most other programs read it: prompt, negative prompt, a line of parameters."""
    negative = [f"Negative prompt: {request.negative_prompt}"] if request.negative_prompt else []
    values = {
        "Steps": request.num_inference_steps,
        "Sampler": request.sampler,
        "Schedule type": request.spacing,
        "CFG scale": request.guidance_scale,
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Model": Path(request.model).name,
        "Denoising strength": request.strength,
        # Counted from 1 there.
        "Clip skip": request.clip_skip + 1 if request.clip_skip else None,
    }
    parameters = ", ".join(f"{name}: {value}" for name, value in values.items() if value is not None)
    return "\n".join([request.prompt, *negative, parameters])


def _text(request: Request | None, made_with: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    if request is not None:
        info.add_text(RECIPE, json.dumps(request.model_dump(mode="json")))
        info.add_text(INFOTEXT, infotext(request))
    if made_with:
        info.add_text(MADE_WITH, json.dumps(dict(made_with)))
    return info


def _entries(path: Path | str) -> dict[str, str]:
    try:
        with Image.open(path) as image:
            return dict(getattr(image, "text", {}))
    except FileNotFoundError:
        raise FileNotFoundError(f"no picture {path}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture") from None


def _json(path: Path | str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: its recipe is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: its recipe is a {type(content).__name__}; a JSON object is expected")
    return content
