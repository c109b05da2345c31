"""augment finetune and augment evaluate, as a user meets them."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from augment_cli.cli import app
from augment_cli.training.state import read_state
from tests.training.conftest import summary

QUICK = ("--epochs", "1", "--batch-size", "8", "--workers", "0", "--cpu")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from augment_cli.cli import app\n"
        "from typer.testing import CliRunner\n"
        "for command in ('finetune', 'evaluate', 'timm'):\n"
        "    assert CliRunner().invoke(app, [command, '--help']).exit_code == 0, command\n"
        "print(sorted({'torch', 'timm', 'numpy', 'accelerate', 'matplotlib'} & sys.modules.keys()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"


def test_finetune_evaluate_and_check(model, images, tmp_path):
    tuned = run("finetune", model, "--data", images, "-o", tmp_path / "run", *QUICK, "-a", "x=1")
    assert tuned.exit_code == 2
    tuned = run("finetune", model, "--data", images, "-o", tmp_path / "run", *QUICK)
    assert tuned.exit_code == 0, tuned.output
    assert tuned.stdout == ""
    assert "3 classes: 36 images to train on, 12 to validate; 8 an update" in tuned.stderr
    assert "0.002 for" in tuned.stderr
    assert "epoch 1/1: train loss" in tuned.stderr
    assert "\x1b" not in tuned.stderr

    best = tmp_path / "run/best"
    confusion = tmp_path / "confusion.csv"
    options = ("--data", images, "--workers", "0", "--cpu")
    found = run("evaluate", best, *options, "--json", "--against", best, "--confusion", confusion)
    scores = json.loads(found.stdout)
    assert scores["images"] == 12
    assert (scores["agreement"], scores["top5"], scores["corrupt"]) == (100.0, 100.0, [])
    assert abs(scores["kl"]) < 1e-6
    assert f"{scores['top1']:.2f}" == f"{float(summary(tmp_path / 'run')[1][4]):.2f}"
    assert confusion.read_text().startswith("true \\ predicted,blue,green,red\n")
    assert "top1" in run("evaluate", best, *options).stdout
    assert json.loads(run("check", best, "--json").stdout)["passed"]


def test_ctrl_c_says_one_line_and_leaves_a_run_to_resume(model, images, tmp_path):
    arguments = ["finetune", model, "--data", images, "-o", tmp_path / "run", "--epochs", "100", "-b", "8", "-j", "1"]
    command = [sys.executable, "-m", "augment_cli", *map(str, arguments), "--cpu", "--checkpoint-every", "1"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the suite runs in background
    )
    lines = []
    while not lines or not lines[-1].startswith("epoch 1/"):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    assert [line for line in rest.splitlines() if "epoch" not in line] == [
        f"interrupted; --resume {tmp_path / 'run'} goes on"
    ]
    assert read_state(tmp_path / "run/state.safetensors")["position"][2] > 0


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_corrupt_image_ends_the_run_in_one_line(model, images, tmp_path, workers):
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data/train/red/003.png").write_bytes(b"no image")
    options = ("-o", tmp_path / "run", "--epochs", "1", "-b", "8", "--cpu", "--workers", workers)
    result = run("finetune", model, "--data", tmp_path / "data", *options)
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'data/train/red/003.png'} cannot be read: cannot identify image file")
    assert last.endswith("; --on-corrupt skip goes on without such images")
    assert "Traceback" not in result.output
    assert read_state(tmp_path / "run/state.safetensors")["position"] == [0, 0, 0]


def test_a_tracker_that_is_not_installed_is_named(monkeypatch, model, images, tmp_path):
    monkeypatch.setattr("augment_cli.training.finetune.find_spec", lambda name: None)
    result = run("finetune", model, "--data", images, "-o", tmp_path / "run", *QUICK, "--log-with", "aim")
    assert result.exit_code == 2
    assert "aim: the package is not installed" in result.stderr


BAD = [
    (["finetune"], "MODEL is missing; a run needs MODEL, --data and --output, or --resume DIR"),
    (["finetune", "m"], "--data is missing"),
    (["finetune", "m", "--data", "d"], "--output is missing"),
    (["finetune", "--resume", "none"], "--resume none: no run here that could be resumed"),
    (["finetune", "--resume", "none", "--batch-size", "1"], "--batch-size cannot be another for a run that has begun"),
    (["finetune", "m", "--resume", "none"], "MODEL cannot be another"),
    (["finetune", "resnet51", "--data", "d", "-o", "o"], "timm has no model resnet51; did you mean"),
    (["finetune", "m", "--data", "d", "-o", "o", "--log-with", "wandbb"], "no such tracker; did you mean wandb"),
    (["finetune", "none.safetensors", "--data", "d", "-o", "o"], "none.safetensors: no such file or folder"),
    (["finetune", "test_resnet", "--data", "d", "-o", "o"], "data d: no such folder or file"),
    (["finetune", "test_resnet", "--data", "d", "-o", "a/o"], "a/o cannot be written: there is no folder"),
    (["finetune", "m", "--data", "d", "-o", "o", "--epochs", "0"], "--epochs 0 is not from 1 to"),
    (["finetune", "m", "--data", "d", "-o", "o", "--mixup", "1", "-b", "7"], "--batch-size 7 is odd"),
    (["finetune", "m", "--data", "d", "-o", "o", "--checkpoint-every", "x"], "--checkpoint-every x: write updates as"),
    (["finetune", "m", "--data", "d", "-o", "o", "--img-size", "x"], "--img-size x: write it as 224"),
    (["evaluate", "test_resnet", "--data", "d"], "data d: no such folder or file"),
    (["evaluate", "none.safetensors", "--data", "d"], "none.safetensors: no such file or folder"),
    (["evaluate", "m", "--data", "d", "--confusion", "c.txt"], "the name ends in .csv or .png"),
    (["timm", "none.py"], "none.py: no such script"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_refused_in_one_line_and_changes_nothing(in_tmp, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert [line.startswith("error: ") for line in result.stderr.splitlines()] == [True]
    assert result.stdout == ""
    assert not list(in_tmp.iterdir())
