"""What the tests of the layers are given."""

import pytest

from augment_cli.layers import native


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where none could be compiled."""
    monkeypatch.setattr(native, "instructions", None)
