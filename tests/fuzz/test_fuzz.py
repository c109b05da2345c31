"""A part of `make fuzz`: the same few hundred cases each time, and every case that once failed."""

import pytest

from tests.fuzz.runner import CASES, make, read
from tests.fuzz.targets import TARGETS

COUNTS = {
    "cache": 80,
    "model": 40,
    "plan": 50,
    "recipe": 50,
    "override": 60,
    "settings": 100,
    "state": 60,
    "checkpoint": 40,
}


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_whatever_a_file_holds_it_is_accepted_or_refused(target):
    outcomes = [read(target, make(target, 0, number)) for number in range(COUNTS[target])]
    assert [outcome for outcome in outcomes if outcome not in ("accepted", "refused")] == []
    assert "accepted" in outcomes
    assert "refused" in outcomes


@pytest.mark.parametrize("path", sorted(CASES.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_cases_that_once_failed_do_not_again(path):
    assert read(path.parent.name, path.read_bytes()) in ("accepted", "refused")


@pytest.mark.parametrize("target", sorted(TARGETS.keys() - {"checkpoint"}))  # whose old format holds addresses
def test_a_case_is_drawn_from_seed_and_number_alone(target):
    first = [make(target, 3, number) for number in range(20)]
    assert [make(target, 3, number) for number in reversed(range(20))] == first[::-1]
    assert make(target, 4, 0) != first[0]


def test_a_failure_is_told_from_a_refusal(monkeypatch):
    broken = type(TARGETS["settings"])(TARGETS["settings"].make, lambda path: {}["missing"])
    monkeypatch.setitem(TARGETS, "settings", broken)
    assert "KeyError" in read("settings", b"{}")
