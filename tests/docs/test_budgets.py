"""docs/budgets.md shows what the benchmarks found, and what it says of that is so."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "budgets.md").read_text(encoding="utf-8")


def results(name: str) -> list[dict]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def percent(share: float) -> str:
    return f"{100 * share:+.1f}%"


def change(ratio: float) -> str:
    return percent(ratio - 1)


@pytest.mark.parametrize("row", results("latency"), ids=lambda row: row["case"])
def test_latencies_are_those_of_the_results_and_within_a_tenth(row):
    cells = [row["case"], f"{row['milliseconds']:.1f} ms"]
    for found in (row["within"], row["recipe"]):
        cells += [change(found["predicted"]), change(found["measured"]["median"]), percent(found["off"])]
        assert abs(found["off"]) < 0.1
    alone = row.get("alone")
    cells += [change(alone["predicted"]), percent(alone["off"])] if alone else ["-", "-"]
    assert f"| {' | '.join(cells)} |" in PAGE


@pytest.mark.parametrize("row", results("frontier"), ids=lambda row: row["case"])
def test_divergences_are_those_of_the_results(row):
    for point in row["points"]:
        cells = f"{point['params']:,}", f"{point['predicted']:.2g}", f"{point['measured']:.2g}"
        assert f"| {' | '.join(cells)} |" in PAGE
    assert len(row["points"]) >= 6
    assert f"{row['rank_correlation']:.2f}" in PAGE
