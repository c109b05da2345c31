"""Tables of texts with titles: the same for the terminal, Markdown and HTML, with JSON and CSV beside them."""

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Group, JustifyMethod, RenderableType
from rich.text import Text

from augment_cli.errors import InputError, nearest
from augment_cli.reporting.html import page, scroll
from augment_cli.reporting.markup import Markup, minus, tag
from augment_cli.reporting.table import bare_table, to_text
from augment_cli.reporting.text import escape
from augment_cli.terminal import plain


@dataclass(frozen=True)
class Column:
    """A column's title, and whether it is text (left) or a number."""

    title: str
    is_text: bool = False


@dataclass(frozen=True)
class Sheet:
    """A titled table. `note` explains its cells."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def to_rich(self) -> RenderableType:
        table = bare_table()
        for column in self.columns:
            justify: JustifyMethod = "left" if column.is_text else "right"
            table.add_column(plain(column.title), justify=justify, no_wrap=not column.is_text, overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(plain(cell)) for cell in row))
        note = [Text(plain(self.note), style="dim")] if self.note else []
        return Group(Text(f"{plain(self.title)}\n", style="bold"), table, *note, "")

    def to_markdown(self) -> str:
        titles = (escape(column.title.strip()) for column in self.columns)
        rule = ("---" if column.is_text else "---:" for column in self.columns)
        rows = (map(escape, row) for row in self.rows)
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows))
        return "\n\n".join(filter(None, (f"## {escape(self.title)}", table, escape(self.note))))

    def to_html(self) -> Markup:
        def row_of(texts: tuple[str, ...]) -> Iterator[Markup]:
            for i, (column, text) in enumerate(zip(self.columns, texts, strict=True)):
                shown, style = (text, "left") if column.is_text else (minus(text), None)
                if i == 0:
                    yield tag("th", shown, class_="number" if column.title == "#" else style, scope="row")
                else:
                    yield tag("td", shown, class_=style, data_label=column.title.strip())

        titles = (tag("th", c.title, scope="col", class_="left" if c.is_text else None) for c in self.columns)
        body = (tag("tr", row_of(row)) for row in self.rows)
        table = tag(
            "table",
            tag("caption", self.title),
            tag("thead", tag("tr", titles)),
            tag("tbody", body),
            class_="sheet stack",
        )
        note = tag("p", self.note, class_="quiet") if self.note else None
        return tag("section", tag("h2", self.title), note, scroll(table, self.title))


class Sheets(ABC):
    """Findings that show themselves: `str` gives the tables of the terminal, a notebook shows Markdown."""

    @property
    @abstractmethod
    def heading(self) -> str:
        """What they are about, in a few words."""

    @abstractmethod
    def sheets(self, full: bool = False) -> Iterable[Sheet]:
        """The tables; all rows and all tables where `full`."""

    @abstractmethod
    def data(self) -> dict[str, Any]:
        """Everything, as a JSON object. A value that is unknown or does not apply is None."""

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """One row or more for a CSV file, all with the same keys."""

    def pictures(self) -> Iterable[Markup]:
        """Sections with pictures, after the tables of the page."""
        return ()

    def table(self, full: bool = False) -> RenderableType:
        """The tables for the terminal."""
        return Group(*(sheet.to_rich() for sheet in self.sheets(full)))

    def to(self, form: str) -> str:
        """The findings as "json", "csv", "markdown" or "html"; the last is a page of its own.

        Raises:
            AugmentError: no such form.
        """
        forms = {"json": self._json, "csv": self._csv, "markdown": self._markdown, "html": self._html}
        if form not in forms:
            raise InputError(f"nothing is written as {form}{nearest(form, forms)}")
        return forms[form]()

    def __str__(self) -> str:
        return to_text(self.table())

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        return self._markdown()

    def _json(self) -> str:
        return json.dumps(self.data(), indent=2) + "\n"

    def _csv(self) -> str:
        stream, rows = io.StringIO(), self.rows()
        writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue()

    def _markdown(self) -> str:
        return "\n\n".join((f"# {escape(self.heading)}", *(sheet.to_markdown() for sheet in self.sheets(True)))) + "\n"

    def _html(self) -> str:
        header = tag("header", tag("p", "augment-cli", class_="eyebrow"), tag("h1", self.heading))
        main = tag("main", (sheet.to_html() for sheet in self.sheets(True)), self.pictures())
        return page(self.heading, header, main)
