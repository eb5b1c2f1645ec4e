"""The icon data set: open icon packages of the npm registry, rendered and joined by Unicode code point.

`build` makes a folder of

    icons.json                 {"styles": [...], "icons": [{"code", "label", "tags", "style", "file"}, ...]}
    <style>/<code>.png         128x128 RGBA

and `IconSet` reads it back. Licences and credits of every package stand in NOTICE.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from sfumato.files import replacing

SIZE = 128

#: style word -> npm package (pinned). The word is what captions say: "a red apple, glossy style".
STYLES: dict[str, str] = {
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "glossy": "@iconify-json/fluent-emoji@1.2.7",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "soft": "@iconify-json/noto@1.2.9",
    "retro": "@iconify-json/noto-v1@1.2.5",
    "minimal": "@iconify-json/fxemoji@1.2.2",
    "sticker": "@iconify-json/twemoji@1.2.5",
    "bold": "@iconify-json/emojione@1.2.3",
    "outline": "@iconify-json/streamline-emojis@1.2.4",
}
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
NAMES = ("emojibase-data@17.0.0", "emojilib@4.0.3")

#: Names in the icon sets that differ from Unicode's: squashed name -> code point.
OTHER_NAMES = {
    "dogface": "1F436", "dog": "1F436", "catface": "1F431", "cat": "1F431", "mouseface": "1F42D", "mouse": "1F42D",
    "bunny": "1F430", "foxface": "1F98A", "bearface": "1F43B", "bear": "1F43B", "pandaface": "1F43C",
    "panda": "1F43C", "lionface": "1F981", "tigerface": "1F42F", "cowface": "1F42E", "pigface": "1F437",
    "frogface": "1F438", "monkeyface": "1F435", "horseface": "1F434", "unicornface": "1F984",
    "frontfacingchick": "1F425", "babychick": "1F424", "tropicalfish": "1F420", "spurtingwhale": "1F433",
    "ladybeetle": "1F41E", "ladybug": "1F41E", "redapple": "1F34E", "earofmaize": "1F33D", "aubergine": "1F346",
    "softicecream": "1F366", "hotbeverage": "2615", "oncomingautomobile": "1F698", "fireengine": "1F692",
    "deliverytruck": "1F69A", "housebuilding": "1F3E0", "umbrella": "2614", "umbrellawithraindrops": "2614",
    "blackheartsuit": "2665", "redheart": "2764", "heavyblackheart": "2764", "whitemediumstar": "2B50",
    "snowmanwithoutsnow": "26C4", "soccerball": "26BD", "basketballandhoop": "1F3C0", "closedbook": "1F4D5",
    "alarmclock": "23F0", "athleticshoe": "1F45F", "runningshoe": "1F45F", "schoolsatchel": "1F392",
    "schoolbackpack": "1F392", "robotface": "1F916", "extraterrestrialalien": "1F47D", "jackolantern": "1F383",
    "electriclightbulb": "1F4A1", "lightbulb": "1F4A1", "lock": "1F512", "personalcomputer": "1F4BB",
    "tshirt": "1F455", "t-shirt": "1F455", "wrappedpresent": "1F381", "wrappedgift": "1F381",
    "gemstone": "1F48E", "birthdaycake": "1F382", "slicepizza": "1F355", "mansshirt": "1F455",
}  # fmt: skip


def squash(name: str) -> str:
    """A name without case, hyphens, and the number that some sets append to a drawing's variants."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"-\d$", "", name.lower()))


def plain_code(code: str) -> str:
    """A code point sequence in upper case without variation selectors (`2764-fe0f` -> `2764`)."""
    return "-".join(part for part in code.upper().lstrip("0").split("-") if part != "FE0F")


@dataclass(frozen=True)
class Emoji:
    """One entry of the Unicode emoji list: code point, English label, search words."""

    code: str
    label: str
    tags: tuple[str, ...]


def install_packages(folder: Path) -> Path:
    """Fetch the pinned icon packages with npm into `folder`; returns its node_modules.

    Raises RuntimeError when npm is missing or fails; nothing of the packages is executed.
    """
    if shutil.which("npm") is None:
        raise RuntimeError("npm was not found; install Node.js, or give a node_modules folder with --packages")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"private": true}\n')
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", *STYLES.values(), *NAMES]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        # npm's last line only names its log file; what went wrong comes first.
        reason = " ".join(done.stderr.split("\n")[:3]).strip()
        raise RuntimeError(f"npm install failed: {reason}; is the registry reachable?")
    return folder / "node_modules"


def read_emoji(packages: Path) -> dict[str, Emoji]:
    """The emoji list by plain code point, with emojibase's labels and both packages' search words."""
    entries = json.loads((packages / "emojibase-data/en/data.json").read_text(encoding="utf-8"))
    words = json.loads((packages / "emojilib/dist/emoji-en-US.json").read_text(encoding="utf-8"))
    found: dict[str, Emoji] = {}
    for entry in entries:
        more = [w.replace("_", " ") for w in words.get(entry["emoji"], [])]
        tags = tuple(dict.fromkeys([*entry.get("tags", []), *more]))
        code = plain_code(entry["hexcode"])
        found[code] = Emoji(code, entry["label"], tags)
    return found


def _code_table(packages: Path, emoji: dict[str, Emoji]) -> dict[str, str]:
    """Squashed icon name -> code point, from the packages' own tables and from the Unicode labels."""
    table = {squash(e.label): e.code for e in emoji.values()}
    for spec in STYLES.values():
        chars = packages / spec.rsplit("@", 1)[0] / "chars.json"
        if chars.exists():
            for code, name in json.loads(chars.read_text(encoding="utf-8")).items():
                table.setdefault(squash(name), plain_code(code))
    return table


