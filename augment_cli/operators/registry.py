"""The known operators, by name.

An operator of another package is found through its entry point in the group `augment_cli.operators`, whose name is the
operator's; the entry point's module calls `register`. So a plan that names it can be read in any process.
"""

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from augment_cli.errors import InputError, nearest
from augment_cli.operators.operator import Operator

GROUP = "augment_cli.operators"

_BUILT_IN = {"aa": "aa", "aw": "aw", "aa+aw": "aa_aw"}
_operators: dict[str, Operator[Any, Any]] = {}

OperatorT = TypeVar("OperatorT", bound=Operator[Any, Any])


def register(cls: type[OperatorT]) -> type[OperatorT]:
    """Class decorator: make an operator known by its name.

    Raises:
        ValueError: another class has registered that name.
    """
    known = _operators.get(cls.name)
    if known is not None and type(known).__qualname__ != cls.__qualname__:
        raise ValueError(f"the operator {cls.name!r} is registered by {type(known).__qualname__} already")
    _operators[cls.name] = cls()
    return cls


def operator_names() -> tuple[str, ...]:
    """The names of the operators that recipes and plans may use."""
    installed = {entry.name for entry in entry_points(group=GROUP)}
    return (*_BUILT_IN, *sorted((installed | _operators.keys()) - _BUILT_IN.keys()))


def get_operator(name: str) -> Operator[Any, Any]:
    """The operator of a name.

    Raises:
        AugmentError: no such operator is registered or installed.
    """
    if name not in _operators:
        _load(name)
    if name not in _operators:
        known = operator_names()
        raise InputError(
            f"no operator named {name[:100]}{nearest(name[:100], known)}; one of your own is known once its module is "
            f"imported, or its package installed"
        )
    return _operators[name]


def _load(name: str) -> None:
    if name in _BUILT_IN:
        import_module(f"augment_cli.operators.{_BUILT_IN[name]}")
        return
    for entry in entry_points(group=GROUP, name=name):
        entry.load()
