"""Where in a picture's file a recipe stands: PNG text; EXIF in JPEG and WebP; what other programs keep there.

In EXIF the text for other programs is the user's comment, in the encoding that A1111 uses, and the recipe as JSON is
the maker's note.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

RECIPE = "sfumato"  # PNG text entry with the request as JSON
MADE_WITH = "sfumato-runtime"  # PNG text entry with versions, device and precision as JSON
INFOTEXT = "parameters"  # PNG text entry that other programs read
GRAPH = "prompt"  # PNG text entry of ComfyUI
EXIF, USER_COMMENT, MAKER_NOTE = 0x8769, 0x9286, 0x927C
MOST_EXIF = 65_000  # bytes that fit into a JPEG's one segment
UNICODE, ASCII = b"UNICODE\0", b"ASCII\0\0\0"

logger = logging.getLogger(__name__)


def png(entries: Mapping[str, str]) -> PngImagePlugin.PngInfo:
    """The entries as PNG text."""
    info = PngImagePlugin.PngInfo()
    for name, text in entries.items():
        info.add_text(name, text)
    return info


def exif(entries: Mapping[str, str]) -> bytes:
    """The entries as EXIF: the infotext as the user's comment, the others as JSON in the maker's note.

    What is too long for a JPEG is left out, the infotext first, and a warning logged.
    """
    own = {name: text for name, text in entries.items() if name != INFOTEXT}
    comment = UNICODE + entries.get(INFOTEXT, "").encode("utf-16-be")
    note = json.dumps(own).encode("ascii")
    parts = {
        tag: part
        for tag, part, there in ((MAKER_NOTE, note, own), (USER_COMMENT, comment, INFOTEXT in entries))
        if there
    }
    while parts:
        block = Image.Exif()
        block.get_ifd(EXIF).update(parts)
        whole = block.tobytes()
        if len(whole) <= MOST_EXIF:
            return whole
        tag, _ = parts.popitem()
        name = "text for other programs" if tag == USER_COMMENT else "recipe"
        logger.warning("the %s is too long for this kind of picture and was left out; PNG has no such limit", name)
    return b""


def read(path: Path | str) -> dict[str, str]:
    """The entries of a PNG, JPEG or WebP by the names that they have in a PNG.

    Raises FileNotFoundError, or ValueError for what is no picture or is damaged.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; name a picture in it")
    try:
        with _quietly(), Image.open(path) as image:
            # Text may also follow the pixels, and `text` reads on to the end.
            entries = dict(getattr(image, "text", {}))
            block = image.getexif().get_ifd(EXIF)
    except FileNotFoundError:
        raise FileNotFoundError(f"no picture {path}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    found = {name: text for name, text in entries.items() if isinstance(text, str)}
    if not found:
        found |= _note(block.get(MAKER_NOTE))
        comment = _comment(block.get(USER_COMMENT))
        if comment:
            found[INFOTEXT] = comment
    return found


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without PIL's warning of large pictures: those past its limit are an error anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _note(note: Any) -> dict[str, str]:
    """The maker's note, if it is ours."""
    if not isinstance(note, bytes) or not note.startswith(b"{"):
        return {}
    try:
        entries = json.loads(note.rstrip(b"\0"))
    except ValueError:
        return {}
    return {name: text for name, text in entries.items() if isinstance(text, str)}


def _comment(comment: Any) -> str:
    """A user's comment in any of the encodings that are found; empty when there is none."""
    if isinstance(comment, str):
        return comment.strip("\0 ")
    if not isinstance(comment, bytes):
        return ""
    if comment.startswith(UNICODE):
        body = comment[len(UNICODE) :]
        # Writers do not agree on the order of bytes: prompts are mostly ASCII, whose high bytes are zero.
        order = "utf-16-be" if body[0::2].count(0) >= body[1::2].count(0) else "utf-16-le"
        return body.decode(order, errors="replace").strip("\0 \ufeff")
    return comment.removeprefix(ASCII).decode("utf-8", errors="replace").strip("\0 ")
