"""What attention in a detector's backbone is worth, and what it costs.

    python benchmarks/detection.py precision [--images 400 100] [--epochs 30] [--seeds 0 1 2] [--rows plain AA AW]
    python benchmarks/detection.py cost [--rounds 5] [--size 800 1344] [--training]

`precision` draws a data set in COCO's format: discs, squares and triangles, which can be told where they are, and
diamonds, which are of class "north" or "south" by the colour of a legend in the image's corner; few are near it. It
trains a RetinaNet from scratch with every row's backbone under the same settings, and writes AP by pycocotools.
`cost` measures time and memory of a ResNet-50 backbone at a detector's size. Results are kept in benchmarks/results/;
runs that are there already are not run again. Data and runs are in out/detection/.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from measure import RESULTS, interleaved, machine, peak_mib, quartiles, ratios, write_results
from PIL import Image, ImageDraw

import augment_cli as augment

OUT = Path(__file__).parent.parent / "out" / "detection"

SIDE = 128
CLASSES = ("disc", "square", "triangle", "north", "south")
LEGENDS = {"north": (230, 30, 30), "south": (30, 60, 230)}
BACKBONE = "resnet10t"

# AA within the plain backbone's parameters; AW adds to them, and has no split that adds none.
ROWS = {"plain": None, "AA": ("aa", "budget.params=keep"), "AW": ("aw",)}

BACKBONES = {
    "plain": lambda size: timm.create_model("resnet50"),
    "AA": lambda size: augment.convert("resnet50", "aa-retinanet", input_size=size),
    "AW": lambda size: augment.convert("resnet50", "aw-faster-rcnn", input_size=size),
    "BottleneckAttn": lambda size: timm.create_model("botnet50ts_256", img_size=size),
}
"""Of `cost`, by the size of the image. BottleneckAttn takes 13 GiB for one image of 800x1344 without gradients."""

SETTINGS = (
    *("--detector", "retinanet", "--norm", "batch", "--channels", "64", "--anchor-base", "24", "--img-size", str(SIDE)),
    *("--scales", "1,1", "--flip", "0.5", "-b", "8", "--lr", "2e-3", "--lr-carried", "1", "--weight-decay", "1e-4"),
    *("-j", "0", "--cpu"),
)
"""Of every run. The legend stays where it is, so that images are not cropped; flips move it with everything else."""


def draw_image(random: np.random.Generator) -> tuple[Image.Image, list[tuple[str, list[int]]]]:
    """An image, and class and box (left, top, width, height) of each of its objects."""
    picture = Image.fromarray(random.integers(90, 150, (SIDE, SIDE, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(picture)
    told = str(random.choice(list(LEGENDS)))
    pen.rectangle((2, 2, 13, 13), fill=LEGENDS[told])
    found: list[tuple[str, list[int]]] = []
    for _ in range(40):
        if len(found) == 5:
            break
        name = str(random.choice(["disc", "square", "triangle", "diamond", "diamond"]))
        side = int(random.integers(14, 40))
        left, top = (int(random.integers(0, SIDE - side)) for _ in range(2))
        near = max(left + side, top + side) < SIDE // 2 if name != "diamond" else max(left, top) < SIDE // 2
        if near or any(_overlap((left, top, side, side), box) for _, box in found) or (left < 20 and top < 20):
            continue
        fill = tuple(int(value) for value in random.integers(0, 256, 3))
        _draw(pen, name, left, top, side, fill)
        found.append((told if name == "diamond" else name, [left, top, side, side]))
    return picture, found


def _overlap(a: tuple[int, ...], b: list[int]) -> bool:
    return all(a[i] < b[i] + b[i + 2] and b[i] < a[i] + a[i + 2] for i in range(2))


def _draw(pen: ImageDraw.ImageDraw, name: str, left: int, top: int, side: int, fill: tuple[int, ...]) -> None:
    right, bottom, x, y = left + side, top + side, left + side / 2, top + side / 2
    if name == "disc":
        pen.ellipse((left, top, right, bottom), fill=fill, outline="white")
    elif name == "square":
        pen.rectangle((left, top, right, bottom), fill=fill, outline="white")
    elif name == "triangle":
        pen.polygon([(x, top), (right, bottom), (left, bottom)], fill=fill, outline="white")
    else:
        pen.polygon([(x, top), (right, y), (x, bottom), (left, y)], fill=fill, outline="white")


def draw_data(train: int, val: int) -> Path:
    """The data set's folder; drawn once."""
    folder = OUT / f"data-{train}-{val}"
    if (folder / "annotations").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    files = {}
    for seed, (name, count) in enumerate({"train": train, "val": val}.items()):
        random = np.random.default_rng(seed)
        (folder / name).mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(count):
            picture, found = draw_image(random)
            picture.save(folder / name / f"{i:04}.png")
            images.append({"id": i, "file_name": f"{i:04}.png", "width": SIDE, "height": SIDE})
            for what, box in found:
                entry = {"image_id": i, "category_id": CLASSES.index(what) + 1, "bbox": box, "area": box[2] * box[3]}
                annotations.append({"id": len(annotations) + 1, "iscrowd": 0, **entry})
        categories = [{"id": i + 1, "name": what} for i, what in enumerate(CLASSES)]
        files[name] = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations").mkdir()
    for name, content in files.items():
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return folder


