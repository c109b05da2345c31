"""`compile` and `sync_norm` together with what else a run can be: the same weights, under the same names."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import augment_cli as augment
from augment_cli.compat import BatchNorm
from augment_cli.errors import AugmentError
from augment_cli.training import engine, run
from augment_cli.training.finetune import finetune
from augment_cli.training.state import read_state
from tests.training.conftest import short, summary, weights


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled, by a backend that only counts them."""
    whole, made = nn.Module.compile, []

    def count(graph, inputs):
        made.append(graph)
        return graph.forward

    def compile(module):
        torch._dynamo.reset()
        whole(module, backend=count)

    monkeypatch.setattr(nn.Module, "compile", compile)
    return made


def close(one, other):
    a, b = (load_file(folder / "last/model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_a_run_compiles_three_graphs(graphs, model, images, tmp_path):
    """One to train, one to validate, and that again for a last batch of any size; none in later epochs."""
    changes = {"epochs": 3, "augmentation": False, "freeze_norm": True}
    finetune(short(model, images, tmp_path / "plain", **changes))
    assert not graphs
    finetune(short(model, images, tmp_path / "compiled", compile=True, **changes))
    assert len(graphs) == 3
    close(tmp_path / "plain", tmp_path / "compiled")
    assert not any("_orig_mod" in name for name in read_state(tmp_path / "compiled/state.safetensors")["model"])


def test_a_compiled_run_goes_on_to_the_same_result(graphs, model, images, tmp_path, monkeypatch):
    """With a moving average and parameters that are frozen at first; killed within an epoch."""
    changes = {"ema_decay": 0.9, "new_first": 1, "channels_last": True}
    changes |= {"checkpoint_every": "2", "augmentation": False}
    finetune(short(model, images, tmp_path / "plain", **changes))
    finetune(short(model, images, tmp_path / "unbroken", **changes, compile=True))
    assert len(graphs) == 2  # one for each set of parameters that learn; the average is not compiled
    close(tmp_path / "plain", tmp_path / "unbroken")
    whole = engine._train_batch

    def killed(run, *batch):
        if (run.epoch, run.batch) == (1, 3):
            raise KeyboardInterrupt
        whole(run, *batch)

    settings = short(model, images, tmp_path / "run", **changes, compile=True)
    monkeypatch.setattr(engine, "_train_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(settings)
    assert read_state(tmp_path / "run/state.safetensors")["position"] == [1, 2, 6]
    monkeypatch.setattr(engine, "_train_batch", whole)
    finetune(settings, resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "unbroken")
    assert summary(tmp_path / "run") == summary(tmp_path / "unbroken")


def test_gradient_checkpointing_is_compiled_too(model, images, tmp_path, monkeypatch):
    """By a backend that traces the backward pass: it is there that blocks are computed again."""
    whole, changes = nn.Module.compile, {"epochs": 1, "ema_decay": 0.9, "augmentation": False}
    monkeypatch.setattr(nn.Module, "compile", lambda module: whole(module, backend="aot_eager"))
    finetune(short(model, images, tmp_path / "plain", **changes))
    finetune(short(model, images, tmp_path / "run", **changes, grad_checkpointing=True, compile=True))
    close(tmp_path / "plain", tmp_path / "run")


def configured(model: nn.Module, device: str, **changes) -> nn.Module:
    """A model as a run of two processes on a device has it."""
    task = SimpleNamespace(model=model, core=lambda module: module)
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=2)
    return run._configured(task, short("m", "d", "o", sync_norm=True, **changes), accelerator)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
@pytest.mark.parametrize("recipe", ["aa", "aw"])
def test_every_norm_is_synchronised_under_its_own_name(name, recipe):
    """Those of timm with an activation inside, too. Attention layers have no norms of their own."""
    model = augment.convert(name, recipe, input_size=32)
    state, count = model.state_dict(), sum(isinstance(module, BatchNorm) for module in model.modules())
    images = torch.randn(2, 3, 32, 32)
    expected = model.eval()(images)
    other = configured(model, "meta")
    norms = [module for module in other.modules() if isinstance(module, BatchNorm)]
    assert len(norms) == count > 3
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert other.state_dict().keys() == state.keys()
    other.to_empty(device="cpu").load_state_dict(state)
    for layer in other.modules():  # tables that are no state
        if hasattr(layer, "reset_non_persistent_buffers"):
            layer.reset_non_persistent_buffers()
    torch.testing.assert_close(other.eval()(images), expected)


def test_processes_on_cpus_cannot_synchronise(model):
    with pytest.raises(AugmentError, match=r"`sync_norm` needs accelerators.*CPUs"):
        configured(augment.load(model), "cpu")
    with pytest.raises(AugmentError, match="leave out `sync_norm`"):
        configured(augment.load(model), "meta", freeze_norm=True)
