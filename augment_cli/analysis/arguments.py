"""Arguments that a model is created with, besides its name: JSON values, bounded, and hashable in a plan."""

import math
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from augment_cli.bounds import MOST_LISTED

# Arguments that would make creating a model read files or the network, or return something else than the model.
FORBIDDEN_ARGUMENTS = frozenset(
    {
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
        "features_only",
        "out_indices",
        "feature_cls",
        "feature_cfg",
        "device",
        "dtype",
        "plan",
    }
)

# A constructor may loop or allocate by a number among its arguments. timm's largest are 21,843 classes.
_LARGEST_ARGUMENT = 2**20
_DEEPEST_ARGUMENT = 4


class FrozenDict(dict):
    """A dictionary that can be hashed: nobody changes it."""

    def __hash__(self) -> int:
        return hash(tuple(self.items()))


def _freeze(value: Any, depth: int = 0) -> Any:
    """A JSON value as one that can be hashed, if it is within the bounds of a model's argument."""
    if depth > _DEEPEST_ARGUMENT:
        raise ValueError(f"nested more than {_DEEPEST_ARGUMENT} deep")
    if isinstance(value, (dict, list, tuple)) and len(value) > MOST_LISTED:
        raise ValueError(f"holds {len(value):,} values, and the most is {MOST_LISTED:,}")
    if isinstance(value, dict):
        return FrozenDict((_argument_name(key), _freeze(value[key], depth + 1)) for key in sorted(value, key=str))
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item, depth + 1) for item in value)
    if isinstance(value, str) and len(value) > MOST_LISTED:
        raise ValueError(f"holds a text of {len(value):,} characters")
    if isinstance(value, (int, float)) and not (math.isfinite(value) and abs(value) <= _LARGEST_ARGUMENT):
        raise ValueError(f"holds a number that is not from -{_LARGEST_ARGUMENT:,} to {_LARGEST_ARGUMENT:,}")
    return value


def _argument_name(key: Any) -> str:
    if not isinstance(key, str) or len(key) > MOST_LISTED:
        raise ValueError("has a name that is too long or no text")
    return key


def freeze_arguments(value: Any) -> tuple[tuple[str, Any], ...]:
    """Arguments of a model's constructor, JSON values by name, as pairs in the order of the names.

    Raises:
        ValueError: no object, a number, text, list or nesting beyond the bounds, or an argument that no plan may set.
    """
    try:
        value = dict(value)
    except (TypeError, ValueError) as error:
        raise ValueError("no object of arguments by name") from error
    arguments = _freeze(value)
    if refused := sorted(FORBIDDEN_ARGUMENTS & arguments.keys()):
        raise ValueError(f"{refused[0]} cannot be set")
    return tuple(arguments.items())


Arguments = Annotated[
    tuple[tuple[str, Any], ...], BeforeValidator(freeze_arguments), PlainSerializer(dict, return_type=dict)
]
