"""A run that is killed goes on as if it had not been."""

import io
import json
import tarfile

import pytest

from augment_cli.training.finetune import finetune
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
