"""Convert and fine-tune a small model on digits, and write docs/story.md, docs/story.json and docs/story.png.

    python docs/story.py               # as `make story`

Every step is a command of augment-cli, and is shown in docs/story.md. What a step gave is kept in out/story/, and a
story that was stopped goes on from there; remove that folder to begin anew, as after a change of the code.
"""

import csv
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from story_page import draw, markdown

from augment_cli.files import write_file

DOCS = Path(__file__).parent
ROOT = DOCS.parent
OUT = Path("out") / "story"
SEEDS = (0, 1, 2)
JOBS = 2

SIDE = 32
CALIBRATION_DIGITS, TRAINING_DIGITS = 256, 300
COPIES = {"train": 24, "validation": 1, "calibration": 2}

BATCH = 32
MODEL = ("test_resnet", "-a", "num_classes=10")
SIZE = ("--img-size", "64")
TRAINING = ("--data", f"{OUT}/digits", *SIZE, "--no-augmentation", "-j", "0", "--cpu", "-b", str(BATCH))
SOURCE_EPOCHS, EPOCHS = 4, 1


@dataclass(frozen=True)
class Conversion:
    """One way to convert the source."""

    name: str
    recipe: str
    fit: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        return ("--init", "fit", "--calibrate", f"{OUT}/digits/calibration") if self.fit else ()


CONVERSIONS = (
    Conversion("AW", "aw"),
    Conversion("AA, carried", "aa"),
    Conversion("AA, fitted", "aa", fit=True),
    Conversion("AA+AW, carried", "aa-aw"),
    Conversion("AA+AW, fitted", "aa-aw", fit=True),
)


# --- images ---


def write_digits() -> str:
    """Write the digits as class folders of PNGs, where they are not; returns the digest of all their bytes.

    The splits are made of different originals, so that no picture of a validated digit is trained or fitted on.
    """
    folder, mark = ROOT / OUT / "digits", ROOT / OUT / "digits.sha256"
    recipe = json.dumps([SIDE, CALIBRATION_DIGITS, TRAINING_DIGITS, COPIES])
    if mark.exists() and mark.read_text().startswith(recipe):
        return mark.read_text().removeprefix(recipe).strip()
    shutil.rmtree(folder, ignore_errors=True)
    digest = hashlib.sha256()
    for path, image in distorted_digits():
        digest.update(path.encode() + image.tobytes())
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / path)
    mark.write_text(f"{recipe}\n{digest.hexdigest()}\n")
    return digest.hexdigest()


