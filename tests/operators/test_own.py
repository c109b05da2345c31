"""An operator in a file of its own goes through everything: the proof that nothing else has to know it."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "operator"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The example as pip installs it: its module, and its entry points beside it."""
    folder = tmp_path_factory.mktemp("site-packages")
    shutil.copy(EXAMPLE / "squeeze.py", folder)
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    metadata = folder / "augment_squeeze-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in entries.items()) for group, entries in groups]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory):
    """Runs a command of the command line, or Python code, in a process that has the operator."""
    folder = tmp_path_factory.mktemp("run")

    def run(*arguments: str, code: str = "", expected: int = 0) -> subprocess.CompletedProcess:
        command = ["-c", code] if code else ["-m", "augment_cli", *arguments]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), *sys.path])}
        done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
        return done

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def converted(run) -> Path:
    run(
        "convert",
        "test_resnet",
        "-r",
        str(EXAMPLE / "squeeze.toml"),
        "--img-size",
        "48",
        "-a",
        "num_classes=3",
        "-o",
        "out",
    )
    return run.folder / "out"


def test_a_plan_with_a_budget(run):
    plan = json.loads(run("plan", "test_resnet", "-r", str(EXAMPLE / "squeeze.toml"), "--json").stdout)
    assert {site["operator"] for site in plan["sites"]} == {"se"}
    assert plan["params_before"] < plan["params_after"] <= 1.01 * plan["params_before"]
    assert (
        "A larger se.reduction"
        in run(
            "plan", "test_resnet", "-r", str(EXAMPLE / "squeeze.toml"), "--set", "budget.params=keep", expected=2
        ).stderr
    )


def test_the_file_holds_what_its_plan_says(run, converted):
    assert "parameters" in run("check", str(converted)).stdout + run("check", str(converted)).stderr


@pytest.mark.parametrize("form", ["json", "csv", "markdown", "html", "table"])
def test_every_report_tells_the_split(run, converted, form):
    text = run("report", str(converted), "--format", form).stdout
    assert "idden" in text
    assert "SE" in text or form in ("json", "csv", "markdown")


def test_loaded_by_us_and_by_timm_it_computes_what_its_source_does(run, converted):
    run(
        code=(
            "import augment_cli, timm, torch\n"
            f"ours, timms = augment_cli.load({str(converted)!r}), "
            f"timm.create_model('local-dir:{converted}', pretrained=True)\n"
            "source = timm.create_model('test_resnet', num_classes=3)\n"
            "state = {k.replace('.conv.weight', '.weight'): v for k, v in ours.state_dict().items()}\n"
            "source.load_state_dict({k: v for k, v in state.items() if k in source.state_dict()})\n"
            "x = torch.randn(2, 3, 48, 48)\n"
            "outputs = [m.eval()(x) for m in (ours, timms, source)]\n"
            "assert all(torch.equal(out, outputs[0]) for out in outputs[1:])\n"
            "assert type(ours.layer1[0].conv1).__name__ == 'SqueezedConv2d'\n"
        )
    )


def test_it_is_fine_tuned_with_rates_of_its_own(run, converted):
    from PIL import Image

    for split in ("train", "validation"):
        for label in "abc":
            folder = run.folder / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (48, 48), (80 * "abc".index(label), 20 * i, 99)).save(folder / f"{i}.png")
    arguments = ("--data", "data", "--epochs", "1", "-b", "4", "-j", "0", "--cpu", "--lr-new", "2", "-o", "tuned")
    run("finetune", str(converted), *arguments)
    assert "parameters" in run("check", "tuned/last").stdout + run("check", "tuned/last").stderr


def test_without_its_package_the_file_is_refused_by_the_operators_name(converted):
    done = subprocess.run(
        [sys.executable, "-m", "augment_cli", "check", str(converted)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no operator named se" in done.stderr
