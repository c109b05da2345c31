"""Places of outputs, what they may replace, and how interrupted commands end."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.cli.helpers import ok, run

CONVERT = ("convert", "test_resnet", "-r", "aw")


def refused(*arguments: str, word: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert word in result.stderr
    assert "Traceback" not in result.output


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.bin", "m.PTH", "m.onnx"])
def test_other_formats_are_no_folders(in_tmp, name):
    refused(*CONVERT, "-o", name, word="safetensors")
    assert not list(in_tmp.iterdir())


def test_a_name_without_a_suffix_is_a_folder_and_with_safetensors_a_file(in_tmp):
    (in_tmp / "file").write_text("")
    (in_tmp / "d.safetensors").mkdir()
    refused(*CONVERT, "-o", "file", "--overwrite", word="is a file")
    refused(*CONVERT, "-o", "d.safetensors", "--overwrite", word="is a folder")


def test_overwriting_replaces_an_own_folder_and_no_other(in_tmp):
    ok(*CONVERT, "-o", "out")
    ok("convert", "test_resnet", "-r", "aa", "-o", "out", "--overwrite")
    assert "aa" in ok("report", "out").stdout
    before = snapshot(in_tmp)
    for name, text in (("notes.txt", "mine"), ("README.md", "# Mine"), ("config.json", "{}")):
        old = (in_tmp / "out" / name).read_bytes() if (in_tmp / "out" / name).exists() else None
        (in_tmp / "out" / name).write_text(text)
        refused(*CONVERT, "-o", "out", "--overwrite", word=name)
        assert (in_tmp / "out" / name).read_text() == text
        (in_tmp / "out" / name).unlink()
        if old is not None:
            (in_tmp / "out" / name).write_bytes(old)
    assert snapshot(in_tmp) == before


def test_the_current_folder_is_never_taken(in_tmp):
    for name in ("README.md", "config.json"):
        (in_tmp / name).write_text("mine")
    for flags in ((), ("--overwrite",)):
        for target in (".", "..", str(in_tmp)):
            assert run(*CONVERT, "-o", target, *flags).exit_code == 2
    assert snapshot(in_tmp) == {"README.md": b"mine", "config.json": b"mine"}


def test_an_input_is_not_its_output(in_tmp):
    ok(*CONVERT, "-o", "out")
    save_file(timm.create_model("test_resnet").state_dict(), "w.safetensors")
    before = snapshot(in_tmp)
    refused(*CONVERT, "--checkpoint", "w.safetensors", "-o", "w.safetensors", "--overwrite", word="is read for it")
    refused(*CONVERT, "--checkpoint", "out/model.safetensors", "-o", "out", "--overwrite", word="is read for it")
    refused("convert", "--plan", "out/plan.json", "-o", "out", "--overwrite", word="is read for it")
    refused("report", "out/plan.json", "-o", "out/plan.json", "--overwrite", word="is read for it")
    refused("finetune", "out", "--data", "out", "-o", "out", "--overwrite", word="is read for it")
    assert snapshot(in_tmp) == before


def test_the_suffix_says_how_a_report_is_written(in_tmp):
    ok(*CONVERT, "-o", "m.safetensors")
    begins = {"html": "<!doctype html>", "json": "{", "csv": "name,", "md": "#", "txt": "test_resnet"}
    for suffix, text in begins.items():
        ok("report", "m.safetensors", "-o", f"r.{suffix}")
        assert (in_tmp / f"r.{suffix}").read_text().lower().lstrip().startswith(text), suffix
    assert ok("report", "m.safetensors", "--json").stdout == ok("report", "m.safetensors", "-f", "json").stdout
    refused("report", "m.safetensors", "-o", "r.pdf", word=".html")
    refused("report", "m.safetensors", "-o", "r.json", "-f", "html", "--overwrite", word="--format")


EARLY = [
    ("convert", "resnet51"),
    ("convert", "test_resnet", "-r", "aa-resnt"),
    ("convert", "test_resnet", "-o", "there.safetensors"),
    ("convert", "test_resnet", "-o", "m.pth"),
    ("convert", "test_resnet", "--checkpoint", "none.pth"),
    ("convert", "test_resnet", "--init", "fit", "--calibrate", "none"),
    ("convert", "--plan", "none.json"),
    ("plan", "resnet51"),
    ("plan", "local-dir:none"),
    ("finetune", "resnet51", "--data", ".", "-o", "o"),
    ("finetune", "none.safetensors", "--data", ".", "-o", "o"),
    ("finetune", "test_resnet", "--data", "none", "-o", "o"),
    ("finetune", "test_resnet", "--data", ".", "-o", "there.safetensors"),
    ("finetune", "test_resnet", "--data", ".", "-o", "o", "--teacher", "resnet51"),
    ("evaluate", "resnet51", "--data", "."),
    ("evaluate", "test_resnet", "--data", "none"),
]


def test_what_can_be_known_at_once_fails_before_torch_is_imported(in_tmp):
    (in_tmp / "there.safetensors").write_text("")
    code = (
        "import sys; from typer.testing import CliRunner; from augment_cli.cli import app\n"
        f"for arguments in {EARLY!r}:\n"
        "    result = CliRunner().invoke(app, arguments)\n"
        "    assert result.exit_code == 2, (arguments, result.output)\n"
        "    assert result.stderr.startswith('error: '), (arguments, result.stderr)\n"
        "    assert not {'torch', 'timm'} & sys.modules.keys(), arguments\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=in_tmp)
    assert done.returncode == 0, done.stderr


def test_a_name_that_the_table_lacks_is_looked_for_in_timm(monkeypatch):
    from augment_cli import specs
    from augment_cli.analysis import support
    from augment_cli.errors import AugmentError

    monkeypatch.setattr(support, "model_names", lambda: ("resnet18",))
    specs.check_name("resnet50.a1_in1k")
    specs.check_name("tv_resnet50")  # a name of timm's from before there were tags
    specs.check_name("hf-hub:timm/none")
    with pytest.raises(AugmentError, match="did you mean resnet18"):
        specs.check_name("resnet1")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(folder / f"{i}.png")
    return tmp_path / "pictures"


def started(*arguments: str | Path, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "augment_cli", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        *(command,),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=folder,
        start_new_session=True,
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)],
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_ends_a_conversion_and_leaves_nothing(in_tmp, name):
    process = started("convert", "resnet18", "-o", "out", folder=in_tmp)
    assert "convolutions" in process.stderr.readline()
    process.send_signal(getattr(signal, name))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + getattr(signal, name)
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_to_all_processes_of_a_run_leaves_a_checkpoint(tmp_path, pictures, name):
    """As a terminal, `timeout` and batch systems send it, worker processes included."""
    options = ("--data", pictures, "-o", "run", "-e", "99", "-b", "4", "-j", "2", "--cpu", "--img-size", "32")
    process = started("finetune", "test_resnet", *options, folder=tmp_path)
    lines = []
    while not lines or not lines[-1].startswith("epoch 1/"):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    os.killpg(process.pid, getattr(signal, name))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + getattr(signal, name), stderr
    assert [line for line in stderr.splitlines() if "epoch" not in line] == ["interrupted; --resume run goes on"]
    state = (tmp_path / "run/state.safetensors").stat()
    assert state.st_mtime >= (tmp_path / "run/summary.csv").stat().st_mtime
    assert not list((tmp_path / "run").glob(".*"))


def test_a_full_disk_in_a_plain_run_is_no_traceback(tmp_path, pictures):
    options = ("--data", pictures, "-o", "run", "-e", "1", "-b", "4", "-j", "0", "--cpu", "--img-size", "32")
    command = [sys.executable, "-m", "augment_cli", "finetune", "test_resnet", *map(str, options)]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)),
    )
    assert result.returncode == 2, result.stderr
    assert "error: run/last cannot be written: File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "run").glob(".*"))


def test_a_link_is_followed_by_convert(in_tmp):
    (in_tmp / "elsewhere").mkdir()
    (in_tmp / "m.safetensors").symlink_to("elsewhere/m.safetensors")
    ok(*CONVERT, "-o", "m.safetensors")
    assert (in_tmp / "m.safetensors").is_symlink()
    assert torch.is_tensor(next(iter(timm.models.load_state_dict("elsewhere/m.safetensors").values())))
