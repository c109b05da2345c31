"""Integer programs over groups of equal sites: how many sites of each group take each option. Solved by HiGHS.

    minimise    sum of counts x objective
    subject to  the counts of a group add up to its size, every row's sum between its least and its most

The linear relaxation comes first. An option whose reduced cost exceeds the distance from the relaxation to a known
solution is in no better solution. Only the few other options, the core, go into the integer program, which proves
optimality over thousands of options in fractions of a second.
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
        """The same constraint divided by the greatest common divisor of `use`."""
        if not np.issubdtype(self.use.dtype, np.integer):
            return self
        divisor = max(1, int(np.gcd.reduce(self.use)))
        return Row(self.use // divisor, np.ceil(self.least / divisor), np.floor(self.most / divisor))


@dataclass(frozen=True)
class Minimum:
    """counts (options,), the largest relative distance from the optimum, and whether each row is binding."""

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
        sizes: (groups,) how many members each group has.
        rows: constraints, each over (options,).
        gap: allowed relative distance from the optimum; 0 proves optimality.
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
        """The relaxation's optimum, every option's reduced cost, and which rows bind; None if there is no solution."""
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
        """Solve the integer program over the options in `core`."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        constraints = [LinearConstraint(row.use[core], row.least, row.most) for row in self.rows]
        return milp(
            self.objective[core],
            integrality=np.ones(len(core)),
            bounds=Bounds(0, self.sizes[self.group_of[core]]),
            constraints=[LinearConstraint(self.members(core), self.sizes, self.sizes), *constraints],
            # HiGHS prints when it repairs a presolved solution; without presolving it hardly ever does.
            options={"mip_rel_gap": gap, "node_limit": _NODES, "presolve": False},
        )

    def members(self, core: np.ndarray) -> "csr_array":
        """Matrix (groups, core): 1 where an option belongs to a group."""
        from scipy.sparse import csr_array

        ones, columns = np.ones(len(core)), np.arange(len(core))
        return csr_array((ones, (self.group_of[core], columns)), shape=(len(self.sizes), len(core)))


def _side(row: Row, sign: int) -> float:
    return row.most if sign > 0 else row.least


@contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """Send file descriptor 1 to stderr within the block: HiGHS sometimes prints there.

    The descriptor belongs to the process, so one thread at a time may redirect it. Meanwhile other threads' output goes
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
