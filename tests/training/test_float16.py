"""Training in float16 with its loss scale: overflows, the moving average, clipping, and resuming.

accelerate has no float16 on CPUs, but torch has both autocast and the scaler: there the tests make it up.
"""

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from typer.testing import CliRunner

from augment_cli.cli import app
from augment_cli.errors import AugmentError
from augment_cli.training import accelerators, engine
from augment_cli.training.finetune import finetune
from augment_cli.training.state import read_state
from tests.training.conftest import short, summary, weights


def float16_on_cpu(init_scale: float):
    """`accelerators._make` as for a GPU, with a scaler that begins at `init_scale`."""

    def make(options):
        made = Accelerator(**{**options, "mixed_precision": "no"})
        made.state._mixed_precision, made.native_amp = "fp16", True
        made.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3)
        return made

    return make


@pytest.fixture
def float16(monkeypatch):
    monkeypatch.setattr(accelerators, "_make", float16_on_cpu(1024.0))


def converted(recipe: str, folder) -> str:
    path = folder / recipe
    arguments = ["convert", "test_resnet", "--recipe", recipe, "--img-size", "32", "-o", str(path)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    return str(path)


@pytest.mark.parametrize("recipe", ["aa", "aw"])
def test_both_layers_train_in_float16_as_in_float32(recipe, images, tmp_path, monkeypatch):
    model = converted(recipe, tmp_path)
    changes = {"augmentation": False, "epochs": 1, "freeze_norm": True, "opt": "sgd"}
    finetune(short(model, images, tmp_path / "no", **changes))
    monkeypatch.setattr(accelerators, "_make", float16_on_cpu(1024.0))
    seen = []
    whole = engine._loss

    def looked(run, *batch):
        run.trained.fc.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
        return whole(run, *batch)

    monkeypatch.setattr(engine, "_loss", looked)
    finetune(short(model, images, tmp_path / "fp16", precision="fp16", **changes))
    assert torch.float16 in seen
    one, other = (load_file(tmp_path / name / "last/model.safetensors") for name in ("no", "fp16"))
    before = load_file(f"{model}/model.safetensors")
    names = [name for name, value in before.items() if value.is_floating_point() and value.shape == one[name].shape]
    change = {name: float((one[name] - before[name]).norm()) for name in names}
    moved = [name for name in names if change[name] > 1e-4 * max(change.values())]  # the rest is too small for float16
    assert len(moved) > 20
    assert any("qkv" in name or "reduce" in name for name in moved)
    for name in moved:  # a step of float16 is that of float32, but for a few parts in a hundred
        assert (one[name] - other[name]).norm() < 0.1 * change[name], name
    rows = [[float(value) for value in summary(tmp_path / name)[1]] for name in ("no", "fp16")]
    assert rows[0] == pytest.approx(rows[1], rel=0.02)


def overflow(monkeypatch, when):
    """Multiply the loss so that its gradients overflow in float16, and nothing else does."""
    whole = engine._loss

    def scaled(run, *batch):
        loss, sums = whole(run, *batch)
        return (loss * 1e30 if when(run) else loss), sums

    monkeypatch.setattr(engine, "_loss", scaled)


def test_an_overflow_changes_no_weight_and_halves_the_scale(float16, model, images, tmp_path, monkeypatch):
    overflow(monkeypatch, lambda run: (run.epoch, run.batch) == (0, 1))
    seen = []
    whole = engine._train_batch

    def watched(run, *batch):
        before = [value.clone() for value in (*run.trained.state_dict().values(), *run.model.parameters())]
        whole(run, *batch)
        after = [*run.trained.state_dict().values(), *run.model.parameters()]
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        rate = run.optimizer.param_groups[0]["lr"]
        seen.append((same, run.accelerator.scaler.get_scale(), run.updates, rate))

    monkeypatch.setattr(engine, "_train_batch", watched)
    finetune(short(model, images, tmp_path / "run", precision="fp16", epochs=1, ema_decay=0.9))
    same, scales, updates, rates = zip(*seen, strict=True)
    assert same == (False, True, False, False)
    assert scales == (1024, 512, 512, 512)
    assert updates == (1, 2, 3, 4)
    assert list(rates) == sorted(rates, reverse=True)
    assert len(set(rates)) == 4


def test_gradients_that_overflow_at_every_scale_end_the_run(float16, model, images, tmp_path, monkeypatch):
    overflow(monkeypatch, lambda run: run.epoch == 1)
    settings = short(model, images, tmp_path / "run", precision="fp16", epochs=20, batch_size=4)
    monkeypatch.setattr(engine, "_LEAST_SCALE", 500.0)
    with pytest.raises(AugmentError, match=r"overflow in float16 at epoch 2, batch \d.*`precision='bf16'`") as raised:
        finetune(settings)
    assert "the checkpoint of epoch 2, 0 batches done, is kept" in str(raised.value)
    assert read_state(tmp_path / "run/state.safetensors")["position"][0] == 1


def test_gradients_are_clipped_without_their_scale(model, images, tmp_path, monkeypatch):
    changes = {"precision": "fp16", "clip_grad": 0.05, "opt": "sgd", "epochs": 1, "freeze_norm": True}
    for scale in (1.0, 1024.0):
        monkeypatch.setattr(accelerators, "_make", float16_on_cpu(scale))
        finetune(short(model, images, tmp_path / str(scale), **changes))
    one, other = (load_file(tmp_path / name / "last/model.safetensors") for name in ("1.0", "1024.0"))
    before = load_file(model / "model.safetensors")
    name = "layer1.0.conv1.conv.weight"
    assert (one[name] - other[name]).norm() < 0.2 * (one[name] - before[name]).norm()


def test_a_killed_run_goes_on_with_its_scale(float16, model, images, tmp_path, monkeypatch):
    """The scale grows every third update and was halved once: a resumed run has to know both."""
    changes = {"precision": "fp16", "epochs": 2, "batch_size": 4, "accumulate": 2, "ema_decay": 0.9}
    changes |= {"checkpoint_every": "2", "random_erasing": 0.5, "mixup": 0.4}
    overflow(monkeypatch, lambda run: (run.epoch, run.batch) == (0, 2))
    finetune(short(model, images, tmp_path / "unbroken", **changes))
    settings = short(model, images, tmp_path / "run", **changes)
    whole = engine._train_batch

    class Killed(BaseException):
        pass

    def killed(run, *batch):
        if (run.epoch, run.batch) == (1, 5):
            raise Killed
        whole(run, *batch)

    monkeypatch.setattr(engine, "_train_batch", killed)
    with pytest.raises(Killed):
        finetune(settings)
    saved = read_state(tmp_path / "run/state.safetensors")
    assert saved["position"] == [1, 2, 6]
    assert saved["scaler"]["scale"] == 1024.0
    assert saved["scaler"]["_growth_tracker"] == 1
    monkeypatch.setattr(engine, "_train_batch", whole)
    finetune(settings, resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "unbroken")
    assert summary(tmp_path / "run") == summary(tmp_path / "unbroken")


def test_float16_is_refused_where_accelerate_would_train_in_float32(model, images, tmp_path, command):
    result = command("finetune", model, "--data", images, "-o", tmp_path / "run", "--precision", "fp16", "--cpu")
    assert result.exit_code == 2
    assert "--precision bf16" in result.stderr
    assert not (tmp_path / "run").exists()
