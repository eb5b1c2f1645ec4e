"""Where pictures are written: names counted up in a folder, or a name that was given; none is ever overwritten."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.pipelines.request import Request
    from sfumato.recipes.restored import Restored

FOLDER = Path("outputs")


class Places:
    """Where pictures and sheet are written; refuses at once what could not be written later.

    out:    a file (of several: NAME-0.png...), or a folder; None is the folder `outputs`.
    count:  of pictures.
    grid:   whether there will be a sheet of all of them, where there are several.
    suffix: of names that are counted up.
    Raises FileExistsError for a file that is there already, OSError for a folder that cannot be written to.
    """

    def __init__(self, out: str | None, count: int, grid: bool = False, suffix: str = ".png") -> None:
        path = FOLDER if out is None else Path(out)
        is_folder = out is None or out.endswith(("/", "\\")) or path.is_dir()
        self.folder = path if is_folder else path.parent
        self.file = None if is_folder else path
        self.several = count > 1
        self.grid = grid and self.several
        self.suffix = suffix
        self.first: Path | None = None
        if self.file is not None:
            from sfumato.images import check_suffix

            check_suffix(self.file)
            names = [self.file] if self.grid or not self.several else []
            names += [self._numbered(i) for i in range(count)] if self.several else []
            taken = [name for name in names if name.exists()]
            if taken:
                raise FileExistsError(
                    f"{taken[0]} exists and is not overwritten; name another file, or a folder "
                    "(-o FOLDER/) to have the names counted up"
                )
        check_folder(self.folder)

    def picture(self, index: int, image: Image, request: Request | Restored, made_with: Mapping[str, Any]) -> Path:
        """Write picture number `index`; returns its path."""
        from sfumato.images import next_path

        if self.file is None:
            path = next_path(self.folder, self.suffix)
            while not self._write(image, path, request, made_with):
                path = next_path(self.folder, self.suffix)
        else:
            path = self._free(self._numbered(index) if self.several else self.file, image, request, made_with)
        self.first = self.first or path
        return path

    def sheet(self, image: Image, request: Request | Restored, made_with: Mapping[str, Any]) -> Path:
        """Write the sheet of all pictures; returns its path."""
        if self.file is not None:
            return self._free(self.file, image, request, made_with)
        assert self.first is not None
        return self._free(self.first.with_name(f"{self.first.stem}-grid{self.suffix}"), image, request, made_with)

    def _numbered(self, index: int) -> Path:
        assert self.file is not None
        return self.file.with_name(f"{self.file.stem}-{index}{self.file.suffix}")

    def _free(self, wanted: Path, image: Image, request: Request | Restored, made_with: Mapping[str, Any]) -> Path:
        """Write where wanted; beside it, should somebody have taken the name meanwhile."""
        path, number = wanted, 0
        while not self._write(image, path, request, made_with):
            number += 1
            path = wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
        return path

    def _write(self, image: Image, path: Path, request: Request | Restored, made_with: Mapping[str, Any]) -> bool:
        from sfumato.images import save

        try:
            save(image, path, request, made_with, overwrite=False)
        except FileExistsError:
            return False
        return True


def check_folder(folder: Path) -> None:
    """OSError where nothing can be written into a folder, or it cannot be made."""
    nearest = next(place for place in (folder.resolve(), *folder.resolve().parents) if place.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file, so nothing can be written into {folder}; name another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"nothing can be written into {nearest}; name another place with -o")
