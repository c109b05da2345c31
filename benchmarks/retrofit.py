"""Accuracy of retrofits after fine-tuning, by the command line and its defaults, on three tasks.

    python benchmarks/retrofit.py [--tasks recall odd digits] [--rows ...] [--seeds 0 1 2] [--epochs 6] [--jobs 2]

Per task a source is trained until its curve is flat (SCHEDULES), converted in several ways within its own parameter
count, and each conversion, like the source itself, is fine-tuned for the same number of epochs. tasks.py says what the
tasks are. Rows that name a rate are the grid of learning rates; all others use the defaults.
Results are kept in benchmarks/results/retrofit.json; chains of commands that are there already are not run again, so
that the table grows with every call. Data and models are kept in out/retrofit/.
"""

import argparse
import csv
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tasks
import timm
import torch
from measure import RESULTS, machine, write_results
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
OUT = ROOT / "out" / "retrofit"


SCHEDULES = {"recall": ((12, 2e-3), (6, 1e-3)), "odd": ((8, 2e-3),), "digits": ((12, 2e-3),)}
"""Epochs and learning rates of a source's training, one run after the other."""


@dataclass(frozen=True)
class Row:
    """A way to convert the source, and options for fine-tuning. Without a recipe, the source itself is trained on."""

    recipe: str | None = None
    fit: bool = False
    uniform: bool = False
    squeeze: bool = False
    tuning: tuple[str, ...] = ()


ROWS = {
    "source": Row(),
    "SE": Row(squeeze=True),
    "AW": Row("aw"),
    "AA, uniform": Row("aa", uniform=True),
    "AA, carried": Row("aa"),
    "AA, fitted": Row("aa", fit=True),
    "AA+AW, carried": Row("aa-aw"),
    "AA+AW, fitted": Row("aa-aw", fit=True),
    **{
        f"AA, fitted, {name} rate x {rate}": Row("aa", fit=True, tuning=(f"--lr-{name}", rate))
        for name, rate in (("fitted", "1"), ("fitted", "5"), ("fitted", "20"), ("carried", "0.3"), ("carried", "0.1"))
    },
}
MAIN = [name for name, row in ROWS.items() if not row.tuning]


@dataclass(frozen=True)
class Setup:
    """Settings that all chains of a table share."""

    model: str
    epochs: int

    @property
    def key(self) -> str:
        return f"{self.model}-{self.epochs}"


def common(task: str) -> tuple[str, ...]:
    size = str(tasks.SIDE)
    return ("--data", str(OUT / "data" / task), "--img-size", size, "-j", "0", "--cpu")


