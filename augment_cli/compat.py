"""Names of torch, timm and accelerate that are private or untyped, each with the public way that is missing.

Nothing else in the package uses one. timm and accelerate are imported only by the functions that need them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.utils import _pair as pair
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "BatchNorm",
    "are_functorch_transforms_active",
    "count_dispatch_modes",
    "linear_pointwise",
    "pair",
    "pretrained_cfg",
    "private_accelerate_state",
    "save_timm_config",
    "set_pretrained_cfg",
    "tree_leaves",
    "tree_map_only",
    "update_model_args",
]

# BatchNorm: torch exports BatchNorm1d to 3d and SyncBatchNorm, but not the class that they have in common.
# pair: torch exports nothing that makes (height, width) of one number or two, as its own layers do.
# tree_leaves, tree_map_only: torch has no public functions for nested lists and dictionaries of tensors.

# torch.func says nowhere in public whether one of its transforms is active.
are_functorch_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active

# torch.utils says nowhere in public whether a dispatch mode, such as a FLOP counter, is active.
count_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack

# oneDNN's matrix product, which torch reaches for on its own only under torch.compile. None where torch has no oneDNN.
linear_pointwise: Callable[..., torch.Tensor] | None = None
if torch.backends.mkldnn.is_available():
    linear_pointwise = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """timm's description of a model's weights and inputs; empty for other models. No class in timm declares it."""
    return getattr(model, "pretrained_cfg", None) or {}


def set_pretrained_cfg(model: nn.Module, cfg: dict[str, Any]) -> None:
    """Replace that description, under both of its names. timm writes it only when it creates a model."""
    vars(model).update(pretrained_cfg=cfg, default_cfg=cfg)


def update_model_args(model: nn.Module, **args: Any) -> None:
    """Add to the arguments that timm.models.get_model_args returns. timm writes them only when it creates a model."""
    vars(model)["_model_args"] = {**vars(model).get("_model_args", {}), **args}


def save_timm_config(model: nn.Module, path: str, input_size: tuple[int, int, int]) -> None:
    """Write timm's config.json. timm.models.save_for_hf, which is public, writes the weights too."""
    from timm.models._hub import save_config_for_hf

    save_config_for_hf(model, path, data_config={"input_size": input_size})


@contextmanager
def private_accelerate_state() -> Iterator[None]:
    """Run without the state that accelerate shares between all Accelerators of a process, and put it back afterwards.

    accelerate keeps device and precision in attributes of classes, and refuses other options than the first ones. Its
    public reset clears that state for good: a caller's own Accelerator would lose it.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [kind._shared_state for kind in (AcceleratorState, PartialState, GradientState)]
    before = [dict(state) for state in states]
    try:
        for state in states:
            state.clear()
        yield
    finally:
        for state, values in zip(states, before, strict=True):
            state.clear()
            state.update(values)
