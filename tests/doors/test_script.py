"""torch.jit.script and its ONNX exporter say in one sentence that they cannot express the layers, and what can."""

import pytest
import torch
from torch import nn

from augment_cli import AAConv2d, AugmentError, AWConv2d
from tests.interop.models import converted

LAYERS = {
    "AAConv2d": lambda: AAConv2d(8, 8, 3, padding=1, heads=2, key_channels=4, value_channels=4, resolution=6),
    "AWConv2d": lambda: AWConv2d(8, 8, 3, padding=1, reduction=2),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated")
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_names_what_to_use_instead(name):
    layer = LAYERS[name]()
    for module in (layer, nn.Sequential(nn.ReLU(), layer)):
        with pytest.raises(AugmentError, match=rf"{name}.*augment export.*torch\.export.*torch\.compile"):
            torch.jit.script(module)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated")
@pytest.mark.parametrize("recipe", ["aa", "aw"])
def test_a_converted_model_does_too(recipe):
    with pytest.raises(AugmentError, match=r"torch\.export"):
        torch.jit.script(converted("test_resnet", recipe))


@pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export")
@pytest.mark.parametrize("name", LAYERS)
def test_the_older_onnx_exporter_writes_nothing_and_the_newer_one_does(tmp_path, name):
    layer, x = LAYERS[name]().eval(), torch.zeros(2, 8, 6, 6)
    with pytest.raises(AugmentError, match=r"dynamo=True.*augment export"):
        torch.onnx.export(layer, (x,), tmp_path / "old.onnx", dynamo=False)
    torch.onnx.export(layer, (x,), tmp_path / "new.onnx", dynamo=True, verbose=False)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".data", ".onnx"]
    assert not (tmp_path / "old.onnx").exists()
    assert torch.jit.trace(layer, x)(x).shape == x.shape
