"""A run that is killed goes on as if it had not been."""

import io
import json
import multiprocessing
import tarfile
from dataclasses import replace

import pytest

from augment_cli.errors import AugmentError
from augment_cli.training.finetune import finetune
from augment_cli.training.settings import Settings, read_settings
from augment_cli.training.state import read_state
from tests.training.conftest import in_process, short, summary, weights

# What every part of the state is needed for: momentum and its steps, a moving average, mixing, groups of batches,
# augmentation, dropout, and checkpoints within epochs.
CHANGES = {
    "epochs": 3,
    "batch_size": 4,
    "accumulate": 2,
    "ema_decay": 0.9,
    "mixup": 0.4,
    "cutmix": 0.4,
    "random_erasing": 0.5,
    "checkpoint_every": "2",
    "new_first": 1,
}

KILLED_AT_A_BATCH = """
import os
from augment_cli.training import engine
whole = engine._train_batch
def killed(run, *batch):
    if (run.epoch, run.batch) == (1, 7):
        os.kill(os.getpid(), 9)
    whole(run, *batch)
engine._train_batch = killed
"""

KILLED_WHILE_SAVING = """
import os, safetensors.torch
whole = safetensors.torch.save_file
def killed(tensors, path, metadata=None):
    if '"position", {"list": [2, ' in metadata.get("run", ""):
        whole(tensors, path, metadata)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), 9)
    whole(tensors, path, metadata)
safetensors.torch.save_file = killed
"""


@pytest.fixture(scope="module")
def unbroken(model, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    finetune(short(model, images, folder, **CHANGES))
    return folder


@pytest.mark.parametrize(
    ("killed", "position", "workers"),
    [(KILLED_AT_A_BATCH, [1, 6, 8], 0), (KILLED_AT_A_BATCH, [1, 6, 8], 2), (KILLED_WHILE_SAVING, [1, 6, 8], 0)],
)
def test_a_killed_run_goes_on_to_the_same_result_bit_for_bit(
    model, images, unbroken, tmp_path, killed, position, workers
):
    settings = short(model, images, tmp_path / "run", **CHANGES, workers=workers)
    broken = in_process(settings, before=killed)
    assert broken.returncode == -9, broken.stderr
    assert read_state(tmp_path / "run/state.safetensors")["position"] == position
    finetune(settings, resume=True)
    assert weights(tmp_path / "run") == weights(unbroken)
    assert summary(tmp_path / "run") == summary(unbroken)
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert not multiprocessing.active_children()


@pytest.fixture(scope="module")
def shards(images, tmp_path_factory):
    """The same images in two shards a split, as webdataset has them."""
    folder, splits = tmp_path_factory.mktemp("shards"), {}
    for split, directory in (("train", "train"), ("validation", "val")):
        files = sorted((images / directory).rglob("*.png"), key=lambda file: file.name)
        names = [f"{split}-{i}.tar" for i in range(2)]
        for i, name in enumerate(names):
            with tarfile.open(folder / name, "w") as tar:
                for number, file in enumerate(files[i::2]):
                    label = ("blue", "green", "red").index(file.parent.name)
                    for suffix, data in (("png", file.read_bytes()), ("cls", str(label).encode())):
                        entry = tarfile.TarInfo(f"{number:03}.{suffix}")
                        entry.size = len(data)
                        tar.addfile(entry, io.BytesIO(data))
        lengths = [len(files[i::2]) for i in range(2)]
        splits[split] = {"name": split, "num_samples": len(files), "filenames": names, "shard_lengths": lengths}
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_a_stream_goes_on_to_the_same_result(model, shards, tmp_path, workers):
    changes = {"num_classes": 3, "checkpoint_every": "2", "workers": workers, "batch_size": 4}
    finetune(short(model, f"wds/{shards}", tmp_path / "unbroken", **changes))
    settings = short(model, f"wds/{shards}", tmp_path / "run", **changes)
    broken = in_process(settings, before=KILLED_AT_A_BATCH)
    assert broken.returncode == -9, broken.stderr
    finetune(settings, resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "unbroken")
    assert summary(tmp_path / "run") == summary(tmp_path / "unbroken")


def test_epochs_workers_and_rates_can_be_others_and_are_recorded(model, images, tmp_path, command):
    finetune(short(model, images, tmp_path / "run", epochs=1))
    more = ("--epochs", "2", "--workers", "1", "--lr", "0.5", "--lr-carried", "0", "--weight-decay", "0.01")
    result = command("finetune", "--resume", tmp_path / "run", *more)
    assert result.exit_code == 0, result.output
    recorded = read_settings(tmp_path / "run/settings.json", Settings)
    assert (recorded.epochs, recorded.workers, recorded.lr) == (2, 1, 0.5)
    saved = read_state(tmp_path / "run/state.safetensors")
    assert saved["settings"]["lr"] == 0.5
    assert len(saved["history"]) == 2
    groups = saved["optimizer"]["param_groups"]
    assert {g["lr_scale"] for g in groups} == {0.0, 1.0}
    assert {g["weight_decay"] for g in groups} == {0.0, 0.01}


def test_a_stream_within_an_epoch_keeps_its_workers(model, shards, tmp_path):
    changes = {"num_classes": 3, "checkpoint_every": "2", "workers": 0, "batch_size": 4}
    settings = short(model, f"wds/{shards}", tmp_path / "run", **changes)
    assert in_process(settings, before=KILLED_AT_A_BATCH).returncode == -9
    with pytest.raises(AugmentError, match="resume with `workers=0`"):
        finetune(replace(settings, workers=2), resume=True)


# Between two groups of accumulated batches, within one, within validation; a signal waits until the group is whole.
STOPPED = """
import os, signal
from augment_cli import signals
from augment_cli.training import classification, engine
for number in signals.SIGNALS:  # a suite in the background ignores some
    signal.signal(number, signal.SIG_DFL)
signals.install()
whole, scores = engine._train_batch, classification.evaluate
def train(run, *batch):
    whole(run, *batch)
    if (run.epoch, run.batch) == (1, {batch}):
        os.kill(os.getpid(), signal.{name})
def evaluate(model, loader, accelerator):
    if {batch} is None and len(run_history) == 1:
        os.kill(os.getpid(), signal.{name})
    run_history.append(1)
    return scores(model, loader, accelerator)
run_history = []
engine._train_batch, classification.evaluate = train, evaluate
"""


@pytest.mark.parametrize(
    ("name", "batch", "position"),
    [("SIGTERM", 3, [1, 4, 7]), ("SIGHUP", 4, [1, 6, 8]), ("SIGINT", 2, [1, 4, 7]), ("SIGTERM", None, [1, 9, 10])],
)
def test_a_signal_ends_a_run_with_a_checkpoint(model, images, unbroken, tmp_path, name, batch, position):
    settings = short(model, images, tmp_path / "run", **{**CHANGES, "checkpoint_every": None}, workers=1)
    stopped = in_process(settings, before=STOPPED.format(name=name, batch=batch))
    assert "Stopped" in stopped.stderr.splitlines()[-1], stopped.stderr
    assert read_state(tmp_path / "run/state.safetensors")["position"] == position
    finetune(settings, resume=True)
    assert weights(tmp_path / "run") == weights(unbroken)
    assert summary(tmp_path / "run") == summary(unbroken)
