"""A model by the function that makes it, as `package.module:function`. Imports nothing heavy until it is resolved."""

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

from augment_cli.errors import InputError, boundary

_SPEC = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_function(name: str) -> bool:
    """Whether a model's name has the form `package.module:function`; timm's hub and folder names do not."""
    return _SPEC.fullmatch(name) is not None


def resolve(name: str) -> Callable[..., Any]:
    """Import the function that the user named.

    Raises:
        AugmentError: no such module, or nothing in it that can be called by that name.
    """
    module, _, attribute = name.partition(":")
    with boundary(f"{name}: {module} cannot be imported"):
        found = getattr(import_module(module), attribute, None)
    if not callable(found):
        raise InputError(f"{name}: {module} has no function {attribute}")
    return found