def _svg_drawings(package: Path, table: dict[str, str], emoji: dict[str, Emoji]) -> Iterator[tuple[str, str]]:
    """(code point, SVG text) of the drawings in an Iconify package that are in the emoji list, once each."""
    data = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    seen: set[str] = set()
    # fxemoji calls the faces plainly "dog" and "cat"; the other sets keep those words for the whole animals.
    first, then = (OTHER_NAMES, table) if data["prefix"] == "fxemoji" else (table, OTHER_NAMES)
    for name in data["icons"]:
        code = first.get(squash(name)) or then.get(squash(name), "")
        if code not in emoji or code in seen:
            continue
        seen.add(code)
        icon = data["icons"][name]
        box = (icon.get("left", 0), icon.get("top", 0),
               icon.get("width", data.get("width", 16)), icon.get("height", data.get("height", 16)))  # fmt: skip
        view = " ".join(map(str, box))
        yield code, f'<svg {NAMESPACES} viewBox="{view}">{icon["body"]}</svg>'


def _render_svg(svg: str) -> Image.Image:
    import resvg_py

    return Image.open(BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)))).convert("RGBA")


def _shrink(path: Path) -> Image.Image:
    """A bitmap at SIZE; resized with premultiplied alpha, so that no dark rim appears."""
    return Image.open(path).convert("RGBa").resize((SIZE, SIZE), Image.Resampling.LANCZOS).convert("RGBA")


def _drawings(
    package: Path, table: dict[str, str], emoji: dict[str, Emoji]
) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    if (package / "icons.json").exists():
        for code, svg in _svg_drawings(package, table, emoji):
            yield code, lambda svg=svg: _render_svg(svg)  # type: ignore[misc]
    else:
        for path in sorted((package / "assets").glob("*.webp")):
            if plain_code(path.stem) in emoji:
                yield plain_code(path.stem), lambda path=path: _shrink(path)  # type: ignore[misc]


def build(
    out: str | Path, packages: str | Path | None = None, progress: Callable[[int, int, str], None] | None = None
) -> Path:
    """Render every icon of the nine sets into `out` and write its index; returns the index's path.

    packages: a node_modules folder that already holds the packages; without it they are fetched with npm
    into `out/.npm`. progress is called with (done, total styles, style). Raises RuntimeError without npm or
    resvg-py, FileNotFoundError naming the packages that the folder lacks. Rendering takes about a minute; an
    interrupted build starts over, the index comes last.
    """
    out = Path(out)
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise RuntimeError("rendering icons needs resvg-py: pip install 'sfumato[train]'") from error
    source = Path(packages) if packages else install_packages(out / ".npm")
    missing = [spec for spec in (*STYLES.values(), *NAMES) if not (source / spec.rsplit("@", 1)[0]).is_dir()]
    if missing:
        raise FileNotFoundError(f"{source} lacks the packages {', '.join(missing)}; install them there with npm")
    emoji = read_emoji(source)
    table = _code_table(source, emoji)
    rows: list[dict[str, object]] = []
    with ThreadPoolExecutor() as pool:
        for done, (style, spec) in enumerate(STYLES.items()):
            folder = out / style
            folder.mkdir(parents=True, exist_ok=True)

            def render(item: tuple[str, Callable[[], Image.Image]], folder: Path = folder) -> str | None:
                code, draw = item
                image = draw()
                if image.getchannel("A").getextrema()[1] == 0:  # an empty drawing
                    return None
                image.save(folder / f"{code}.png", compress_level=3)
                return code

            drawn = pool.map(render, _drawings(source / spec.rsplit("@", 1)[0], table, emoji))
            for code in sorted(c for c in drawn if c):
                entry = emoji[code]
                rows.append({"code": code, "label": entry.label, "tags": entry.tags, "style": style,
                             "file": f"{style}/{code}.png"})  # fmt: skip
            if progress:
                progress(done + 1, len(STYLES), style)
    index = out / "icons.json"
    with replacing(index) as temporary:
        text = json.dumps({"styles": list(STYLES), "icons": rows}, ensure_ascii=False)
        temporary.write_text(text, encoding="utf-8")
    return index


@dataclass(frozen=True)
class Icon:
    """One drawing: where it comes from and what it shows."""

    code: str
    label: str
    tags: tuple[str, ...]
    style: str
    path: Path

    def rgba(self) -> np.ndarray:
        """The picture as uint8 (128, 128, 4)."""
        return np.asarray(Image.open(self.path).convert("RGBA"))


class IconSet:
    """The icons of a folder that `build` made; raises FileNotFoundError naming the command that makes it."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        index = folder / "icons.json"
        if not index.exists():
            raise FileNotFoundError(f"no icon set in {folder}; make one with: sfumato data icons --out {folder}")
        data = json.loads(index.read_text(encoding="utf-8"))
        self.styles: list[str] = data["styles"]
        self.icons = [
            Icon(row["code"], row["label"], tuple(row["tags"]), row["style"], folder / row["file"])
            for row in data["icons"]
        ]

    def by_code(self) -> dict[str, dict[str, Icon]]:
        """code point -> style -> icon."""
        table: dict[str, dict[str, Icon]] = {}
        for icon in self.icons:
            table.setdefault(icon.code, {})[icon.style] = icon
        return table
