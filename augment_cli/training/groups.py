"""Parameter groups by provenance, for any trainer."""

from typing import Any

from torch import nn

from augment_cli.checkpoint.metadata import Metadata
from augment_cli.errors import AugmentError
from augment_cli.training.models import Opened
from augment_cli.training.parameters import parameter_groups, provenance
from augment_cli.training.settings import Settings


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = Settings.weight_decay,
    lr_carried: float = Settings.lr_carried,
    lr_fitted: float = Settings.lr_fitted,
    lr_new: float = Settings.lr_new,
    layer_decay: float = Settings.layer_decay,
) -> list[dict[str, Any]]:
    """Groups of a converted model's parameters for a torch optimiser, each with its own `lr` and `weight_decay`.

    They are those of `augment finetune`: what was carried over from the source learns more slowly than what is new.
    Biases, norms and tables of relative positions are not decayed. `provenance` of a group is carried, fitted or new.

    Args:
        model: a model from `augment_cli.load` or `augment_cli.convert`.
        lr: learning rate that the multipliers `lr_carried`, `lr_fitted` and `lr_new` are of.
        layer_decay: multiplies the rate again for every layer down from the last one; 1 for none.

    Raises:
        AugmentError: the model is not a converted one, or a value is out of its range.

    Example:
        >>> from augment_cli import convert
        >>> groups = param_groups(convert("test_resnet", "aa"), lr=1e-3)
        >>> sorted({group["provenance"]: group["lr"] for group in groups})
        ['new']
    """
    metadata = getattr(model, "augment_metadata", None)
    if not isinstance(metadata, Metadata):
        raise AugmentError(
            f"{type(model).__name__} does not say where its parameters come from: take a model from augment_cli.load "
            f"or augment_cli.convert"
        )
    settings = Settings(
        model="",
        data="",
        output="",
        lr=lr,
        weight_decay=weight_decay,
        lr_carried=lr_carried,
        lr_fitted=lr_fitted,
        lr_new=lr_new,
        layer_decay=layer_decay,
    )
    opened = Opened(model, metadata.plan.model, metadata, metadata.plan.input_size, frozenset(metadata.fresh))
    groups = parameter_groups(model, provenance(opened), settings)
    return [{**group, "lr": lr * group.pop("lr_scale")} for group in groups]
