"""Bad input: one message that names the thing, the reason and the way out; exit code 2; no traceback; nothing lost."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from augment_cli.checkpoint.files import save_weights
from augment_cli.cli import app


@pytest.fixture
def prepared(in_tmp: Path) -> Path:
    (in_tmp / "bad.toml").write_text("[sites\n")
    (in_tmp / "odd.toml").write_text('description = "x"\noperator = "aa"\n[aa]\nkey_ration = 0.1\n')
    (in_tmp / "old.safetensors").write_text("precious")
    (in_tmp / "old.svg").write_text("precious")
    (in_tmp / "file").write_text("not a folder")
    (in_tmp / "local").mkdir()
    for name in ("best", "last"):
        (in_tmp / "run" / name).mkdir(parents=True)
        (in_tmp / "run" / name / "model.safetensors").touch()
    (in_tmp / "corrupt.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    (in_tmp / "corrupt.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    torch.save([1, 2, 3], in_tmp / "list.pth")
    save_file(timm.create_model("test_nfnet").state_dict(), in_tmp / "other.safetensors")
    (in_tmp / "plan.json").write_text("{")
    (in_tmp / "newer.json").write_text(json.dumps({"schema": 99}))
    return in_tmp


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


CONVERT = ["convert", "test_resnet", "-o", "m.safetensors"]

BAD = [
    (["plan", "RESNET18"], "timm has no model RESNET18; did you mean resnet18"),
    (["plan", "./file"], "is a file or folder: give the name of a model"),
    (["convert", "local"], "is a file or folder: give the name of a model"),
    (["plan", "test_resnet", "--points", "3"], "--points is for --frontier"),
    (["plan", "test_resnet", "--plot", "old.svg"], "old.svg exists; --overwrite replaces it"),
    (["report", "run"], "no model.safetensors in this folder; its folders best and last have one"),
    (["report", "plan.json", "--json", "-f", "csv"], "name two formats: leave one of them out"),
    (["diff", "plan.json", "newer.json"], "`augment compare` shows plans"),
    (["convert", "resnet51"], "timm has no model resnet51; did you mean resnet51q, resnet50"),
    (["plan", "resnet50.a1_in2k"], "timm has no weights resnet50.a1_in2k; did you mean a1_in1k"),
    (["plan", "local-dir:nowhere"], "local-dir:nowhere cannot be created: Config file not found"),
    (["convert"], "which model? Give a timm model's name, or a plan with --plan"),
    ([*CONVERT, "-r", "aa-resnt"], "no built-in recipe named aa-resnt; did you mean aa-resnet"),
    ([*CONVERT, "-r", "none.toml"], "recipe none.toml: no such file"),
    ([*CONVERT, "-r", "bad.toml"], "bad.toml is not a TOML file: "),
    ([*CONVERT, "-r", "odd.toml"], "unknown key aa.key_ration; did you mean key_ratio"),
    ([*CONVERT, "--set", "budget.parms=keep"], "unknown key budget.parms; did you mean params"),
    ([*CONVERT, "--set", "budget.params=lots"], "no budget: write free, keep, an amount like 25.6M"),
    ([*CONVERT, "--set", "select.names=layer7.*"], "select.names: 'layer7.*' matches no convolution"),
    ([*CONVERT, "--set", "budget.params=-95%"], "the chosen sites can have"),
    ([*CONVERT, "-r", "aw", "--set", "budget.params=keep"], "operator aa+aw (recipe aa-aw) adds none"),
    ([*CONVERT, "--img-size", "big"], "--img-size big: write it as 224, or as HEIGHTxWIDTH"),
    ([*CONVERT, "-a", "num_classes"], "--model-arg num_classes: write it as KEY=VALUE"),
    ([*CONVERT, "-a", "colour=red"], "test_resnet cannot be created with {'colour': 'red'}: "),
    ([*CONVERT, "-a", "pretrained=true"], "pretrained cannot be set"),
    ([*CONVERT, "--checkpoint", "none.pth"], "checkpoint none.pth: no such file"),
    ([*CONVERT, "--checkpoint", "corrupt.pth"], "checkpoint corrupt.pth cannot be read"),
    ([*CONVERT, "--checkpoint", "corrupt.safetensors"], "checkpoint corrupt.safetensors cannot be read"),
    ([*CONVERT, "--checkpoint", "list.pth"], "checkpoint list.pth holds no state dict"),
    ([*CONVERT, "--checkpoint", "other.safetensors"], "checkpoint other.safetensors does not fit ResNet: "),
    ([*CONVERT, "--checkpoint", "other.safetensors", "--pretrained"], "give one of them"),
    (["plan", "vgg11", "--img-size", "16"], "VGG does not run on an image of 3x16x16: "),
    (["convert", "test_resnet", "-o", "old.safetensors"], "old.safetensors exists; --overwrite replaces it"),
    (["convert", "test_resnet", "-o", "none/m.safetensors"], "there is no folder"),
    (["convert", "test_resnet", "-o", "file/m.safetensors"], "there is no folder"),
    (["convert", "test_resnet", "-o", "/proc/m.safetensors"], "/proc/m.safetensors cannot be written"),
    (["convert", "--plan", "none.json"], "plan none.json cannot be read: No such file"),
    (["convert", "--plan", "plan.json"], "plan plan.json is not JSON"),
    (["convert", "--plan", "newer.json"], "has schema 99, and this version reads 1: install a newer"),
    (["report", "none.safetensors"], "none.safetensors: no such file"),
    (["report", "other.safetensors"], "is a safetensors file, but no converted model"),
    (["check", "old.safetensors"], "old.safetensors is no safetensors file"),
    (["check", "corrupt.safetensors"], "cut short"),
    (["recipes", "show", "ab"], "no built-in recipe named ab; did you mean"),
    (["models", "resnet9999*"], "timm has no model like resnet9999*"),
    (["recipes", "copy", "aa", "old.safetensors"], "old.safetensors exists"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_refused_in_one_line_and_changes_nothing(prepared, arguments, message):
    before = snapshot(prepared)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert result.stderr.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert snapshot(prepared) == before


@pytest.mark.parametrize(
    ("arguments", "word", "command"),
    [
        (["convert", "--nonsense"], "--nonsense", "convert"),
        (["report"], "FILE", "report"),
        (["report", "x", "-f", "pdf"], "pdf", "report"),
        (["convert", "a", "--seed", "-1"], "--seed", "convert"),
        (["plan", "a", "--frontier", "size"], "size", "plan"),
        (["plan", "a", "--points", "1"], "--points", "plan"),
        (["attention", "a", "b", "--head", "x"], "--head", "attention"),
        (["diff", "a"], "B", "diff"),
        (["detect", "finetune", "a", "--nonsense"], "--nonsense", "detect finetune"),
        (["sing"], "sing", ""),
    ],
)
def test_wrong_usage_is_refused_in_one_line_too(arguments, word, command):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert word in line
    assert f"{command} --help" in line
    assert result.stdout == ""


def test_a_group_without_a_command_shows_its_help():
    result = CliRunner().invoke(app, ["detect"])
    assert result.exit_code == 2
    assert "finetune" in result.output
    assert "error" not in result.output


def program(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "augment_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_pretrained_weights_without_a_network(in_tmp):
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(in_tmp / "hub"),
        "TORCH_HOME": str(in_tmp / "hub"),
    }
    result = program("convert", "resnet18", "--pretrained", "-o", "m.safetensors", env=environment)
    assert result.returncode == 2
    assert "error: the pretrained weights of resnet18 cannot be had: " in result.stderr
    assert "Give a file as --checkpoint" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (in_tmp / "m.safetensors").exists()


@pytest.mark.parametrize("target", ["m.safetensors", "folder"])
def test_a_full_disk_leaves_the_old_output_and_no_half_file(in_tmp, target):
    """A limit on the size of files stands for the disk: writing past it fails in the same place."""
    assert program("convert", "test_resnet", "-r", "aw", "-o", target, cwd=in_tmp).returncode == 0
    before = snapshot(in_tmp)
    result = program(
        *("convert", "test_resnet", "-o", target, "--overwrite"),
        cwd=in_tmp,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)),
    )
    assert result.returncode == 2, result.stderr
    assert "cannot be written" in result.stderr
    assert "Traceback" not in result.stderr
    assert snapshot(in_tmp) == before


def test_ctrl_c_while_the_file_is_written_leaves_the_old_one(in_tmp, monkeypatch):
    (in_tmp / "m.safetensors").write_text("precious")

    def interrupted(model, metadata, path):
        save_weights(model, metadata, path)
        raise KeyboardInterrupt

    monkeypatch.setattr("augment_cli.checkpoint.files.save_weights", interrupted)
    result = CliRunner().invoke(app, [*CONVERT, "--overwrite"])
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted"
    assert snapshot(in_tmp) == {"m.safetensors": b"precious"}


@pytest.mark.parametrize("seconds", [0.0, 0.2, 0.5, 1.0])
def test_ctrl_c_at_any_time_leaves_a_whole_file_or_none(in_tmp, seconds):
    command = [sys.executable, "-m", "augment_cli", "convert", "resnet18", "-o", "m.safetensors"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert "convolutions" in process.stderr.readline()  # planned: what follows takes about a second
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode in (0, 130), stderr
    assert "Traceback" not in stderr
    left = [f.name for f in in_tmp.iterdir()]
    assert left in ([], ["m.safetensors"])
    assert left or process.returncode
    assert not left or program("check", "m.safetensors").returncode == 0


def test_a_closed_pipe_is_no_error_message(in_tmp):
    command = f"{sys.executable} -m augment_cli recipes show aa | true"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert result.stderr == ""


def test_check_says_when_a_file_is_not_what_its_plan_says(in_tmp):
    from safetensors import safe_open
    from safetensors.torch import load_file

    assert CliRunner().invoke(app, CONVERT).exit_code == 0
    with safe_open("m.safetensors", "pt") as opened:
        metadata = opened.metadata()
    data = json.loads(metadata["augment"])
    data["plan"]["params_before"] += 1
    save_file(load_file("m.safetensors"), "wrong.safetensors", metadata | {"augment": json.dumps(data)})
    result = CliRunner().invoke(app, ["check", "wrong.safetensors"])
    assert result.exit_code == 2
    assert "no" in result.stdout
    assert "error: wrong.safetensors is not what its plan says" in result.stderr
