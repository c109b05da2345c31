import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from augment_cli.layers.aa.relative import by_position, relative_logits, resize_table, table_rows
from tests.layers import oracles
from tests.layers.helpers import assert_equal, normal, seeds

sizes = st.integers(1, 9)


@given(sizes, sizes, st.integers(1, 4), seeds)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_resizing_is_linear_in_the_offset(size, other, channels, seed):
    table = normal(2 * size - 1, channels, seed=seed)
    assert_equal(resize_table(table, other), oracles.resized(table, other))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_resizing_to_the_same_size_changes_nothing(size):
    table = normal(2 * size - 1, 3, seed=0)
    assert torch.equal(resize_table(table, size), table)


@given(sizes, sizes, seeds)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_offset_zero_stays_offset_zero(size, other, seed):
    table = normal(2 * size - 1, 3, seed=seed)
    assert_equal(resize_table(table, other)[other - 1], table[size - 1])


@given(sizes, st.integers(2, 9), seeds)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_largest_offsets_meet_largest_offsets(size, other, seed):
    table = normal(2 * size - 1, 3, seed=seed)
    resized = resize_table(table, other)
    assert_equal(resized[0], table[0])
    assert_equal(resized[-1], table[-1])


def test_a_single_row_is_repeated():
    table = normal(1, 3, seed=0)
    assert_equal(resize_table(table, 4), table.expand(7, 3))


def test_a_map_of_one_position_keeps_offset_zero_alone():
    table = normal(9, 3, seed=0)
    assert torch.equal(resize_table(table, 1), table[4:5])


def test_resizing_does_not_change_its_input():
    table = normal(9, 3, seed=0)
    copy = table.clone()
    resize_table(table, 3).mul_(2)
    assert torch.equal(table, copy)


@given(sizes)
@settings(max_examples=9, deadline=None, derandomize=True)
def test_rows_are_found_by_offset(size):
    offsets = torch.arange(-(size - 1), size, dtype=torch.float64).unsqueeze(1)
    assert len(offsets) == table_rows(size)
    positions = by_position(offsets, size)
    for i in range(size):
        for j in range(size):
            assert positions[i, j].item() == j - i


@given(st.integers(1, 5), st.integers(1, 5), sizes, sizes, seeds)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_logits_are_query_times_row_of_the_offset(height, width, table_height, table_width, seed):
    q = normal(2, 3, height, width, 4, seed=seed)
    rel_height, rel_width = (
        normal(2 * table_height - 1, 4, seed=seed + 1),
        normal(2 * table_width - 1, 4, seed=seed + 2),
    )
    rows, columns = relative_logits(q, rel_height, rel_width)
    r_height, r_width = oracles.resized(rel_height, height), oracles.resized(rel_width, width)
    expected_rows = torch.zeros(2, 3, height, width, height, dtype=torch.float64)
    expected_columns = torch.zeros(2, 3, height, width, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            for j in range(height):
                expected_rows[:, :, y, x, j] = (q[:, :, y, x] * r_height[j - y + height - 1]).sum(-1)
            for j in range(width):
                expected_columns[:, :, y, x, j] = (q[:, :, y, x] * r_width[j - x + width - 1]).sum(-1)
    assert_equal(rows, expected_rows)
    assert_equal(columns, expected_columns)
