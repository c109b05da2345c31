"""`python -m tests.fuzz --count 12000 --seed 1`: every target in turn; failures are kept for the test suite."""

import argparse
import random
import sys
from collections import Counter, defaultdict

import torch

from tests.fuzz.runner import keep, make, read
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_500, help="cases, shared among the targets")
    parser.add_argument("--seed", type=int, default=None, help="of the first case; drawn if not given")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="only these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    targets = options.target or list(TARGETS)
    counts: dict[str, Counter] = defaultdict(Counter)
    for number in range(-(-options.count // len(targets))):
        for target in targets:
            case = make(target, seed, number)
            outcome = read(target, case)
            if outcome not in ("accepted", "refused"):
                path = keep(target, case)
                print(f"{target} {number}: {outcome}\nkept as {path}", file=sys.stderr, flush=True)
                outcome = "failed"
            counts[target][outcome] += 1
    for target in targets:
        shown = ", ".join(f"{counts[target][kind]:,} {kind}" for kind in ("accepted", "refused", "failed"))
        print(f"{target}: {counts[target].total():,} cases: {shown}")
    total = sum(counts.values(), Counter())
    print(f"all: {total.total():,} cases, {total['failed']:,} failed")
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
