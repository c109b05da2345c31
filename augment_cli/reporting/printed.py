"""A report that shows itself: printed as the command line's table, in a notebook as Markdown."""

from augment_cli.errors import InputError, nearest
from augment_cli.reporting import FORMATS
from augment_cli.reporting.numbers import Report
from augment_cli.reporting.table import plain_table


class PrintedReport(Report):
    """The numbers of a report. `str` gives the table that `augment report` shows."""

    def __str__(self) -> str:
        return plain_table(self)

    __repr__ = __str__

    def to(self, form: str) -> str:
        """The report as "json", "csv", "markdown" or "html"; the last is a page of its own.

        Raises:
            AugmentError: no such form.
        """
        if form not in FORMATS:
            raise InputError(f"no report as {form}{nearest(form, FORMATS)}")
        return FORMATS[form](self)

    def _repr_markdown_(self) -> str:
        return self.to("markdown")
