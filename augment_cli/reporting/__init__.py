"""Reports: one set of numbers, shown as a rich table, JSON, CSV, Markdown, HTML or a model card.

Imports neither torch nor timm.
"""

from collections.abc import Callable

from augment_cli.reporting.card import model_card
from augment_cli.reporting.html import to_html
from augment_cli.reporting.numbers import Report
from augment_cli.reporting.table import table
from augment_cli.reporting.text import to_csv, to_json, to_markdown

FORMATS: dict[str, Callable[[Report], str]] = {
    "json": to_json,
    "csv": to_csv,
    "markdown": to_markdown,
    "html": to_html,
}

__all__ = ["FORMATS", "Report", "model_card", "table"]