def distorted_digits() -> Iterator[tuple[str, np.ndarray]]:
    """Paths below the data folder, and images (SIDE, SIDE) of bytes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    calibration, training, validation = np.split(order, np.cumsum([CALIBRATION_DIGITS, TRAINING_DIGITS]))
    for split, originals in (("train", training), ("validation", validation), ("calibration", calibration)):
        for original in sorted(originals.tolist()):
            for number in range(COPIES[split]):
                # The calibration images have no labels: one folder for all.
                label = "" if split == "calibration" else f"{digits.target[original]}/"
                drawn = np.random.default_rng((original, number))
                yield f"{split}/{label}{original:04}-{number:02}.png", distort(digits.images[original], drawn)


def distort(digit: np.ndarray, drawn: np.random.Generator) -> np.ndarray:
    """A digit (8, 8) from 0 to 16, enlarged, turned, moved, partly covered and noisy: (SIDE, SIDE) bytes."""
    side = int(drawn.integers(18, 29))
    small = Image.fromarray((digit * 255 / 16).astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)
    small = small.rotate(drawn.uniform(-15, 15), Image.Resampling.BILINEAR)
    picture = Image.new("L", (SIDE, SIDE))
    picture.paste(small, tuple(drawn.integers(0, SIDE - side + 1, 2).tolist()))
    pixels = np.asarray(picture, dtype=np.float64) * drawn.uniform(0.5, 1.0)
    top, left = drawn.integers(0, SIDE - 6, 2)
    pixels[top : top + 6, left : left + 6] = drawn.uniform(0, 255)
    return np.clip(pixels + drawn.normal(0, 30, pixels.shape), 0, 255).astype(np.uint8)


# --- steps ---


def augment(name: str, inputs: str, *arguments: str) -> dict[str, Any]:
    """Run a command of augment-cli, unless it was run on the same inputs before; returns its record.

    Args:
        name: of the record and the log.
        inputs: a digest of what the command reads.
    """
    record = ROOT / OUT / "steps" / f"{name}.json"
    key = hashlib.sha256(json.dumps([version("augment-cli"), inputs, arguments]).encode()).hexdigest()
    known = json.loads(record.read_text()) if record.exists() else {}
    begun = known.get("key") == key
    if begun and known["done"]:
        return known
    command = continued(arguments, begun)
    write_json(record, {"key": key, "done": False})
    started = time.monotonic()
    stdout = run(name, *command)
    step = {"key": key, "done": True, "command": arguments, "stdout": stdout, "seconds": time.monotonic() - started}
    write_json(record, step)
    say(f"{name}: {step['seconds']:.0f} s")
    return step


def continued(arguments: tuple[str, ...], begun: bool) -> tuple[str, ...]:
    """The command that goes on with what was begun, where it can be; otherwise its output is removed."""
    if "-o" not in arguments:
        return arguments
    output = arguments[arguments.index("-o") + 1]
    if arguments[0] == "finetune" and begun and (ROOT / output / "state.safetensors").exists():
        return "finetune", "--resume", output
    shutil.rmtree(ROOT / output, ignore_errors=True)
    return arguments


def run(name: str, *arguments: str) -> str:
    """Run a command and return its stdout; its messages go to a log. Ends the story where the command fails."""
    command = [sys.executable, "-m", "augment_cli", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (ROOT / OUT / "logs" / f"{name}.log").write_text(done.stderr)
    if done.returncode:
        raise SystemExit(f"{name} failed: augment {shlex.join(arguments)}\n{done.stderr[-2000:]}")
    return done.stdout


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def write_json(path: Path, value: Any) -> None:
    write_file(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def digest_of(*folders: str) -> str:
    return "".join(hashlib.sha256((ROOT / name / "model.safetensors").read_bytes()).hexdigest() for name in folders)


def last_accuracy(folder: str, images: str = "val") -> float:
    """Top-1 in percent on the training or validation images after the last epoch.

    The best epoch's would be chosen by the images that it is measured on.
    """
    with (ROOT / folder / "summary.csv").open() as file:
        return float(list(csv.DictReader(file))[-1][f"{images}_top1"])


# --- the story ---


def tell() -> dict[str, Any]:
    """All numbers and commands."""
    for folder in ("steps", "logs"):
        (ROOT / OUT / folder).mkdir(parents=True, exist_ok=True)
    data = write_digits()
    epochs = ("--epochs", str(SOURCE_EPOCHS), "--lr", "3e-3")
    trained = augment("source", data, "finetune", *MODEL, *TRAINING, *epochs, "-o", f"{OUT}/source")
    chains = follow_all(data)
    models = [summary(conversion, rows) for conversion, rows in chains.items()]
    models[0] |= {"params": models[1]["params_before"], "macs": models[1]["macs_before"]}
    return {
        "versions": {name: version(name) for name in ("augment-cli", "timm", "torch", "scikit-learn")},
        "images": {split: len(list((ROOT / OUT / "digits" / split).rglob("*.png"))) for split in COPIES},
        "settings": settings(),
        "source": {
            "command": trained["command"],
            "seconds": trained["seconds"],
            "trained": last_accuracy(f"{OUT}/source", "train"),
        },
        "models": models,
        "seconds": trained["seconds"] + sum(row["seconds"] for rows in chains.values() for row in rows),
    }


def settings() -> dict[str, Any]:
    return {
        "training_digits": TRAINING_DIGITS,
        "calibration_digits": CALIBRATION_DIGITS,
        "copies": COPIES,
        "seeds": SEEDS,
        "batch": BATCH,
        "source_epochs": SOURCE_EPOCHS,
        "epochs": EPOCHS,
        "model": MODEL[0],
        "side": SIDE,
        "size": int(SIZE[1]),
        "images": f"{OUT}/digits",
        "jobs": JOBS,
    }


def follow_all(data: str) -> dict[Conversion | None, list[dict[str, Any]]]:
    """Every model's chains, one a seed; None is the source itself."""
    models = (None, *CONVERSIONS)
    with ThreadPoolExecutor(JOBS) as pool:
        running = [(model, pool.submit(follow, data, model, seed)) for seed in SEEDS for model in models]
        try:
            told = [(model, chain.result()) for model, chain in running]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {model: [row for which, row in told if which is model] for model in models}


