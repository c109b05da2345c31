"""torch.compile, and Inductor ahead of time: one graph, any batch, the model's own results and gradients."""

import pytest
import torch

from tests.doors.models import SIDE, small
from tests.interop.models import assert_gradients_near, assert_near, converted, gradients, images
from tests.layers.test_in_torch import compiler


@pytest.mark.parametrize("recipe", ["aa", "aw"])
def test_compiled_whole_for_any_batch(recipe):
    model = converted("test_resnet", recipe, "select.names=layer4.*")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3):
            x = images(batch, 3, 64, 64)
            torch._dynamo.mark_dynamic(x, 0)
            assert_near(compiled(x), model(x))


def test_compiled_training_has_the_same_gradients():
    model, x = converted("test_resnet", "aa-aw", "select.names=layer4.*"), images(2, 3, 64, 64)
    expected = gradients(model, x)
    found = gradients(torch.compile(model, backend=compiler(), fullgraph=True), x)
    assert_gradients_near({name.removeprefix("_orig_mod."): g for name, g in found.items()}, expected)


@pytest.mark.skipif(compiler() != "inductor", reason="there is no C++ compiler, or Python's headers are missing")
@pytest.mark.parametrize("recipe", ["aa", "aw"])
def test_compiled_ahead_of_time_saved_and_loaded(tmp_path, recipe):
    model = small(recipe)
    program = torch.export.export(model, (images(2, 3, SIDE, SIDE),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(path)
    with torch.no_grad():
        for batch in (1, 3):
            x = images(batch, 3, SIDE, SIDE)
            assert_near(run(x), model(x))
