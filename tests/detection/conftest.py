"""A small generated data set in COCO's format, and short runs on it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

import augment_cli as augment
from augment_cli.detection.run_settings import DetectionSettings

# Ids with gaps, in no order.
CATEGORIES = [{"id": 7, "name": "square"}, {"id": 3, "name": "disc"}]


def draw_split(folder: Path, name: str, count: int, seed: int) -> dict[str, Any]:
    """Images of 64 x 80 pixels with up to three discs and squares; every fourth image has none."""
    noise = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        picture = Image.fromarray(noise.integers(0, 60, (64, 80, 3), dtype=np.uint8))
        pen = ImageDraw.Draw(picture)
        for _ in range(int(noise.integers(1, 4)) if i % 4 else 0):
            side = int(noise.integers(12, 32))
            left, top = int(noise.integers(0, 80 - side)), int(noise.integers(0, 64 - side))
            category = int(noise.choice([3, 7]))
            shape = pen.ellipse if category == 3 else pen.rectangle
            shape((left, top, left + side, top + side), fill=(220, 60, 40) if category == 3 else (60, 80, 230))
            corners = [left, top, left + side, top, left + side, top + side, left, top + side]
            entry = {"bbox": [left, top, side, side], "area": side * side, "iscrowd": 0, "segmentation": [corners]}
            annotations.append({"id": len(annotations) + 1, "image_id": 10 * i, "category_id": category, **entry})
        picture.save(folder / name / f"{i:03}.png")
        images.append({"id": 10 * i, "file_name": f"{i:03}.png", "width": 80, "height": 64})
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def write_split(folder: Path, name: str, data: Any) -> Path:
    file = folder / "annotations" / f"instances_{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(data), encoding="utf-8")
    return file


def make_data(folder: Path, train: int = 12, val: int = 6) -> Path:
    for seed, (name, count) in enumerate((("train2017", train), ("val2017", val))):
        write_split(folder, name, draw_split(folder, name, count, seed))
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model's file. Its source has other than random weights, as far as provenance goes."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), folder / "source.safetensors")
    model = augment.convert("test_resnet", "aa", checkpoint=folder / "source.safetensors", input_size=64)
    augment.save(model, folder / "aa.safetensors")
    return folder / "aa.safetensors"


def short(model: Path | str, data: Path, output: Path, **changes: Any) -> DetectionSettings:
    """Two epochs of three updates on 64 pixels."""
    values: dict[str, Any] = {"detector": "retinanet", "levels": (1, 2, 3), "norm": "batch", "img_size": (64, 96)}
    values |= {"epochs": 2, "batch_size": 4, "workers": 0, "cpu": True, "warmup_epochs": 0.0, "crop_scale": 0.5}
    return DetectionSettings(model=str(model), data=str(data), output=str(output), **(values | changes))


def in_process(settings: DetectionSettings, before: str = "") -> subprocess.CompletedProcess:
    """A run with these settings in a process of its own, after the statements `before`."""
    code = f"{before}\nimport json, torch\ntorch.set_num_threads(1)\n" + (
        "from augment_cli.detection.assess import finetune\n"
        "from augment_cli.detection.run_settings import DetectionSettings\n"
        "from augment_cli.training.settings import settings_of\n"
        f"finetune(settings_of(json.loads({settings.to_json()!r}), 'test', DetectionSettings))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


def weights(folder: Path) -> dict[str, bytes]:
    return {name: (folder / f"{name}.safetensors").read_bytes() for name in ("best", "last")}


def summary(folder: Path) -> list[list[str]]:
    """The rows of summary.csv but for the seconds that they took."""
    return [line.split(",")[:-1] for line in (folder / "summary.csv").read_text().splitlines()]
