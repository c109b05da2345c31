"""torchao on converted models: 8-bit weights, and the quantisation of an exported program."""

import copy

import pytest
import torch

from tests.doors.models import SIDE, small
from tests.interop.models import RECIPES, converted, images

pytest.importorskip("torchao")

from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest one, as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_of_linear_layers_in_eight_bits(recipe):
    """torchao's own filter takes linear layers; its 8-bit tensors have no convolution, plain or ours."""
    model, x = converted("test_resnet", recipe), images(8, 3, 64, 64)
    quantized = copy.deepcopy(model)
    quantize_(quantized, Int8WeightOnlyConfig())
    assert type(quantized.fc.weight).__name__ == "Int8Tensor"
    with torch.no_grad():
        assert 0 < difference(quantized(x), model(x)) < 0.01


def test_an_exported_program_in_eight_bits():
    """Measured, as a share of the largest output: aa 0.023, aw 0.014, aa-aw 0.038, the source 0.016."""
    model, x = small("aa-aw"), images(16, 3, SIDE, SIDE)
    with torch.no_grad():
        program = torch.export.export(model, (x,)).module()
        settings = get_default_x86_inductor_quantization_config()
        prepared = prepare_pt2e(program, X86InductorQuantizer().set_global(settings))
        prepared(x)
        quantized = convert_pt2e(prepared)
        found, expected = quantized(x), model(x)
    rounded = [node for node in quantized.graph.nodes if "dequantize_per_channel" in str(node.target)]
    assert len(rounded) == 4  # two convolutions, qkv, proj; AW's parts are products of tensors, which stay as they are
    assert 0 < difference(found, expected) < 0.06
