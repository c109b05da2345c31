"""No file of the package but compat.py uses a private name of torch, timm or accelerate."""

import ast
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.models import get_model_args

import augment_cli
from augment_cli import compat

PACKAGE = Path(augment_cli.__file__).parent
DOCUMENTED = ("os._exit",)
"""Names with an underscore that Python's own manual documents."""


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(source: str) -> list[str]:
    """Private names that a file takes from modules other than the package's, or reads from objects other than self."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            origin = getattr(node, "module", None) or ""
            names = [f"{origin}.{alias.name}" for alias in node.names]
            found += [n for n in names if not n.startswith("augment_cli") and any(map(private, n.split(".")))]
        elif isinstance(node, ast.Attribute) and private(node.attr):
            owner = ast.unparse(node.value)
            name = f"{owner}.{node.attr}"
            found += [] if owner in ("self", "cls", "super()") or name in DOCUMENTED else [name]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            asked = node.args[1]
            if isinstance(asked, ast.Constant) and private(str(asked.value)):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "from timm.models._hub import save_config_for_hf",
        "from torch.nn.modules.utils import _pair",
        "import torch.utils._pytree",
        "import torch\ntorch._C.x()",
        "from accelerate.state import PartialState as P\nP._shared_state.clear()",
        "getattr(model, '_model_args', {})",
    ],
)
def test_a_private_name_is_found(source):
    assert private_names(source)


def test_only_compat_uses_private_names():
    assert private_names((PACKAGE / "compat.py").read_text())
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != PACKAGE / "compat.py":
            assert private_names(path.read_text()) == [], path.relative_to(PACKAGE)


def test_everything_in_compat_is_used():
    users = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "compat.py")
    assert [name for name in compat.__all__ if name not in users] == []


def test_timm_takes_the_description_and_the_arguments_that_are_set():
    model = timm.create_model("test_resnet")
    compat.set_pretrained_cfg(model, {**compat.pretrained_cfg(model), "architecture": "mine"})
    compat.update_model_args(model, plan=1)
    assert model.default_cfg is model.pretrained_cfg
    assert model.pretrained_cfg["architecture"] == "mine"
    assert get_model_args(model)["plan"] == 1
    assert compat.pretrained_cfg(torch.nn.ReLU()) == {}


def test_an_accelerator_of_the_caller_survives():
    with compat.private_accelerate_state():  # this process's own state, whatever other tests left
        Accelerator(cpu=True)
        before = dict(AcceleratorState._shared_state)
        with compat.private_accelerate_state():
            assert not AcceleratorState._shared_state
            Accelerator(cpu=True, mixed_precision="bf16")
        assert dict(AcceleratorState._shared_state) == before


def test_transforms_and_modes_are_seen():
    seen = []
    torch.func.vmap(lambda x: seen.append(compat.are_functorch_transforms_active()) or x)(torch.ones(2))
    assert (seen, compat.are_functorch_transforms_active()) == ([True], False)
    assert compat.count_dispatch_modes() == 0
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert compat.count_dispatch_modes() == 1
