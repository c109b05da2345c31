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

    The groups are those of `augment finetune`, by weight decay and by provenance: carried, fitted or new, which is a
    group's entry `provenance`. Biases, norms and tables of relative positions are not decayed.

    Args:
        model: a model from `augment_cli.load` or `augment_cli.convert`.
        lr: base learning rate.
        lr_carried, lr_fitted, lr_new: multiples of `lr` for parameters of each provenance.
        layer_decay: factor on the rate for each layer below the last; 1 gives all layers the same.

    Raises:
        AugmentError: the model is not a converted model, or a value is out of range.

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
