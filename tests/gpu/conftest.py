"""The tests of this folder run on CUDA, and where there is none on the CPU with small maps: `helpers.DEVICE`."""

import os

from tests.layers.conftest import _patch_once  # noqa: F401  the interpreter of Triton's kernels takes less time

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it in deterministic mode
