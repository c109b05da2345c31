"""The pooling before the attention: average pooling, computed as a depthwise convolution where that is faster."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from augment_cli.layers.aa import pooling


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 12), st.integers(1, 12), st.integers(1, 8), st.integers(1, 8)
)
def test_it_is_average_pooling_that_does_not_count_the_padding(n, channels, height, width, down, across):
    x = torch.randn(n, channels, height, width, dtype=torch.float64, requires_grad=True)
    expected = F.avg_pool2d(x, 3, (down, across), padding=1, count_include_pad=False)
    assert pooling._depthwise_is_faster(x)
    pooled = pooling.average_pool(x, (down, across))
    assert pooled.shape == (n, channels, -(-height // down), -(-width // across))
    assert (pooled - expected).abs().max() < 1e-12
    weights = torch.randn_like(expected)
    got, want = (torch.autograd.grad((out * weights).sum(), x)[0] for out in (pooled, expected))
    assert (got - want).abs().max() < 1e-12


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 2, 4, 4).to(memory_format=torch.channels_last),
        torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16),
        torch.zeros(1, 2, 4, 4, device="meta"),
        torch.zeros(0, 2, 4, 4),
    ],
    ids=["channels_last", "bfloat16", "meta", "empty"],
)
def test_other_maps_are_pooled_by_torch(x):
    assert not pooling._depthwise_is_faster(x)
    assert pooling.average_pool(x, (2, 2)).shape == (len(x), 2, 2, 2)


def test_autocast_does_not_cost_it_precision():
    with torch.autocast("cpu", torch.bfloat16):
        assert pooling.average_pool(torch.zeros(1, 2, 4, 4), (2, 2)).dtype == torch.float32
