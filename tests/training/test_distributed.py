"""Several processes do what one does: over NCCL where there are two GPUs, else over gloo."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from augment_cli.training.assess import Assessment, assess
from augment_cli.training.state import read_state
from tests.training.conftest import summary

GPUS = torch.cuda.device_count() >= 2
DEVICE = () if GPUS else ("--cpu",)
COMMON = (*DEVICE, "--epochs", "3", "--workers", "0", "--warmup-epochs", "0", "--opt", "sgd")
ROUNDING = 1e-2 if GPUS else 1e-3  # TF32


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


def distributed(*arguments) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    return [sys.executable, *launch, "-m", "augment_cli", *map(str, arguments)]


def on_two_processes(*arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(distributed(*arguments), capture_output=True, text=True, check=False, env=environment)


def test_two_processes_give_the_losses_of_one_with_twice_the_batch(model, images, tmp_path, command):
    """To rounding, with augmentation, where batch normalisation keeps its statistics."""
    start = ("finetune", model, "--data", images, *COMMON, "--freeze-norm", "--new-first", "1")
    assert command(*start, "-b", "8", "-o", tmp_path / "one").exit_code == 0
    two = on_two_processes(*start, "-b", "4", "-o", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("epoch 3/3: ") == 1
    one, both = summary(tmp_path / "one"), summary(tmp_path / "two")
    assert one[0] == both[0]
    for a, b in zip(one[1:], both[1:], strict=True):
        assert [float(x) for x in b] == pytest.approx([float(x) for x in a], rel=ROUNDING)
    a, b = (load_file(tmp_path / name / "last/model.safetensors") for name in ("one", "two"))
    assert all(abs(a[name] - b[name]).max() < ROUNDING for name in a if a[name].is_floating_point())

    refused = command("finetune", "--resume", tmp_path / "two")
    assert refused.exit_code == 2
    assert "was written by 2 processes, and now there are 1: resume with 2, or start a new run from" in refused.stderr


def test_two_processes_validate_the_model_that_they_write(model, images, tmp_path):
    """Each has batch statistics of its own; those of the first count, in the moving average, too."""
    options = (*DEVICE, "--epochs", "1", "--workers", "0", "-b", "4", "--ema-decay", "0.9")
    two = on_two_processes("finetune", model, "--data", images, "-o", tmp_path / "run", *options)
    assert two.returncode == 0, two.stderr
    scores = assess(Assessment(str(tmp_path / "run/best"), str(images), workers=0, cpu=not GPUS)).scores
    assert float(summary(tmp_path / "run")[1][3]) == pytest.approx(scores.loss, rel=ROUNDING / 10)
    # Batches of 5 of the 12 images: the processes get different numbers of them.
    both = on_two_processes(
        "evaluate", tmp_path / "run/best", "--data", images, *DEVICE, "-j", "0", "-b", "5", "--json"
    )
    assert both.returncode == 0, both.stderr
    found = json.loads(both.stdout)
    assert (found["images"], found["top1"]) == (12, pytest.approx(scores.top1))
    assert found["loss"] == pytest.approx(scores.loss, rel=ROUNDING)


@pytest.mark.skipif(not GPUS, reason="torch has no synchronised norms for CPUs")
def test_synchronised_norms_see_the_images_of_all_processes(model, images, tmp_path, command):
    start = ("finetune", model, "--data", images, *COMMON)
    two = on_two_processes(*start, "-b", "4", "--sync-norm", "-o", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    assert command(*start, "-b", "8", "-o", tmp_path / "one").exit_code == 0
    one, both = summary(tmp_path / "one"), summary(tmp_path / "two")
    for a, b in zip(one[1:], both[1:], strict=True):
        assert [float(x) for x in b] == pytest.approx([float(x) for x in a], rel=5e-2)


@pytest.mark.skipif(not GPUS, reason="accelerate launch starts several processes on GPUs only")
@pytest.mark.parametrize("options", [("--precision", "bf16", "--compile"), ("--precision", "fp16", "--sync-norm")])
def test_accelerate_launches_processes_on_gpus(model, images, tmp_path, options):
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", free_port()]
    arguments = [
        "augment_cli",
        "finetune",
        model,
        "--data",
        images,
        *COMMON,
        "-b",
        "4",
        *options,
        "-o",
        tmp_path / "run",
    ]
    command = [sys.executable, "-m", *launch, "-m", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert len(summary(tmp_path / "run")) == 4


def test_two_processes_stop_at_the_same_batch_and_go_on(model, images, tmp_path):
    """A signal to the launcher; also where it waits in one process only."""
    options = (*DEVICE, "--epochs", "400", "--workers", "0", "-b", "4", "-o", tmp_path / "run")
    process = subprocess.Popen(
        distributed("finetune", model, "--data", images, *options),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = []
    while not lines or not lines[-1].startswith("epoch 2/"):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    process.terminate()
    _, rest = process.communicate(timeout=120)
    assert f"interrupted; --resume {tmp_path / 'run'} goes on" in rest
    epoch, batch, _ = read_state(tmp_path / "run/state.safetensors")["position"]
    assert epoch >= 2 or batch
    more = on_two_processes("finetune", "--resume", tmp_path / "run", "--epochs", str(epoch + 1))
    assert more.returncode == 0, more.stderr
    assert len(summary(tmp_path / "run")) == 1 + epoch + 1
