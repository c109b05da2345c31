import io

import pytest
from rich.console import Console

from augment_cli.reporting import Report, table
from augment_cli.reporting.table import plain_table
from tests.reporting.conftest import attended, plan


def shown(report: Report, width: int = 80, full: bool = False, **console) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, **console).print(table(report, full))
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("full", [False, True])
def test_totals_are_all_there(report: Report, width: int, full: bool):
    text = shown(report, width, full)
    assert max(map(len, text.splitlines())) <= width
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert lines["Parameters"].split()[1:] == ["1,082,192", "1,298,556", "+216,364", "+20.0%", "keep", "-216,364"]
    assert "3.779G" in lines["Multiply-adds (MACs)"]
    assert "7.558G" in lines["FLOPs"]
    assert "FLOPs = 2 x multiply-adds" in text


def test_equal_sites_share_a_line(report: Report):
    assert "layer3.0-5.conv2" in shown(report)
    assert "layer3.4.conv2" not in shown(report)


def test_full_has_every_site(report: Report):
    text = shown(report, full=True)
    assert all(entry.name in text for entry in report.sites)


@pytest.mark.parametrize("full", [False, True])
def test_nothing_is_cut_off_at_80_columns(many: Report, full: bool):
    assert "…" not in shown(many, full=full)


def test_a_narrow_terminal_gets_more_tables(report: Report):
    assert shown(report, 80).count("\nSite ") == 2
    assert shown(report, 160).count("\nSite ") == 1


def test_skipped_by_reason(report: Report):
    text = shown(report, 120)
    assert "8 convolutions stay as they are" in text
    assert "layer3.0-5.conv1" in text


def test_columns_that_do_not_apply_are_left_out(report: Report):
    text = shown(Report.of(plan(attended("a.conv"))), 120)
    assert "Heads" not in text
    assert " r " in text
    assert " r " not in shown(report, 120)


def test_colours_are_for_terminals_only(report: Report):
    assert "\x1b[" not in shown(report)
    assert "\x1b[" in shown(report, force_terminal=True, color_system="standard")


def test_hostile_names_are_shown_not_obeyed(hostile: Report):
    text = shown(hostile, 120)
    assert "\x1b" not in text
    assert "[red]x[/red]" in text.replace("\n", "")


def test_text_for_a_file(report: Report):
    text = plain_table(report)
    assert text.isascii() or set(text) - {"─"} <= set(map(chr, range(128)))
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "1,298,556" in text
