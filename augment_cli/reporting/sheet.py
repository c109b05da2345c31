"""A table of texts with a title: the same for the terminal, Markdown and HTML."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.console import Group, JustifyMethod, RenderableType
from rich.text import Text

from augment_cli.reporting.html import scroll
from augment_cli.reporting.markup import Markup, minus, tag
from augment_cli.reporting.table import bare_table
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
        def cells(row: Iterable[str], cell: Callable[[str, str | None], Markup]) -> list[Markup]:
            styles = ("left" if column.is_text else None for column in self.columns)
            return [cell(text, style) for text, style in zip(row, styles, strict=True)]

        titles = cells((c.title for c in self.columns), lambda text, style: tag("th", text, scope="col", class_=style))
        body = (
            tag("tr", *cells(row, lambda text, style: tag("td", minus(text) if style is None else text, class_=style)))
            for row in self.rows
        )
        table = tag(
            "table", tag("caption", self.title), tag("thead", tag("tr", titles)), tag("tbody", body), class_="sheet"
        )
        note = tag("p", self.note, class_="quiet") if self.note else None
        return tag("section", tag("h2", self.title), note, scroll(table, self.title))
