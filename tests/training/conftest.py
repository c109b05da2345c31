"""Small labelled images, a small converted model, and short runs on them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from augment_cli.cli import app
from augment_cli.training.settings import Settings

collect_ignore = ["timm_scripts"]  # they run as they are imported

CLASSES = ("blue", "green", "red")


def write_images(folder: Path, per_class: int, seed: int) -> None:
    """Noisy 40 x 36 images whose class is their colour."""
    noise = np.random.default_rng(seed)
    for channel, name in enumerate(reversed(CLASSES)):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = noise.integers(0, 120, (36, 40, 3), dtype=np.uint8)
            pixels[..., channel] += 90
            Image.fromarray(pixels).save(folder / name / f"{i:03}.png")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 36 images to train on and 12 to validate, of three classes."""
    folder = tmp_path_factory.mktemp("data") / "colours"
    write_images(folder / "train", per_class=12, seed=0)
    write_images(folder / "val", per_class=4, seed=1)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model of 1,000 classes for images of 32 x 32, whose source came from a file."""
    folder = tmp_path_factory.mktemp("model")
    path, source = folder / "aa", folder / "source.safetensors"
    torch.manual_seed(0)  # else the weights depend on which tests ran before
    save_file(timm.create_model("test_resnet").state_dict(), source)
    arguments = ["convert", "test_resnet", "--checkpoint", str(source), "--img-size", "32", "-o", str(path)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    return path


def short(model: Path | str, images: Path | str, output: Path | str, **changes) -> Settings:
    """Two epochs of four updates, in a second."""
    values = {"epochs": 2, "batch_size": 8, "workers": 0, "cpu": True, "warmup_epochs": 0.0, **changes}
    return Settings(model=str(model), data=str(images), output=str(output), **values)


def in_process(settings: Settings, *flags: str, before: str = "") -> subprocess.CompletedProcess:
    """The command line with these settings in a process of its own, after the statements `before`."""
    code = f"import json, sys\nfrom augment_cli.training.settings import Settings\n{before}\n" + (
        "from augment_cli.training.finetune import finetune\nimport torch\ntorch.set_num_threads(1)\n"
        f"finetune(Settings(**json.loads({settings.to_json()!r})), **{dict.fromkeys(flags, True)!r})"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


def weights(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name / "model.safetensors").read_bytes() for name in ("best", "last")}


def summary(folder: Path) -> list[list[str]]:
    """The rows of summary.csv but for the seconds that they took."""
    return [line.split(",")[:-1] for line in (folder / "summary.csv").read_text().splitlines()]


@pytest.fixture
def command() -> Callable:
    """Runs the command line in this process."""
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def configuration(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())
