"""The tests of this folder run on CUDA, and where there is none on the CPU with small maps: `helpers.DEVICE`."""

from tests.layers.conftest import _patch_once  # noqa: F401  the interpreter of Triton's kernels takes less time