def run(*arguments: str) -> str:
    """Run a command of augment-cli on one thread and return its stdout; ends the benchmark where the command fails."""
    command = [sys.executable, "-m", "augment_cli", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"augment {shlex.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def curve(folder: Path) -> list[float]:
    """Top-1 on the validation images after every epoch, percent."""
    with (folder / "summary.csv").open() as file:
        return [round(float(row["val_top1"]), 2) for row in csv.DictReader(file)]


def finetuned(folder: Path, model: str, *arguments: str) -> list[float]:
    """Fine-tune, unless the folder holds the finished run; the validation curve."""
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        run("finetune", model, *arguments, "-o", str(folder))
        (folder / "done").touch()
    return curve(folder)


def source_of(task: str, setup: Setup) -> tuple[Path, list[float]]:
    """The trained source's folder, and its curve."""
    tasks.write(task, OUT / "data" / task)
    model, found = setup.model, []
    for number, (epochs, rate) in enumerate(SCHEDULES[task]):
        folder = OUT / f"{task}-{setup.model}-source-{number}"
        found += finetuned(folder, model, "--epochs", str(epochs), "--lr", str(rate), *common(task))
        model = str(folder / "last")
    return Path(model), found


def chain(task: str, name: str, seed: int, setup: Setup) -> dict[str, Any]:
    """Convert by a row, compare with the source, fine-tune."""
    row, (source, _) = ROWS[name], source_of(task, setup)
    folder = OUT / f"{task}-{setup.key}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    model, options, found = str(source), (), {}
    if row.recipe:
        model = f"{folder}.safetensors"
        found = converted(task, row, seed, source, Path(model))
    if row.squeeze:
        weights = folder.with_suffix(".safetensors")
        found = {"params": squeezed(source, seed, weights)}
        model = setup.model
        classes = json.loads((source / "config.json").read_text())["num_classes"]
        options = (
            "--checkpoint",
            str(weights),
            "-a",
            'block_args={"attn_layer": "se"}',
            "-a",
            f"num_classes={classes}",
        )
    tuning = ("--epochs", str(setup.epochs), "--seed", str(seed), *row.tuning, *options, *common(task))
    found["curve"] = finetuned(folder, model, *tuning)
    return {"task": task, "setup": setup.key, "row": name, "seed": seed, **found}


def converted(task: str, row: Row, seed: int, source: Path, model: Path) -> dict[str, Any]:
    config = json.loads((source / "config.json").read_text())
    classes = ("-a", f"num_classes={config['num_classes']}")
    options = ("--recipe", row.recipe, "--img-size", str(tasks.SIDE), "--seed", str(seed), *classes)
    if row.fit:
        options += ("--init", "fit", "--calibrate", str(OUT / "data" / task / "calibration"))
    weights = ("--checkpoint", str(source / "model.safetensors"), "--overwrite", "-o", str(model))
    run("convert", config["architecture"], *options, *weights)
    if row.uniform:
        hold_uniform(model)
    against = ("--against", str(source), "--json", "--data", str(OUT / "data" / task), "-j", "0", "--cpu")
    scores = json.loads(run("evaluate", str(model), *against))
    totals = json.loads(run("report", str(model), "--format", "json"))["totals"]["params"]
    return {"agreement": round(scores["agreement"], 2), "before": round(scores["top1"], 2), "params": totals["after"]}


def hold_uniform(file: Path) -> None:
    """Set queries, keys and tables of a file to zero: no gradient reaches them, and attention stays uniform."""
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for name, weight in tensors.items():
        if name.endswith(("rel_height", "rel_width")):
            weight.zero_()
        if name.endswith("qkv.weight"):
            values = len(tensors[name.replace("qkv", "proj")])
            weight[: len(weight) - values] = 0
    save_file(tensors, file, metadata)


def squeezed(source: Path, seed: int, file: Path) -> int:
    """Write a source's weights with squeeze-and-excitation added, its gates at 0.95; the number of parameters."""
    config = json.loads((source / "config.json").read_text())
    torch.manual_seed(seed)
    model = timm.create_model(
        config["architecture"], num_classes=config["num_classes"], block_args={"attn_layer": "se"}
    )
    missing = model.load_state_dict(load_file(source / "model.safetensors"), strict=False).missing_keys
    state = model.state_dict()
    for name in missing:
        if name.endswith("fc2.weight"):
            state[name].zero_()
        if name.endswith("fc2.bias"):
            state[name].fill_(3.0)
    save_file(state, file)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=tasks.TASKS, choices=tasks.TASKS)
    parser.add_argument("--rows", nargs="+", default=MAIN, choices=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    setup = Setup(asked.model, asked.epochs)
    results = known()
    with ThreadPoolExecutor(asked.jobs) as pool:
        chains = [(t, r, s) for s in asked.seeds for t in asked.tasks for r in asked.rows]
        missing = [c for c in chains if not has(results, setup, *c)]
        needed = [task for task in asked.tasks if any(c[0] == task for c in missing)]
        for task, made in zip(needed, pool.map(lambda t: source_of(t, setup), needed), strict=True):
            results["sources"][f"{task} {setup.model}"] = made[1]
        for done in as_completed([pool.submit(chain, *c, setup) for c in missing]):
            results["chains"].append(done.result())
            results["chains"].sort(key=lambda c: (c["setup"], tasks.TASKS.index(c["task"]), c["row"], c["seed"]))
            write_results("retrofit", results)
            print(describe(done.result()), flush=True)
    show(results, setup)


def known() -> dict[str, Any]:
    file = RESULTS / "retrofit.json"
    empty = {"machine": machine(), "sources": {}, "chains": []}
    return json.loads(file.read_text()) if file.exists() else empty


def has(results: dict[str, Any], setup: Setup, task: str, row: str, seed: int) -> bool:
    place = {"task": task, "setup": setup.key, "row": row, "seed": seed}
    return any(place.items() <= found.items() for found in results["chains"])


def describe(found: dict[str, Any]) -> str:
    return f"{found['task']:8s} {found['row']:16s} seed {found['seed']}: {found['curve']}"


def show(results: dict[str, Any], setup: Setup) -> None:
    """A Markdown table: agreement with the source before, accuracy after, by seed."""
    print("| task | row | parameters | agreement before | accuracy after, by seed | mean |\n|---|---|--:|--:|---|--:|")
    for task in tasks.TASKS:
        for row in ROWS:
            found = [c for c in results["chains"] if (c["setup"], c["task"], c["row"]) == (setup.key, task, row)]
            if found:
                after = [c["curve"][-1] for c in found]
                before = ", ".join(f"{c['agreement']:.1f}" for c in found if "agreement" in c) or "100"
                params = f"{found[0]['params']:,}" if "params" in found[0] else "the source's"
                shown = ", ".join(f"{value:.1f}" for value in after)
                print(f"| {task} | {row} | {params} | {before} | {shown} | {statistics.mean(after):.1f} |")


if __name__ == "__main__":
    main()
