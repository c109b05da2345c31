import threading

import pytest
import timm
import torch
from torch import nn

from augment_cli.analysis import source
from augment_cli.analysis.guard import Limit, limited
from augment_cli.errors import AugmentError


def stack(depth: int, width: int = 1) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def test_a_constructor_is_stopped_at_the_limit_and_not_before():
    """A linear layer is three parts, two of them parameters; a sequence registers each of its layers."""
    with limited("m", Limit(parts=9)):
        stack(3)
    with pytest.raises(AugmentError, match="more than 8 modules and tensors"), limited("m", Limit(parts=8)):
        stack(3)
    with limited("m", Limit(elements=3 * 20)):
        stack(3, width=4)
    with pytest.raises(AugmentError, match="more than 59 numbers"), limited("m", Limit(elements=59)):
        stack(3, width=4)


def test_the_limit_ends_with_its_context_and_counts_buffers():
    with pytest.raises(AugmentError), limited("m", Limit(parts=0)):
        stack(1)
    stack(100)
    with pytest.raises(AugmentError), limited("m", Limit(parts=2)):
        nn.BatchNorm2d(1, affine=False)


def test_other_threads_are_not_counted():
    built = []
    with limited("m", Limit(parts=0)):
        thread = threading.Thread(target=lambda: built.append(stack(3)))
        thread.start()
        thread.join()
    assert built


def test_a_hundred_thousand_blocks_are_refused_before_they_are_built():
    built = []
    handle = nn.modules.module.register_module_module_registration_hook(lambda *_: built.append(None))
    try:
        with pytest.raises(AugmentError, match="modules and tensors"):
            source.describe("resnet18", {"layers": [100_000, 1, 1, 1]})
    finally:
        handle.remove()
    assert len(built) < Limit().parts


@pytest.mark.parametrize("name", ["aimv2_large_patch14_224", "ecaresnet101d_pruned", "resnetrs420", "ghostnetv3_160"])
def test_models_of_most_parts_for_their_tensors_are_within_the_limit_of_their_own_file(name):
    with torch.device("meta"):
        shapes = [tuple(tensor.shape) for tensor in timm.create_model(name).state_dict().values()]
        with limited("m", Limit.of(shapes)), limited("m"):
            timm.create_model(name)
