import csv
import io
import json

import pytest

from augment_cli.reporting import FORMATS, Report
from augment_cli.reporting.folding import fold
from augment_cli.reporting.text import code, escape, to_csv, to_json, to_markdown
from augment_cli.reporting.units import amount, percent, share, span
from tests.reporting.conftest import HOSTILE, metadata, plan, site


def test_json_has_the_numbers_as_numbers(report: Report):
    data = json.loads(to_json(report))
    assert data["totals"]["params"] == {
        "before": 1_082_192,
        "after": 1_298_556,
        "delta": 216_364,
        "percent": pytest.approx(100 * 216_364 / 1_082_192),
        "ratio": pytest.approx(1_298_556 / 1_082_192),
        "budget": "keep",
        "limit": 1_082_192,
        "left": -216_364,
    }
    assert data["totals"]["macs"]["limit"] is None
    assert data["totals"]["flops"]["after"] == 2 * data["totals"]["macs"]["after"]
    assert sum(entry["params"]["delta"] for entry in data["sites"]) == data["totals"]["params"]["delta"]
    assert sum(entry["macs"]["delta"] for entry in data["sites"]) == data["totals"]["macs"]["delta"]
    carried = {"kind": "carried", "kept": 120, "given_up": 8, "share": 0.9, "error": None}
    assert data["sites"][0]["inheritance"] == carried
    assert data["sites"][6]["resolution"] == [14, 14]
    assert (
        sum(group["count"] for group in data["skipped"]) == sum(len(group["names"]) for group in data["skipped"]) == 8
    )
    assert data["weights"] == "pretrained"


def test_json_keys_do_not_depend_on_a_header(report: Report, small):
    with_header, without = json.loads(to_json(report)), json.loads(to_json(Report.of(small)))
    assert with_header.keys() == without.keys()
    assert with_header["sites"][0].keys() == without["sites"][0].keys()
    assert without["source_sha256"] is without["sites"][0]["inheritance"] is None


def test_json_keeps_names_as_they_are(hostile: Report):
    assert json.loads(to_json(hostile))["model"] == HOSTILE


def test_csv_has_a_row_for_each_site_that_sum_to_the_totals(report: Report):
    rows = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert [row["name"] for row in rows] == [entry.name for entry in report.sites]
    assert sum(int(row["params_delta"]) for row in rows) == report.params.delta
    assert sum(int(row["macs_after"]) for row in rows) == report.sites_macs.after
    assert (
        rows[6] | {"stride_height": "2", "map_width": "14", "filters_kept": "120", "inheritance": "carried"} == rows[6]
    )


def test_csv_quotes_what_has_commas(hostile: Report, small):
    row = next(csv.DictReader(io.StringIO(to_csv(Report.of(plan(site('a,"b".conv')))))))
    assert row["name"] == 'a,"b".conv'
    assert row["importance_share"] == ""


def test_markdown_has_every_site_and_reason(report: Report):
    text = to_markdown(report)
    for line in fold(report.sites):
        assert f"| `{line.name}`" in text
    for group in report.skipped:
        assert f"| {len(group.names)} | {group.reason} |" in text
    assert "1,298,556" in text
    assert "FLOPs = 2 x multiply-adds" in text


@pytest.mark.parametrize("name", ["report", "hostile", "many"])
def test_markdown_tables_are_rectangular(name: str, request: pytest.FixtureRequest):
    widths, previous = [], None
    for line in to_markdown(request.getfixturevalue(name)).splitlines():
        width = line.replace("\\|", "").count("|") if line.startswith("|") else None
        if width and previous:
            assert width == previous
        widths.append(width)
        previous = width
    assert len({width for width in widths if width}) == (3 if name != "many" else 2)


def test_markdown_shows_hostile_names_as_code(hostile: Report):
    text = to_markdown(hostile)
    assert "\x1b" not in text
    assert "\\<script\\>" in text  # the reason, which is no code


def test_code_spans():
    assert code("a.b") == "`a.b`"
    assert code("a|b") == "`a\\|b`"
    assert code("`") == "`` ` ``"
    assert code("a``b") == "```a``b```"
    assert escape("a_b<c>") == "a\\_b\\<c\\>"


def test_all_formats_end_with_one_newline(report: Report):
    assert list(FORMATS) == ["json", "csv", "markdown", "html"]
    for show in FORMATS.values():
        assert show(report).endswith("\n")
        assert not show(report).endswith("\n\n")


def test_formats_are_the_same_each_time(small):
    first, second = (Report.of(small, metadata(small)) for _ in range(2))
    assert all(show(first) == show(second) for show in FORMATS.values())


def test_units():
    assert [amount(n) for n in (0, 999, 1000, 999_949, 999_950, 25_557_032, -4_089_184_256)] == [
        "0",
        "999",
        "1.000k",
        "999.9k",
        "1.000M",
        "25.56M",
        "-4.089G",
    ]
    assert [percent(p) for p in (0.0, -0.001, 9.994, 12.34, None)] == ["0%", "-0.001%", "+9.99%", "+12.3%", "n/a"]
    assert [share(s) for s in (0, 0.00001, 0.5, 0.99999, 1)] == ["0%", "<0.1%", "50.0%", ">99.9%", "100%"]
    assert span([0.912, 0.887], lambda value: share(value, digits=0)) == "89-91%"
