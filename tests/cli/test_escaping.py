"""Printed text is shown and never obeyed: control characters, terminal sequences, markup, spreadsheet formulas."""

import csv
import io
import json
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from augment_cli.cli import common
from augment_cli.console import Terminal
from augment_cli.reporting import FORMATS, Report
from augment_cli.reporting.text import cell
from augment_cli.terminal import echo, plain, say
from tests.cli.helpers import ok, run
from tests.conftest import plan_of

HOSTILE = "[red]x[/blink]\x1b[2J\x1b]0;owned\x07\u202e:smile:"
SHOWN = r"[red]x[/blink]\x1b[2J\x1b]0;owned\x07\u202e:smile:"


@pytest.fixture
def plan_file(in_tmp: Path) -> Path:
    data = json.loads(plan_of("test_resnet", "aa").to_json())
    data["recipe"] = data["skipped"][0]["reason"] = HOSTILE
    (in_tmp / "plan.json").write_text(json.dumps(data))
    return in_tmp / "plan.json"


def clean(text: str) -> bool:
    return all(c.isprintable() or c in "\n\t" for c in text)


@pytest.mark.parametrize("form", ["table", "csv", "markdown", "html", "json"])
def test_reports_of_a_plan_print_no_control_character(plan_file, form):
    assert clean(ok("report", str(plan_file), "--format", form, "--full").output)


def test_every_command_that_reads_a_converted_model_prints_no_control_character(plan_file):
    result = ok("convert", "--plan", str(plan_file), "-o", "m.safetensors")
    assert clean(result.output)
    assert SHOWN in result.stderr
    for arguments in (("report", "m.safetensors"), ("check", "m.safetensors"), ("check", "m.safetensors", "--json")):
        assert clean(ok(*arguments).output)
    assert "[red]x[/blink]" in ok("check", "m.safetensors").stdout


@pytest.mark.parametrize("name", ["nope[/x]", "[red]x[/blink]", "a\x1b[31mb", ":smile:", "new\nline"])
def test_names_that_the_user_gives_are_printed_as_they_are(in_tmp, name):
    for arguments in (
        ("convert", "test_resnet", "--init", "fit", "--calibrate", name),
        ("convert", "test_resnet", "--checkpoint", name),
        ("convert", name),
        ("convert", "test_resnet", "-r", name),
        ("convert", "test_resnet", "--set", f"select.names={name}"),
        ("report", name),
        ("check", name),
        ("evaluate", "test_resnet", "--data", name),
        ("models", name),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert plain(name)[:10] in result.stderr, arguments
        assert clean(result.output), arguments
        assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_a_terminal_keeps_its_own_colours_and_escapes_everybody_elses():
    stream = io.StringIO()
    terminal = Terminal(file=stream, force_terminal=True, width=200, color_system="standard")
    rows = Table(HOSTILE, title=HOSTILE)
    rows.add_row(HOSTILE)
    rows.add_row(Text(HOSTILE, "red"))
    terminal.print(rows)
    text = stream.getvalue()
    assert text.count(SHOWN.partition("\\x1b")[0]) == 4
    assert "\x1b[2J" not in text
    assert "\x1b]0" not in text
    assert "\u202e" not in text
    assert "\x1b[31m" in text


def test_messages_are_one_line_and_data_keep_their_lines(capsys):
    say("a\nerror: b\r\x1b[1m")
    echo("a\n\tb\x1b[1m\n")
    out, err = capsys.readouterr()
    assert err == "a\\nerror: b\\r\\x1b[1m\n"
    assert out == "a\n\tb\\x1b[1m\n"


def test_spinners_and_bars_take_any_text(capsys):
    with common.working(HOSTILE), common.bar(HOSTILE) as progress:
        progress(HOSTILE, 1, 2)
    assert clean(capsys.readouterr().err)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "=cmd|' /C calc'!A0", "\t=1", "\r=1"])
def test_cells_that_a_spreadsheet_would_compute_are_text(text):
    shown = cell(text)
    assert shown[0] not in "=+-@\t\r"
    assert shown.removeprefix("'") == plain(text)


def test_the_names_of_a_csv_report_are_text_and_its_numbers_numbers():
    data = json.loads(plan_of("test_resnet", "aa").to_json())
    data["sites"][0]["name"] = "=HYPERLINK(0)"
    report = Report.of(type(plan_of("test_resnet", "aa")).model_validate(data))
    rows = list(csv.DictReader(io.StringIO(FORMATS["csv"](report))))
    assert "'=HYPERLINK(0)" in [row["name"] for row in rows]
    assert [int(row["params_delta"]) for row in rows] == [site.params.delta for site in report.sites]
