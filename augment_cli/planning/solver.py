"""Integer programs over groups of equal things: how many of each group take each of its options. Solved by HiGHS.

    minimise    sum of counts x objective
    subject to  the counts of a group add up to its size, every row's sum between its least and its most

The linear relaxation comes first. An option whose reduced cost is above the distance between the relaxation and a known
solution is in no better solution, so that only the few others, the core, go into the integer program: a proof of
optimality over thousands of options takes fractions of a second.
"""

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult
    from scipy.sparse import csr_array

# The first core has this many options a group.
_CORE = 4

# HiGHS stops at solutions within 1e-6 of the best: objectives of small numbers are scaled, to be exact to 1e-10.
_SCALE = 1e4
_ABSOLUTE = 1e-6

# Counted, not timed, so that the answer does not depend on the machine's speed.
_NODES = 3_000

_stdout = threading.Lock()


@dataclass(frozen=True)
class Row:
    """A constraint: the sum of counts x `use` is between `least` and `most`. Integer use makes the limits exact."""

    use: np.ndarray
    least: float = -np.inf
    most: float = np.inf

    def reduced(self) -> "Row":
        """The same constraint in the smallest integers."""
        if not np.issubdtype(self.use.dtype, np.integer):
            return self
        divisor = max(1, int(np.gcd.reduce(self.use)))
        return Row(self.use // divisor, np.ceil(self.least / divisor), np.floor(self.most / divisor))


@dataclass(frozen=True)
class Minimum:
    """counts: of each option. gap: the share of the optimum by which it may be missed. binding: of each row."""

    counts: np.ndarray
    gap: float
    binding: tuple[bool, ...]


def minimise(
    objective: np.ndarray, group_of: np.ndarray, sizes: np.ndarray, rows: Sequence[Row], gap: float = 0.0
) -> Minimum | None:
    """The counts of least objective, or None where no counts satisfy the rows.

    Args:
        objective: (options,) cost of each option.
        group_of: (options,) index of each option's group, ascending.
        sizes: (groups,) how many things each group has.
        rows: constraints, each over (options,).
        gap: the share of the optimum that may be missed; 0 proves optimality.
    """
    program = _Program(objective * _SCALE, group_of, sizes, [row.reduced() for row in rows])
    with _nothing_on_stdout():
        return program.minimise(gap)


class _Program:
    def __init__(self, objective: np.ndarray, group_of: np.ndarray, sizes: np.ndarray, rows: list[Row]) -> None:
        self.objective, self.group_of, self.sizes, self.rows = objective, group_of, sizes, rows

    def minimise(self, gap: float) -> Minimum | None:
        relaxed = self.relax()
        if relaxed is None:
            return None
        bound, costs, binding = relaxed
        limit = np.sort(costs)[min(len(costs), _CORE * len(self.sizes)) - 1]
        while True:
            core = np.flatnonzero(costs <= limit + _ABSOLUTE)
            found = self.solve(core, gap / 2)
            if found.x is not None:
                above = found.fun - bound
                if found.status or above <= max(limit, gap * abs(bound)) + _ABSOLUTE:  # out of nodes, or good enough
                    break
                limit = above
            elif len(core) == len(costs):
                return None
            else:
                limit = max(8 * limit, _ABSOLUTE)
        counts = np.zeros(len(costs), int)
        counts[core] = np.round(found.x)
        proved = found.status == 0 and gap == 0
        return Minimum(counts, 0.0 if proved else above / max(abs(found.fun), _ABSOLUTE), binding)

    def relax(self) -> tuple[float, np.ndarray, tuple[bool, ...]] | None:
        """The relaxation's optimum, every option's reduced cost, and which rows have a price; None without solution."""
        from scipy.optimize import linprog

        sides = [(i, sign) for i, row in enumerate(self.rows) for sign in (1, -1) if np.isfinite(_side(row, sign))]
        uses = np.array([sign * self.rows[i].use for i, sign in sides]).reshape(len(sides), len(self.objective))
        limits = [sign * _side(self.rows[i], sign) for i, sign in sides]
        members = self.members(np.arange(len(self.objective)))
        found = linprog(self.objective, uses, limits, members, self.sizes, bounds=(0, None), method="highs")
        if found.x is None:
            return None
        prices = found.ineqlin.marginals
        costs = self.objective - found.eqlin.marginals[self.group_of] - prices @ uses
        priced = {i for (i, _), price in zip(sides, prices, strict=True) if price}
        return found.fun, costs, tuple(i in priced for i in range(len(self.rows)))

    def solve(self, core: np.ndarray, gap: float) -> "OptimizeResult":
        """The integer program over some of the options, as scipy's milp returns it."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        constraints = [LinearConstraint(row.use[core], row.least, row.most) for row in self.rows]
        return milp(
            self.objective[core],
            integrality=np.ones(len(core)),
            bounds=Bounds(0, self.sizes[self.group_of[core]]),
            constraints=[LinearConstraint(self.members(core), self.sizes, self.sizes), *constraints],
            # HiGHS prints when it has to repair a presolved solution: without presolving it hardly ever does.
            options={"mip_rel_gap": gap, "node_limit": _NODES, "presolve": False},
        )

    def members(self, core: np.ndarray) -> "csr_array":
        """(groups, core): which option is whose."""
        from scipy.sparse import csr_array

        ones, columns = np.ones(len(core)), np.arange(len(core))
        return csr_array((ones, (self.group_of[core], columns)), shape=(len(self.sizes), len(core)))


def _side(row: Row, sign: int) -> float:
    return row.most if sign > 0 else row.least


@contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """What C libraries print on file descriptor 1 goes to stderr: HiGHS prints now and then, unasked.

    The descriptor is the process's, so that one thread at a time may have it; what other threads print meanwhile goes
    to stderr too, and is not lost.
    """
    with _stdout:
        try:
            os.fstat(2)
            kept = os.dup(1)
        except OSError:  # one of the two is closed
            yield
            return
        flush = ctypes.CDLL(None).fflush  # C's own buffers are written where the descriptor leads at that time
        flush(None)
        try:
            os.dup2(2, 1)
            yield
        finally:
            flush(None)
            os.dup2(kept, 1)
            os.close(kept)
