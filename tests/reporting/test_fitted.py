"""Reports of models whose attention was fitted."""

import csv
import io
import json

import pytest

from augment_cli.checkpoint.metadata import Metadata
from augment_cli.planning.plan import Plan
from augment_cli.reporting import Report, model_card
from augment_cli.reporting.html import to_html
from augment_cli.reporting.table import plain_table
from augment_cli.reporting.text import to_csv, to_json, to_markdown
from augment_cli.surgery.records import Fidelity, Inheritance
from tests.reporting.conftest import metadata

SENTENCE = "98.5% of 102 held-out calibration images"


@pytest.fixture
def fitted(small: Plan) -> Report:
    made = metadata(small)
    records = tuple(
        Inheritance(**{**record.model_dump(), "kind": "fitted", "error": 0.05 * (i + 1)})
        for i, record in enumerate(made.inheritance)
    )
    fidelity = Fidelity(images=102, fitted_on=410, agreement=0.985, divergence=0.0123)
    return Report.of(small, made.model_copy(update={"inheritance": records, "fidelity": fidelity}))


def test_the_mean_error_is_over_the_sites(fitted: Report):
    assert fitted.error == pytest.approx(0.2)
    assert fitted.inheritance == {"exact": 0, "carried": 0, "fitted": 7, "new": 0}


def test_every_view_shows_the_errors_and_the_agreement(fitted: Report):
    table = plain_table(fitted, width=200)
    assert "0.050-0.300" in table
    assert "0.350" in table
    assert "0.200" in table
    assert SENTENCE in table
    card = model_card(fitted)
    assert "| 0.050-0.300 |" in card
    assert SENTENCE in card
    assert "untrained" not in card
    html = to_html(fitted)
    assert "98.5%" in html
    assert "0.050\N{EN DASH}0.300" in html
    assert "untrained" not in html
    markdown = to_markdown(fitted)
    assert "| 0.050-0.300 |" in markdown
    assert SENTENCE in markdown


def test_json_and_csv_have_the_numbers_in_full(fitted: Report):
    data = json.loads(to_json(fitted))
    assert data["fidelity"] == {"images": 102, "fitted_on": 410, "agreement": 0.985, "divergence": 0.0123}
    assert data["sites"][2]["inheritance"]["error"] == pytest.approx(0.15)
    assert data["sites_totals"]["error"] == pytest.approx(0.2)
    row = next(csv.DictReader(io.StringIO(to_csv(fitted))))
    assert (row["inheritance"], row["filters_given_up"], row["error"]) == ("fitted", "8", "0.05")


def test_nothing_of_it_is_shown_where_nothing_was_fitted(report: Report):
    assert report.error is None
    assert report.fidelity is None
    assert "Error" not in plain_table(report, width=200)
    assert json.loads(to_json(report))["fidelity"] is None


def test_a_header_comes_back_from_its_metadata_and_an_older_one_still_loads(fitted: Report, small: Plan):
    made = metadata(small).model_copy(update={"fidelity": fitted.fidelity})
    data = json.loads(made.to_metadata()["augment"])
    assert Metadata.model_validate(data) == made
    del data["fidelity"]
    for record in data["inheritance"]:
        del record["error"]
    assert Metadata.model_validate(data) == metadata(small)
