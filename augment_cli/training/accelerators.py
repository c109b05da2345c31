"""accelerate's Accelerator, a new one for each call: calls in one process do not share device or precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator

from augment_cli.compat import private_accelerate_state
from augment_cli.errors import AugmentError


@contextmanager
def one_accelerator(**options: Any) -> Iterator[Accelerator]:
    """An Accelerator with these options. The caller's own Accelerator, if there is one, is left as it was.

    Raises:
        AugmentError: the device does not have this precision.
    """
    with private_accelerate_state():
        yield _make(options)


def _make(options: dict[str, Any]) -> Accelerator:
    try:
        made = Accelerator(**options)
    except ValueError as error:
        raise AugmentError(f"`precision={options.get('mixed_precision')!r}`: {error}") from error
    if made.mixed_precision == "fp16" and made.scaler is None:  # on a CPU, which accelerate does not refuse
        raise AugmentError(
            f"`precision='fp16'`: accelerate has no float16 on {made.device.type}, and would train in float32: "
            f"give `precision='bf16'` or leave it out"
        )
    return made
