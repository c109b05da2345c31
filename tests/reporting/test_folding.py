from hypothesis import given, settings
from hypothesis import strategies as st

from augment_cli.reporting import Report
from augment_cli.reporting.folding import fold, fold_names
from augment_cli.reporting.numbers import Change
from tests.reporting.conftest import attended, plan, site


def labels(*sites) -> list[str]:
    return [line.label for line in fold(Report.of(plan(*sites)).sites)]


def test_equal_sites_share_a_line():
    sites = [site(f"layer3.{i}.conv2") for i in range(6)]
    assert labels(*sites) == ["layer3.0-5.conv2 (6 sites)"]
    assert labels(*sites[:2], *sites[3:]) == ["layer3.0-1,3-5.conv2 (5 sites)"]


def test_unequal_sites_do_not():
    assert labels(site("a.0.conv"), site("a.1.conv", key_channels=80)) == ["a.0.conv", "a.1.conv"]
    assert labels(site("a.0.conv"), attended("a.1.conv")) == ["a.0.conv", "a.1.conv"]


def test_names_that_differ_in_text_do_not():
    assert labels(site("left.0"), site("right.0")) == ["left.0", "right.0"]


def test_ranges_spell_out_exactly_their_members():
    names = ["l1.0.conv1", "l1.0.conv2", "l1.1.conv1", "l1.1.conv2", "l2.0.conv2", "l2.1.conv1", "l2.1.conv2"]
    assert fold_names(names) == [
        ("l1.0-1.conv1-2", ("l1.0.conv1", "l1.0.conv2", "l1.1.conv1", "l1.1.conv2")),
        ("l2.0.conv2", ("l2.0.conv2",)),
        ("l2.1.conv1-2", ("l2.1.conv1", "l2.1.conv2")),
    ]


def test_leading_zeros_are_text():
    assert {short for short, _ in fold_names(["b01.c", "b02.c", "b1.c", "b2.c"])} == {"b01.c", "b02.c", "b1-2.c"}


@settings(max_examples=200, deadline=None)
@given(st.sets(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=30))
def test_folding_names_loses_and_invents_none(numbers: set[tuple[int, int, int]]):
    names = {f"s{a}.{b}.conv{c}" for a, b, c in numbers}
    groups = fold_names(names)
    assert sorted(member for _, group in groups for member in group) == sorted(names)
    for short, group in groups:
        assert len(_spelled_out(short)) == len(group)
        assert _spelled_out(short) == set(group)


def _spelled_out(short: str) -> set[str]:
    """Read ranges back, naively."""
    stage, block, conv = short.removeprefix("s").replace("conv", "").split(".")
    return {f"s{a}.{b}.conv{c}" for a in _numbers(stage) for b in _numbers(block) for c in _numbers(conv)}


def _numbers(text: str) -> set[int]:
    ends = [part.split("-") for part in text.split(",")]
    return {number for part in ends for number in range(int(part[0]), int(part[-1]) + 1)}


def test_a_line_has_the_sums(report: Report):
    line = fold(report.sites)[0]
    assert line.params == Change(6 * 147_456, 6 * 181_368)
    assert line.macs == Change(6 * 115_605_504, 6 * 123_953_536)
