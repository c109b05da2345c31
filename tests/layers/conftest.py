"""Fixtures of the layers' tests."""

import pytest

from augment_cli.layers import native


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that no kernels could be compiled."""
    monkeypatch.setattr(native, "library", None)
