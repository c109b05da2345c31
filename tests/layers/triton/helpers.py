"""Helpers of the tests of Triton kernels."""

import pytest
import torch

from augment_cli.layers import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not triton.INSTALLED, reason="Triton is not installed")
