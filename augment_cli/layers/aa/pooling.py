"""3x3 average pooling whose padding of 1 does not count in the mean. [ours; the AA paper leaves it open]"""

import torch
import torch.nn.functional as F
from torch import Tensor

from augment_cli.compat import count_dispatch_modes


def average_pool(x: Tensor, stride: tuple[int, int]) -> Tensor:
    """Means of 3x3 windows. Shapes: x (N, C, H, W) to (N, C, ceil(H / stride), ceil(W / stride))."""
    if _depthwise_is_faster(x):
        return _depthwise(x, stride)
    return F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False)


def _depthwise_is_faster(x: Tensor) -> bool:
    """Whether to pool by a depthwise convolution, which on a CPU is twice as fast for channels-first maps.

    Torch's own pooling uses no vector instructions there. Under a dispatch mode, such as a FLOP counter, the answer is
    no, so that the mode sees a pooling and not a convolution.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu":
        return False
    if count_dispatch_modes():
        return False
    exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return exact and x.is_contiguous() and x.numel() > 0


def _depthwise(x: Tensor, stride: tuple[int, int]) -> Tensor:
    """Sums of windows by a convolution with ones, divided by the number of positions inside the map."""
    taps = x.new_ones(x.shape[1], 1, 3, 3)
    counts = F.conv2d(x.new_ones(1, 1, *x.shape[2:]), taps[:1], stride=stride, padding=1)
    return F.conv2d(x, taps, stride=stride, padding=1, groups=x.shape[1]) / counts
