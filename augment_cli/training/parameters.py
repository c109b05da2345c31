"""Parameters by provenance, and the optimiser's groups and schedule.

carried: the source's own weights. fitted: attention that was fitted to the filters it replaces. new: attention that was
not fitted, and a classifier for other classes. Where the source's weights were random, all parameters are new.
"""

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any, Literal

from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from augment_cli.checkpoint.metadata import Metadata
from augment_cli.errors import AugmentError, nearest
from augment_cli.surgery.replace import added_parameters
from augment_cli.training.models import Opened
from augment_cli.training.settings import RunSettings

Provenance = Literal["carried", "fitted", "new"]

# Tables of relative positions: timm does not decay its own either.
_UNDECAYED = ("*.rel_height", "*.rel_width")


def provenance(opened: Opened) -> dict[str, Provenance]:
    """Each parameter's provenance, by the parameter's name; fine-tuning does not change it."""
    kinds: dict[str, Provenance] = {name: "carried" for name, _ in opened.model.named_parameters()}
    if opened.metadata is not None:
        if opened.metadata.weights.startswith("random"):
            return dict.fromkeys(kinds, "new")
        kinds |= provenance_of_sites(opened.model, opened.metadata)
    return kinds | dict.fromkeys(opened.fresh, "new")


def provenance_of_sites(model: nn.Module, metadata: Metadata) -> dict[str, Provenance]:
    """The provenance of the parameters that the plan added, by name."""
    fitted = {record.name for record in metadata.inheritance if record.kind == "fitted"}
    kinds: dict[str, Provenance] = {}
    for site in metadata.plan.sites:
        kind: Provenance = "fitted" if site.name in fitted else "new"
        kinds |= dict.fromkeys(added_parameters(model, site), kind)
    return kinds


def parameter_groups(model: nn.Module, kinds: dict[str, Provenance], settings: RunSettings) -> list[dict[str, Any]]:
    """timm's groups by weight decay and by layer, each split by provenance; `lr_scale` is the product of both."""
    multiplier = {"carried": settings.lr_carried, "fitted": settings.lr_fitted, "new": settings.lr_new}
    kind_of = {id(parameter): kinds[name] for name, parameter in model.named_parameters()}
    groups = []
    for group in _timm_groups(model, settings):
        parts = defaultdict(list)
        for parameter in group["params"]:
            parts[kind_of[id(parameter)]].append(parameter)
        for kind in sorted(parts):
            scale = group.get("lr_scale", 1.0) * multiplier[kind]
            groups.append({**group, "params": parts[kind], "lr_scale": scale, "provenance": kind})
    return groups


def _timm_groups(model: nn.Module, settings: RunSettings) -> list[dict[str, Any]]:
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    own: Callable[[], Collection[str]] = getattr(model, "no_weight_decay", tuple)
    undecayed = (*own(), *_UNDECAYED)
    if settings.layer_decay == 1:
        return param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=undecayed)
    return param_groups_layer_decay(
        model, settings.weight_decay, no_weight_decay_list=undecayed, layer_decay=settings.layer_decay
    )


def make_optimizer(model: nn.Module, kinds: dict[str, Provenance], settings: RunSettings) -> Optimizer:
    """The optimiser that timm calls `settings.opt`, over the groups.

    Raises:
        AugmentError: timm has no optimiser of that name, or it does not take the settings.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    known = [str(name) for name in list_optimizers()]
    if settings.opt not in known:
        raise AugmentError(f"timm has no optimiser {settings.opt}{nearest(settings.opt, known)}")
    groups = parameter_groups(model, kinds, settings)
    try:
        return create_optimizer_v2(
            model,
            settings.opt,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            param_group_fn=lambda _: groups,
        )
    except (TypeError, ValueError, ImportError, AssertionError) as error:
        raise AugmentError(f"the optimiser {settings.opt} cannot be made: {error}") from error


def make_scheduler(optimizer: Optimizer, settings: RunSettings, updates_per_epoch: int) -> Scheduler:
    """timm's scheduler, stepped by updates; the learning rate is a function of their number alone."""
    from timm.scheduler import create_scheduler_v2

    warmup = min(settings.warmup_epochs, settings.epochs / 2)
    scheduler, _ = create_scheduler_v2(  # its epochs are updates here: a warm-up may last half an epoch
        optimizer,
        settings.schedule,
        num_epochs=settings.epochs * updates_per_epoch,
        decay_epochs=max(1, settings.epochs // 3) * updates_per_epoch if settings.schedule == "step" else None,
        decay_rate=1.0 if settings.schedule == "poly" else 0.1,
        min_lr=settings.min_lr,
        warmup_lr=settings.lr / 100,
        warmup_epochs=round(warmup * updates_per_epoch),
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler
