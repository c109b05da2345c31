"""Fine-tuning runs through the library: results, files and errors."""

import csv
import errno
import json
import math
import random
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from timm.layers import DropPath

import augment_cli
from augment_cli.checkpoint.metadata import read_metadata
from augment_cli.errors import AugmentError
from augment_cli.training import engine, state
from augment_cli.training.assess import Assessment, assess
from augment_cli.training.finetune import finetune
from augment_cli.training.meter import Meter
from augment_cli.training.models import open_model, with_drop_path
from augment_cli.training.settings import Settings, read_settings
from tests.training.conftest import configuration, in_process, short, summary, weights


@pytest.fixture(scope="module")
def tuned(model, images, tmp_path_factory):
    """A run that learns to tell the three colours."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    finetune(short(model, images, folder, epochs=6, lr_carried=1.0))
    return folder


KILLED = """
import os
from augment_cli.training import engine
engine.finish_epoch = lambda *_: os.kill(os.getpid(), 9)
"""


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_learns_and_leaves_its_files(tuned):
    assert {path.name for path in tuned.iterdir()} == {
        "best",
        "last",
        "curves.png",
        "settings.json",
        "state.safetensors",
        "summary.csv",
    }
    rows = list(csv.DictReader((tuned / "summary.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert max(float(row["val_top1"]) for row in rows) > 80
    assert (tuned / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert read_settings(tuned / "settings.json", Settings).epochs == 6


def test_the_tuned_model_is_loaded_by_us_and_by_timm_with_its_new_classifier(tuned, model):
    x = torch.randn(2, 3, 32, 32)
    for name in ("best", "last"):
        ours = augment_cli.load(tuned / name).eval()
        timms = timm.create_model(f"local-dir:{tuned / name}", pretrained=True).eval()
        assert ours(x).shape == (2, 3)
        assert torch.equal(ours(x), timms(x))
    plan, before = read_metadata(tuned / "best").plan, read_metadata(model).plan
    assert plan.sites == before.sites
    assert before.params_after - plan.params_after == 997 * (augment_cli.load(model).num_features + 1)
    assert plan.params_after == sum(p.numel() for p in ours.parameters())
    assert configuration(tuned / "best")["pretrained_cfg"]["label_names"] == ["blue", "green", "red"]
    assert read_metadata(tuned / "best").weights == "checkpoint source.safetensors, fine-tuned on colours"


def test_evaluating_the_best_gives_its_row_of_the_summary(tuned, images):
    rows = list(csv.DictReader((tuned / "summary.csv").open()))
    best = max(rows, key=lambda row: float(row["val_top1"]))
    result = assess(Assessment(str(tuned / "best"), str(images), workers=0, cpu=True))
    assert result.scores.images == 12
    assert result.scores.top1 == pytest.approx(float(best["val_top1"]), abs=1e-3)
    assert result.scores.loss == pytest.approx(float(best["val_loss"]), rel=1e-4)


def test_the_same_settings_give_the_same_weights_and_another_seed_does_not(model, images, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finetune(short(model, images, tmp_path / name, epochs=1, seed=seed))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_the_number_of_worker_processes_does_not_matter(model, images, tmp_path):
    for workers in (0, 2):
        finetune(short(model, images, tmp_path / str(workers), epochs=1, workers=workers))
    assert weights(tmp_path / "0") == weights(tmp_path / "2")


def test_a_learning_rate_of_zero_for_what_was_carried_leaves_it_as_it_was(model, images, tmp_path):
    finetune(short(model, images, tmp_path / "run", lr_carried=0.0, epochs=1))
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "run/last/model.safetensors")
    changed = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    parameters = changed & {name for name, _ in augment_cli.load(model).named_parameters()}
    assert parameters
    assert all("qkv" in n or "proj" in n or "rel_" in n or n.startswith("fc.") for n in parameters), parameters


def test_new_first_trains_the_rest_from_its_epoch_on(model, images, tmp_path):
    carried = "layer1.0.conv1.conv.weight"
    before = load_file(model / "model.safetensors")
    assert carried in before
    for epochs, same in ((1, True), (2, False)):
        folder = tmp_path / str(epochs)
        finetune(short(model, images, folder, new_first=1, epochs=epochs))
        after = load_file(folder / "last/model.safetensors")
        assert torch.equal(before[carried], after[carried]) is same
        assert not torch.equal(before["layer1.0.conv1.qkv.weight"], after["layer1.0.conv1.qkv.weight"])


def test_frozen_norms_keep_their_statistics(model, images, tmp_path):
    finetune(short(model, images, tmp_path / "run", freeze_norm=True, epochs=1))
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "run/last/model.safetensors")
    statistics = [name for name in before if "running_" in name]
    assert statistics
    assert all(torch.equal(before[name], after[name]) for name in statistics)


def test_accumulated_batches_are_one_batch(model, images, tmp_path):
    finetune(short(model, images, tmp_path / "a", freeze_norm=True, epochs=1, batch_size=12, augmentation=False))
    changes = {"batch_size": 4, "accumulate": 3}
    finetune(short(model, images, tmp_path / "b", freeze_norm=True, epochs=1, augmentation=False, **changes))
    a, b = (load_file(tmp_path / name / "last/model.safetensors") for name in "ab")
    assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-4) for name in a)


def test_a_moving_average_is_what_is_kept(model, images, tmp_path):
    finetune(short(model, images, tmp_path / "run", ema_decay=0.9, epochs=1))
    saved = state.read_state(tmp_path / "run/state.safetensors")
    kept = load_file(tmp_path / "run/last/model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in saved["ema"].items())
    assert not torch.equal(saved["ema"]["fc.weight"], saved["model"]["fc.weight"])


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "bce"},
        {"mixup": 0.3, "cutmix": 0.5},
        {"mixup": 0.3, "loss": "bce"},
        {"opt": "sgd", "schedule": "poly", "layer_decay": 0.7},
        {"opt": "lamb", "schedule": "step"},
        {"auto_augment": "rand-m5", "random_erasing": 0.5, "channels_last": True},
        {"grad_checkpointing": True, "precision": "bf16"},
        {"hold_out": 0.25, "train_split": "train"},
        {"img_size": (24, 40)},
    ],
    ids=str,
)
def test_other_settings_train_too(model, images, tmp_path, changes):
    finetune(short(model, images, tmp_path / "run", epochs=1, **changes))
    assert all(math.isfinite(float(value)) for value in summary(tmp_path / "run")[1])


def test_a_plain_model_is_tuned_for_comparison_and_read_again(images, tmp_path):
    changes = {"pretrained": False, "img_size": (32, 32), "epochs": 1}
    finetune(short("test_resnet", images, tmp_path / "plain", **changes))
    again = timm.create_model(f"local-dir:{tmp_path / 'plain/best'}", pretrained=True)
    assert again.num_classes == 3
    finetune(short(tmp_path / "plain/best", images, tmp_path / "more", epochs=1, img_size=(32, 32)))
    shutil.rmtree(tmp_path / "plain")
    assert load_file(tmp_path / "more/best/model.safetensors").keys() == again.state_dict().keys()


def test_a_teacher_is_believed_more_than_labels_as_its_share_says(model, images, tmp_path):
    """Labels are all wrong: a model that learns from the teacher alone is right, one that learns from them is not."""
    for split in ("train", "val"):
        for name, wrong in (("red", "blue"), ("green", "red"), ("blue", "green")):
            shutil.copytree(images / split / name, tmp_path / "wrong" / split / wrong)
    finetune(short(model, images, tmp_path / "teacher", epochs=10, lr_carried=1.0))
    top1 = {}
    for share in (1.0, 0.0):
        folder = tmp_path / str(share)
        teaching = {"teacher": str(tmp_path / "teacher" / "best"), "distill": share}
        finetune(short(model, tmp_path / "wrong", folder, epochs=12, lr_carried=1.0, **teaching))
        top1[share] = assess(Assessment(str(folder / "last"), str(images), workers=0, cpu=True)).scores.top1
    assert top1[1.0] > 60
    assert top1[0.0] < 40


def test_a_tracker_gets_every_epoch_and_every_so_many_updates(model, images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finetune(short(model, images, tmp_path / "run", log_with=("tensorboard",), log_every=3))
    log = EventAccumulator(str(tmp_path / "run/augment")).Reload()
    assert [event.step for event in log.Scalars("val_top1")] == [4, 8]
    assert [event.value for event in log.Scalars("epoch")] == [1, 2]
    assert [event.step for event in log.Scalars("loss")] == [3, 6]


def test_patience_ends_a_run_that_gets_no_better(model, images, tmp_path, capfd):
    settings = short(model, images, tmp_path / "run", epochs=6, lr=0.0, patience=2, freeze_norm=True)
    finetune(settings)
    assert len(summary(tmp_path / "run")) == 1 + 3
    assert "no better top-1 for 2 epochs" in capfd.readouterr().err
    finetune(replace(settings, patience=0, epochs=4), resume=True)
    assert len(summary(tmp_path / "run")) == 1 + 4


def test_drop_path_is_for_training_alone(model, images, tmp_path):
    for name, rate in (("without", 0.0), ("with", 0.5)):
        finetune(short(model, images, tmp_path / name, drop_path=rate, epochs=1))
    assert weights(tmp_path / "with") != weights(tmp_path / "without")
    tuned = augment_cli.load(tmp_path / "with/last")
    assert not any(isinstance(module, DropPath) for module in tuned.modules())
    assert "drop_path_rate" not in configuration(tmp_path / "with/last")["model_args"]
    with pytest.raises(AugmentError, match="has no stochastic depth"):
        with_drop_path(open_model("densenet121"), 0.1)


def test_random_states_are_the_callers_afterwards(model, images, tmp_path):
    def drawn() -> list[float]:
        return [random.random(), float(np.random.randn()), float(torch.rand(()))]

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = drawn()
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
    finetune(short(model, images, tmp_path / "run", epochs=1))
    assess(Assessment(str(tmp_path / "run/best"), str(images), workers=0, cpu=True))
    assert drawn() == expected


def test_precisions_do_not_meet_in_one_process(model, images, tmp_path):
    own = Accelerator(cpu=True, gradient_accumulation_steps=7)
    for precision in ("no", "bf16", "no"):
        finetune(short(model, images, tmp_path / "run", precision=precision, epochs=1), overwrite=True)
        assert assess(Assessment(str(tmp_path / "run/best"), str(images), workers=0, cpu=True)).scores.images == 12
    assert own.mixed_precision == "no"
    assert own.gradient_accumulation_steps == 7


def test_mixed_precision_is_that_of_every_epoch(model, images, tmp_path, monkeypatch):
    seen = []
    whole = engine._train_batch

    def recorded(run, *batch):
        whole(run, *batch)
        with torch.no_grad():
            run.trained.fc.register_forward_hook(lambda m, i, out: seen.append((run.epoch, out.dtype)), prepend=True)
            run.model(batch[0])
        run.trained.fc._forward_hooks.clear()

    monkeypatch.setattr(engine, "_train_batch", recorded)
    finetune(short(model, images, tmp_path / "run", precision="bf16", new_first=1))
    assert set(seen) == {(0, torch.bfloat16), (1, torch.bfloat16)}


def test_an_epochs_seconds_hold_what_the_device_had_still_to_do(model, images, tmp_path, monkeypatch):
    whole = Meter.look

    def waiting(self, *rest):
        time.sleep(0.5)
        whole(self, *rest)

    monkeypatch.setattr(Meter, "look", waiting)
    finetune(short(model, images, tmp_path / "run", epochs=1))
    with (tmp_path / "run/summary.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["seconds"]) >= 0.5


def test_new_first_computes_no_gradients_that_it_drops(model, images, tmp_path, monkeypatch):
    seen = []
    whole = engine._train_batch

    def recorded(run, *batch):
        whole(run, *batch)
        kinds = {run.kinds[n] for n, p in run.trained.named_parameters() if p.requires_grad}
        seen.append((run.epoch, sorted(kinds)))

    monkeypatch.setattr(engine, "_train_batch", recorded)
    finetune(short(model, images, tmp_path / "run", new_first=1))
    assert sorted(set(map(str, seen))) == ["(0, ['new'])", "(1, ['carried', 'new'])"]
    source = str(model.parent / "source.safetensors")
    with pytest.raises(AugmentError, match="none would be trained"):
        finetune(short("test_resnet", images, tmp_path / "no", new_first=1, num_classes=1000, checkpoint=source))


def test_corrupt_images_are_skipped_counted_and_named(model, images, tmp_path, capfd):
    shutil.copytree(images, tmp_path / "data")
    names = [tmp_path / "data/train/red/003.png", tmp_path / "data/val/blue/000.png"]
    for name in names:
        name.write_bytes(b"no image")
    finetune(short(model, tmp_path / "data", tmp_path / "run", on_corrupt="skip", workers=1, epochs=1))
    assert (tmp_path / "run/corrupt.txt").read_text().splitlines() == [str(name) for name in names]
    assert f"2 corrupt images skipped: {names[0]}, {names[1]}" in capfd.readouterr().err


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_checkpoint(model, images, tmp_path, monkeypatch):
    whole = engine._loss

    def broken(run, *rest):
        factor = math.nan if (run.epoch, run.batch) == (1, 2) else 1
        loss, sums = whole(run, *rest)
        return loss * factor, sums * factor

    monkeypatch.setattr(engine, "_loss", broken)
    settings = short(model, images, tmp_path / "run", epochs=3, checkpoint_every="1")
    with pytest.raises(AugmentError, match="the loss is nan at epoch 2, batch 3; the checkpoint of epoch 2, 2 batches"):
        finetune(settings)
    monkeypatch.undo()
    assert state.read_state(tmp_path / "run/state.safetensors")["position"] == [1, 2, 6]
    finetune(settings, resume=True)
    assert len(summary(tmp_path / "run")) == 4


def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint(model, images, tmp_path, monkeypatch):
    import safetensors.torch

    whole, written = safetensors.torch.save_file, []

    def full(tensors, path, metadata=None):
        whole(tensors, path, metadata)
        written.append(path)
        if len(written) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    settings = short(model, images, tmp_path / "run", checkpoint_every="1")
    with pytest.raises(AugmentError, match=r"state\.safetensors cannot be written: No space left on device"):
        finetune(settings)
    monkeypatch.undo()
    assert state.read_state(tmp_path / "run/state.safetensors")["position"] == [0, 2, 2]
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_a_folder_that_is_in_use_is_refused_and_left_alone(tuned, model, images, tmp_path):
    before = snapshot(tuned)
    with pytest.raises(AugmentError, match=r"holds a run: `resume=True` .* `overwrite=True`"):
        finetune(short(model, images, tuned))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("mine")
    with pytest.raises(AugmentError, match=r"is not empty.*`overwrite=True`"):
        finetune(short(model, images, tmp_path / "full"))
    assert snapshot(tuned) == before


def test_overwriting_replaces_the_run_and_nothing_else(model, images, tmp_path):
    finetune(short(model, images, tmp_path / "run", epochs=2))
    (tmp_path / "run/notes").write_text("mine")
    finetune(short(model, images, tmp_path / "run", epochs=1, seed=5), overwrite=True)
    assert len(summary(tmp_path / "run")) == 2
    assert (tmp_path / "run/notes").read_text() == "mine"


def test_a_checkpoint_of_another_run_is_refused(tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "run")
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    (tmp_path / "run/settings.json").write_text(json.dumps(settings | {"seed": 5}))
    with pytest.raises(AugmentError, match=r"another run than .* `seed` was 0, and is 5"):
        finetune(
            replace(read_settings(tmp_path / "run/settings.json", Settings), output=str(tmp_path / "run")), resume=True
        )


def test_settings_of_another_version_are_read(tuned, tmp_path):
    settings = json.loads((tuned / "settings.json").read_text())
    del settings["patience"]
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"novelty": 3}))
    assert read_settings(tmp_path / "settings.json", Settings) == read_settings(tuned / "settings.json", Settings)
    for text, word in (("[1]", "JSON object"), ('{"lr": 1}', "required"), ("{", "cannot be read")):
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(AugmentError, match=word):
            read_settings(tmp_path / "settings.json", Settings)


def test_a_second_run_keeps_the_provenance_of_the_first(tuned, images, tmp_path):
    finetune(short(tuned / "best", images, tmp_path / "run", epochs=1))
    first, second = (state.read_state(folder / "state.safetensors")["kinds"] for folder in (tuned, tmp_path / "run"))
    assert first == second
    assert {"carried", "new"} == set(first.values())
    assert first["fc.weight"] == "new"


def test_data_that_changed_since_are_refused(model, images, tmp_path):
    shutil.copytree(images, tmp_path / "data")
    settings = short(model, tmp_path / "data", tmp_path / "run", epochs=1)
    finetune(settings)
    (tmp_path / "data/train/red/003.png").unlink()
    with pytest.raises(AugmentError, match="had 36 training images when the run began, and now 35"):
        finetune(settings, resume=True)


def test_another_number_of_processes_is_refused(tuned, monkeypatch):
    whole = state.read_state
    monkeypatch.setattr(state, "read_state", lambda path: whole(path) | {"processes": 2})
    with pytest.raises(AugmentError, match="was written by 2 processes, and now there are 1: resume with 2, or start"):
        finetune(read_settings(tuned / "settings.json", Settings), resume=True)


def test_a_finished_run_resumed_changes_nothing(tuned):
    before = snapshot(tuned)
    settings = read_settings(tuned / "settings.json", Settings)
    finetune(settings, resume=True)
    assert snapshot(tuned) == before


def test_nothing_is_unpickled_from_a_checkpoint(model, images, tmp_path, monkeypatch):
    settings = short(model, images, tmp_path / "run", checkpoint_every="3")
    assert in_process(settings, before=KILLED).returncode == -9

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"):
        monkeypatch.setattr(name, refuse)
    finetune(settings, resume=True)
    assert len(summary(tmp_path / "run")) == 3


BAD = [
    ({"num_classes": 2}, "have 3 classes, more than `num_classes=2`"),
    ({"batch_size": 64}, "36 training images do not fill one batch of 64"),
    ({"opt": "adamx"}, "timm has no optimiser adamx; did you mean"),
    ({"hold_out": 0.01}, "leaves none"),
    ({"val_split": "test"}, "has a folder train, but none for the split test"),
    ({"model": "none.safetensors"}, "none.safetensors: no such file or folder"),
    ({"model": "resnet1"}, "timm has no model resnet1; did you mean"),
    ({"pretrained": True}, "has its own weights: leave out `pretrained`"),
    ({"model_args": {"num_classes": 3}}, "knows its own arguments: leave out `model_args`"),
    ({"teacher": "test_resnet", "teacher_checkpoint": "none.pth"}, "checkpoint none.pth: no such file"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_what_does_not_go_together_is_refused_before_anything_is_written(model, images, tmp_path, changes, message):
    values = {"model": model, "images": images, "output": tmp_path / "run", **changes}
    with pytest.raises(AugmentError) as raised:
        finetune(short(**values))
    assert message in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_teacher_of_other_classes_is_refused(model, images, tmp_path):
    with pytest.raises(AugmentError, match="has 1000 classes, and the model 3: fine-tune the teacher"):
        finetune(short(model, images, tmp_path / "run", teacher=str(model)))


def test_validating_on_the_training_images_is_refused(model, images, tmp_path):
    with pytest.raises(AugmentError, match=r"have no splits: .* give `val_data`, or `hold_out=0"):
        finetune(short(model, images / "train", tmp_path / "run"))
    settings = short(model, images / "train", tmp_path / "run", val_data=str(images / "val"), epochs=1)
    finetune(settings)
    assert len(summary(tmp_path / "run")) == 2
