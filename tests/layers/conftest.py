"""Fixtures of the layers' tests."""

import pytest

from augment_cli.layers import native, triton


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that no kernels could be compiled."""
    monkeypatch.setattr(native, "library", None)


class _Patched:
    """The interpreter's changes to Triton's language, made once in a launch.

    The interpreter makes them again for each call of a function in a kernel, which takes most of its time.
    """

    def __init__(self, patch) -> None:
        self.patch, self.done = patch, {}

    def __call__(self, function) -> "_Patched":
        if id(function.__globals__) not in self.done:
            self.done[id(function.__globals__)] = self.patch(function)
        return self

    def restore(self) -> None:
        for scope in reversed(self.done.values()):
            scope.restore()
        self.done.clear()


@pytest.fixture(autouse=True)
def _patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    if triton.INSTALLED and triton.is_interpreted():
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter, "_patch_lang", _Patched(interpreter._patch_lang))
