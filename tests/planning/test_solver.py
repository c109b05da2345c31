"""The integer programs, against trying everything; and what they print."""

import ctypes
import os
from itertools import product

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from augment_cli.planning.solver import Row, minimise

GROUPS, OPTIONS = np.repeat([0, 1], 4), range(4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_minimum_is_that_of_trying_everything(data):
    """Two groups of two things, each of which takes one of four options."""
    numbers = st.lists(st.integers(-50, 50), min_size=8, max_size=8)
    objective = np.array(data.draw(numbers)) / 7
    rows = [Row(np.array(data.draw(numbers)), most=data.draw(st.integers(-100, 100))) for _ in range(2)]
    rows.append(Row(np.array(data.draw(numbers)), least=data.draw(st.integers(-150, 50))))
    tried = []
    for takes in product(OPTIONS, OPTIONS, OPTIONS, OPTIONS):
        counts = np.bincount([takes[0], takes[1], 4 + takes[2], 4 + takes[3]], minlength=8)
        if all(row.least <= row.use @ counts <= row.most for row in rows):
            tried.append(objective @ counts)
    found = minimise(objective, GROUPS, np.array([2, 2]), rows)
    if not tried:
        assert found is None
        return
    assert [found.counts[:4].sum(), found.counts[4:].sum()] == [2, 2]
    assert all(row.least <= row.use @ found.counts <= row.most for row in rows)
    assert objective @ found.counts == pytest.approx(min(tried), abs=1e-9)


def test_a_row_binds_where_it_has_a_price():
    objective, sizes = np.arange(8.0), np.array([2, 2])
    loose, tight = Row(np.ones(8, int), most=100), Row(-np.arange(8), most=-20)
    assert minimise(objective, GROUPS, sizes, [loose, tight]).binding == (False, True)


def test_nothing_that_the_solver_prints_reaches_stdout(monkeypatch, capfd):
    """C's printf, which keeps its own buffer; afterwards the descriptor is what it was."""
    milp = scipy.optimize.milp

    def printing(*args, **kwargs):
        ctypes.CDLL(None).printf(b"HighsMipSolverData says something\n")
        os.write(1, b"and more\n")
        return milp(*args, **kwargs)

    monkeypatch.setattr(scipy.optimize, "milp", printing)
    minimise(np.arange(8.0), GROUPS, np.array([2, 2]), [])
    os.write(1, b"ours\n")
    out, err = capfd.readouterr()
    assert out == "ours\n"
    assert "HighsMipSolverData" in err


def test_a_closed_stdout_does_not_stop_the_solver(capfd):
    kept = os.dup(1)
    os.close(1)
    try:
        found = minimise(np.arange(8.0), GROUPS, np.array([2, 2]), [])
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert found.counts.tolist() == [2, 0, 0, 0, 2, 0, 0, 0]
