"""Randomness that is a function of where it is drawn: no random state has to be saved to go on from a checkpoint."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(*parts: object) -> int:
    """A seed of 63 bits from what names a place, such as (run's seed, "image", epoch, index)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(*parts: object) -> None:
    """Seed Python's, NumPy's and torch's generators, those of accelerators too, for a place."""
    seed = derive(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_cpu(*parts: object) -> None:
    """Seed the generators that transforms of images draw from, for a place; takes some ten microseconds."""
    seed = derive(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Within, the CPU's generators are seeded for a place; afterwards they are what they were."""
    with preserved():
        seed_cpu(*parts)
        yield


@contextmanager
def preserved() -> Iterator[None]:
    """Leave all generators afterwards as they were. NumPy's takes a third of a millisecond: not for every image."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