def run_one(row: str, seed: int, data: Path, epochs: int) -> dict[str, Any]:
    """Train and evaluate one row with one seed."""
    folder = OUT / f"{data.name}-{epochs}" / f"{row}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    recipe, model = ROWS[row], BACKBONE
    if recipe is not None:
        model = str(folder / "backbone.safetensors")
        name, *overrides = recipe
        augment.save(augment.convert(BACKBONE, name, *overrides, input_size=SIDE, seed=seed), model, overwrite=True)
    if not (folder / "run" / "state.safetensors").exists():
        _augment(
            "detect", "finetune", model, "-d", data, "-o", folder / "run", "--seed", seed, "--epochs", epochs, *SETTINGS
        )
    else:
        _augment("detect", "finetune", "--resume", folder / "run")
    scored = _augment(
        "detect", "evaluate", folder / "run" / "last.safetensors", "-d", data, "--cpu", "-j", "0", "--json"
    )
    boxes = json.loads(scored)["boxes"]
    return {
        "row": row,
        "seed": seed,
        "AP": boxes["AP"],
        "AP50": boxes["AP50"],
        "told near": statistics.mean(boxes["classes"][name] for name in CLASSES[:3]),
        "told far": statistics.mean(boxes["classes"][name] for name in CLASSES[3:]),
        "parameters": sum(p.numel() for p in augment.load(folder / "run" / "last.safetensors").parameters()),
    }


def _augment(*arguments: object) -> str:
    command = [sys.executable, "-m", "augment_cli", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return done.stdout


def precision(images: tuple[int, int], epochs: int, seeds: list[int], rows: list[str], jobs: int) -> None:
    data, setting = draw_data(*images), {"images": list(images), "epochs": epochs}
    file = RESULTS / "detection.json"
    kept = json.loads(file.read_text())["runs"] if file.exists() else []
    known = {(run["row"], run["seed"]) for run in kept if run["setting"] == setting}
    wanted = [(row, seed) for seed in seeds for row in rows if (row, seed) not in known]
    with ThreadPoolExecutor(jobs) as pool:
        for found in pool.map(lambda job: run_one(*job, data, epochs), wanted):
            kept.append(found | {"setting": setting})
            write_results("detection", {"machine": machine(), "backbone": BACKBONE, "settings": SETTINGS, "runs": kept})
    keys = ("AP", "AP50", "told near", "told far")
    print("row".ljust(8), *(key.rjust(16) for key in keys), "parameters".rjust(12))
    for row in rows:
        runs = [run for run in kept if (run["row"], run["setting"]) == (row, setting)]
        cells = [_spread([run[key] for run in runs]) for key in keys]
        print(row.ljust(8), *(cell.rjust(16) for cell in cells), f"{runs[0]['parameters']:,}".rjust(12))


def _spread(values: list[float]) -> str:
    deviation = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def cost(rounds: int, size: tuple[int, int], training: bool, threads: int, names: list[str]) -> None:
    """Time and peak memory of a ResNet-50 backbone: plain, AA, AW, and timm's botnet50ts with exact attention.

    Forward in eval mode without gradients, or forward and backward in train mode, of one image.
    """
    torch.set_num_threads(threads)
    models = {name: BACKBONES[name](size) for name in names}
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    calls = {name: _call(model.train(training), images, training) for name, model in models.items()}
    seconds = interleaved(calls, rounds, lambda: None)
    results = {
        name: {
            "seconds": quartiles(seconds[name]),
            "ratio": ratios(seconds[name], seconds["plain"]),
            "peak MiB": peak_mib(calls[name]),
        }
        for name in models
    }
    name = f"detection-cost-{'training' if training else 'inference'}"
    write_results(name, {"machine": machine(), "threads": threads, "size": size, "models": results})
    for name, found in results.items():
        print(
            name.ljust(16),
            f"{found['seconds']['median']:.3f} s, {found['ratio']['median']:.2f}x,",
            found["peak MiB"],
            "MiB",
        )


def _call(model: torch.nn.Module, images: torch.Tensor, training: bool) -> Any:
    def call() -> None:
        with torch.set_grad_enabled(training):
            features = model.forward_features(images)
            if training:
                features.sum().backward()
                model.zero_grad(set_to_none=True)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("precision")
    first.add_argument("--images", type=int, nargs=2, default=(400, 100))
    first.add_argument("--epochs", type=int, default=30)
    first.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    first.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    first.add_argument("--jobs", type=int, default=1)
    second = commands.add_parser("cost")
    second.add_argument("--rounds", type=int, default=5)
    second.add_argument("--size", type=int, nargs=2, default=(800, 1344))
    second.add_argument("--training", action="store_true")
    second.add_argument("--threads", type=int, default=1)
    second.add_argument("--models", nargs="+", default=list(BACKBONES), choices=list(BACKBONES))
    asked = parser.parse_args()
    if asked.command == "precision":
        precision(tuple(asked.images), asked.epochs, asked.seeds, asked.rows, asked.jobs)
    else:
        cost(asked.rounds, tuple(asked.size), asked.training, asked.threads, asked.models)


if __name__ == "__main__":
    main()
