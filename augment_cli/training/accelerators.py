"""accelerate's Accelerator, one a call: its device and precision are no other's in the same process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from augment_cli.errors import AugmentError

_SHARED = (AcceleratorState, PartialState, GradientState)


@contextmanager
def one_accelerator(**options: Any) -> Iterator[Accelerator]:
    """An Accelerator with these options. The caller's own, if there is one, is afterwards what it was.

    accelerate keeps device and precision in attributes of classes, and refuses other options than the first ones.

    Raises:
        AugmentError: a precision that the device does not have.
    """
    before = [dict(state._shared_state) for state in _SHARED]
    try:
        for state in _SHARED:
            state._shared_state.clear()
        yield _make(options)
    finally:
        for state, values in zip(_SHARED, before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(values)


def _make(options: dict[str, Any]) -> Accelerator:
    try:
        return Accelerator(**options)
    except ValueError as error:
        raise AugmentError(f"--precision {options.get('mixed_precision')}: {error}") from error