def follow(data: str, conversion: Conversion | None, seed: int) -> dict[str, Any]:
    """Convert with a seed, evaluate and fine-tune; without a conversion, fine-tune the source."""
    source = f"{OUT}/source/last"
    inputs = data + digest_of(source)
    if conversion is None:
        return {"before": last_accuracy(f"{OUT}/source"), "agreement": 100.0, **tune(inputs, source, "source", seed)}
    name = f"{conversion.recipe}{'-fit' if conversion.fit else ''}-{seed}"
    converted = f"{OUT}/{name}"
    weights = ("--recipe", conversion.recipe, "--checkpoint", f"{source}/model.safetensors", *SIZE, "--seed", str(seed))
    converting = augment(f"convert-{name}", inputs, "convert", *MODEL, *weights, *conversion.options, "-o", converted)
    inputs += digest_of(converted)
    evaluation = ("--against", source, "--data", f"{OUT}/digits", "-j", "0", "--cpu", "--json")
    evaluated = augment(f"evaluate-{name}", inputs, "evaluate", converted, *evaluation)
    scores = json.loads(evaluated["stdout"])
    return {
        "before": scores["top1"],
        "agreement": scores["agreement"],
        **totals(converted),
        **tune(inputs, converted, name.removesuffix(f"-{seed}"), seed, converting, evaluated),
    }


def totals(converted: str) -> dict[str, int]:
    report = json.loads(run("report", "report", converted, "--format", "json"))["totals"]
    kinds = {"": "after", "_before": "before"}
    return {f"{what}{suffix}": report[what][kind] for what in ("params", "macs") for suffix, kind in kinds.items()}


def tune(inputs: str, model: str, name: str, seed: int, *earlier: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune a model; the record of its whole chain."""
    output = f"{OUT}/{name}-{seed}-tuned"
    options = ("--epochs", str(EPOCHS), "--seed", str(seed), "-o", output)
    steps = [*earlier, augment(f"finetune-{name}-{seed}", inputs, "finetune", model, *TRAINING, *options)]
    commands, seconds = [step["command"] for step in steps], sum(step["seconds"] for step in steps)
    return {"after": last_accuracy(output), "commands": commands, "seconds": seconds}


def summary(conversion: Conversion | None, chains: list[dict[str, Any]]) -> dict[str, Any]:
    """A model's row: counts, and the values of all seeds."""
    counts = {key: value for key, value in chains[0].items() if key.startswith(("params", "macs"))}
    values = {key: [chain[key] for chain in chains] for key in ("agreement", "before", "after")}
    name = conversion.name if conversion else "source"
    return {
        "name": name,
        "recipe": conversion and conversion.recipe,
        **counts,
        **values,
        "commands": chains[0]["commands"],
    }


def main() -> None:
    story = tell()
    write_json(DOCS / "story.json", story)
    write_file(DOCS / "story.png", lambda temporary: draw(story, temporary))
    write_file(DOCS / "story.md", lambda temporary: temporary.write_text(markdown(story), encoding="utf-8"))
    say("wrote docs/story.md, docs/story.json, docs/story.png")


if __name__ == "__main__":
    main()
