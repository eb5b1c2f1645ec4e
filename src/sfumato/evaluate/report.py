"""What a measurement found, as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.files import replacing, write_json

if TYPE_CHECKING:
    from rich.table import Table

HEAD = ("prompts", "measure", "n", "model", "drawn scenes")


@dataclass(frozen=True)
class Row:
    """One figure.

    kind:    which prompts: "own list", "never composed", "synonyms"; or what else was measured on.
    measure: what was measured.
    n:       how many pictures it is the mean of; 0 when it was not measured.
    value:   a share between 0 and 1, or a number in `unit`; None when it was not measured.
    ceiling: the same of real scenes drawn for the same prompts; None without an icon set.
    unit:    "" for shares.
    note:    why something was not measured.
    """

    kind: str
    measure: str
    n: int
    value: float | None
    ceiling: float | None = None
    unit: str = ""
    note: str = ""

    def cells(self) -> tuple[str, str, str, str, str]:
        """The row in words, in the order of the table's head."""
        words = [
            "-" if x is None else f"{x:.1f} {self.unit}" if self.unit else f"{x:.1%}"
            for x in (self.value, self.ceiling)
        ]
        return self.kind, self.measure, str(self.n) if self.n else "-", self.note or words[0], words[1]


@dataclass(frozen=True)
class Report:
    """All figures of one model, and how they were made (`about`: model folder, steps, seeds, seconds...)."""

    about: Mapping[str, Any]
    rows: tuple[Row, ...]

    def __getitem__(self, key: tuple[str, str]) -> Row:
        """The row of a kind and a measure; raises KeyError naming both."""
        for row in self.rows:
            if (row.kind, row.measure) == key:
                return row
        raise KeyError(f"no row {key}; there are: {[(row.kind, row.measure) for row in self.rows]}")

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {"about": dict(self.about), "rows": [asdict(row) for row in self.rows]}

    def markdown(self) -> str:
        """The table in Markdown, with one line below it that says how it was made."""
        lines = ["| " + " | ".join(HEAD) + " |", "|---|---|---:|---:|---:|"]
        lines += ["| " + " | ".join(row.cells()) + " |" for row in self.rows]
        return "\n".join([*lines, "", self.caption, ""])

    def table(self) -> Table:
        """The table for `rich.print`."""
        from rich.table import Table

        table = Table(caption=self.caption)
        for i, title in enumerate(HEAD):
            table.add_column(title, justify="right" if i > 1 else "left")
        for before, row in zip((None, *self.rows), self.rows, strict=False):
            table.add_row(*row.cells())
            if before and before.kind != row.kind:
                table.rows[-2].end_section = True
        return table

    __rich__ = table

    @property
    def caption(self) -> str:
        """One line: how the figures were made."""
        return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.about.items())

    def save(self, folder: Path) -> None:
        """Write report.json and report.md into a folder."""
        write_json(folder / "report.json", self.to_dict())
        with replacing(folder / "report.md") as temporary:
            temporary.write_text(self.markdown(), encoding="utf-8")
