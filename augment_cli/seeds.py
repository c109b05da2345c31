"""Random numbers seeded by their place in a run, so that a checkpoint needs no random state."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(*parts: object) -> int:
    """A seed of 63 bits from the parts of a place, such as (run's seed, "image", epoch, index)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(*parts: object) -> None:
    """Seed Python's, NumPy's and torch's generators, accelerators' included, for a place."""
    seed = derive(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_cpu(*parts: object) -> None:
    """Seed the CPU's generators, which image transforms use, for a place. Takes about ten microseconds."""
    seed = derive(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Seed the CPU's generators for a place within the block, and restore them after it."""
    with preserved():
        seed_cpu(*parts)
        yield


@contextmanager
def preserved() -> Iterator[None]:
    """Restore all generators after the block. Takes a third of a millisecond, for NumPy: too much for every image."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
