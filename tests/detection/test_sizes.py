"""Images of any size: tables for the size that is trained at, and no more compilations than the source's."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import augment_cli as augment
from augment_cli import detection
from augment_cli.layers import AAConv2d
from augment_cli.layers.aa.relative import resize_table
from tests.cli.helpers import ok

# The third size is the one whose maps the tables are made for.
SIZES = [(64, 96), (96, 64), (128, 128), (128, 160), (160, 96)]


def compilations(model: str | torch.nn.Module, training: bool) -> int:
    backbone = detection.backbone(model, levels=(1, 2, 3), norm="batch").train(training)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(backbone, backend=counter)
    with torch.set_grad_enabled(training):
        for size in SIZES:
            compiled(torch.rand(1, 3, *size))
    torch._dynamo.reset()
    return counter.frame_count


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("recipe", ["aa", "aw"])
def test_sizes_that_vary_compile_no_more_often_than_the_sources(recipe, training):
    converted = augment.convert("test_resnet", recipe, input_size=128)
    assert compilations(converted, training) <= compilations("test_resnet", training)


def test_a_compiled_table_of_the_right_size_keeps_its_values():
    table = torch.randn(13, 4)
    compiled = torch.compile(resize_table, backend="eager", dynamic=True)
    for size in (5, 7, 9):
        assert torch.equal(compiled(table, size), resize_table(table, size))


def test_tables_are_made_for_the_maps_of_a_detectors_images(tmp_path):
    """Batches are padded to multiples of 32: 800 x 1333 pixels to 800 x 1344, whose maps are as large."""
    target = tmp_path / "aa.safetensors"
    ok("convert", "resnet18", "-r", "aa-retinanet", "--img-size", "800x1333", "-o", str(target))
    layers = {name: m for name, m in augment.load(target).named_modules() if isinstance(m, AAConv2d)}
    assert layers["layer2.1.conv2"].resolution == (100, 167)
    assert {name: (len(m.rel_height), len(m.rel_width)) for name, m in layers.items() if name.endswith("1.conv2")} == {
        "layer2.1.conv2": (2 * 25 - 1, 2 * 42 - 1),
        "layer3.1.conv2": (2 * 50 - 1, 2 * 84 - 1),
        "layer4.1.conv2": (2 * 25 - 1, 2 * 42 - 1),
    }


def test_a_table_that_grows_and_shrinks_again_is_itself():

    layer = augment.convert("test_resnet", "aa", input_size=128).layer3[0].conv2
    assert isinstance(layer, AAConv2d)
    for table in (layer.rel_height, layer.rel_width):
        grown = resize_table(table, len(table))
        torch.testing.assert_close(resize_table(grown, (len(table) + 1) // 2), table)
