"""Start a fine-tuning run in a folder, or go on with the one that is there."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from augment_cli.errors import AugmentError
from augment_cli.files import check_output, write_file
from augment_cli.training import state
from augment_cli.training.engine import describe_saved, save_state, train
from augment_cli.training.history import best_row
from augment_cli.training.models import write_trained
from augment_cli.training.progress import Reporter
from augment_cli.training.run import Run, prepare, read_saved
from augment_cli.training.settings import Settings

SETTINGS = "settings.json"
_WRITTEN = (state.FILE, SETTINGS, "summary.csv", "curves.png", "corrupt.txt", "best", "last")


def finetune(settings: Settings, *, resume: bool = False, overwrite: bool = False) -> None:
    """Train by the settings, in their output folder.

    The folder gets `best` and `last`, models as `augment_cli.load` and timm read them; `summary.csv` and `curves.png`;
    `settings.json`; and `state.safetensors`, the checkpoint to resume from. It is complete from the start on: a run can
    be killed at any time and resumed.

    Args:
        resume: go on from the checkpoint in the folder, which the same settings wrote.
        overwrite: replace a run that is there.

    Raises:
        AugmentError: anything that the user can put right; what was written before stays.
    """
    folder = Path(settings.output)
    saved = read_saved(folder / state.FILE) if resume else None
    if not resume:
        _check_free(folder, overwrite)
    accelerator = make_accelerator(settings)
    with Reporter(silent=not accelerator.is_main_process) as reporter:
        run = prepare(settings, accelerator, saved)
        _describe(run, reporter, resume)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _clear(folder, everything=not resume)
        if not resume:
            _begin(run)
        if settings.tensorboard:
            accelerator.init_trackers("tensorboard")
        train(run, reporter)
        best = best_row(run.history)
        reporter.say(f"best: epoch {best['epoch']}, top-1 {best['val_top1']:.2f}%; wrote {folder}")
    accelerator.end_training()


def make_accelerator(settings: Settings) -> Accelerator:
    """Device, precision, accumulation and processes, as accelerate finds them.

    Raises:
        AugmentError: a precision that the device does not have, or TensorBoard that is not installed.
    """
    if settings.tensorboard:
        _need_tensorboard()
    try:
        return Accelerator(
            cpu=settings.cpu,
            mixed_precision=settings.precision,
            gradient_accumulation_steps=settings.accumulate,
            step_scheduler_with_optimizer=False,
            log_with="tensorboard" if settings.tensorboard else None,
            project_dir=settings.output,
        )
    except ValueError as error:
        raise AugmentError(f"--precision {settings.precision}: {error}") from error


def _need_tensorboard() -> None:
    if not find_spec("tensorboard"):
        raise AugmentError("--tensorboard: the package is not installed; pip install 'augment-cli[tensorboard]'")


def _check_free(folder: Path, overwrite: bool) -> None:
    """Refuse a folder with something in it, before any work is done.

    Raises:
        AugmentError: a run is there, or other files are, or the folder cannot be made.
    """
    if folder.is_file():
        raise AugmentError(f"{folder} is a file: --output names a folder")
    if (folder / state.FILE).exists() and not overwrite:
        raise AugmentError(f"{folder} holds a run: --resume {folder} goes on with it, --overwrite starts anew")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise AugmentError(f"{folder} is not empty: give another --output, or --overwrite")
    check_output(folder, overwrite=True)


def _clear(folder: Path, everything: bool) -> None:
    """Remove what a killed process left half-written, and with `everything`, an earlier run's files; no others."""
    names = _WRITTEN if everything else ()
    for path in [folder / name for name in names] + [p for name in _WRITTEN for p in folder.glob(f".{name}.*.tmp")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _begin(run: Run) -> None:
    """The folder as it is before the first batch: from now on, the run can be resumed."""
    if run.accelerator.is_main_process:
        run.folder.mkdir(exist_ok=True)
        text = run.settings.to_json() + "\n"
        write_file(run.folder / SETTINGS, lambda path: path.write_text(text, encoding="utf-8"))
        write_trained(run.trained, run.opened, run.folder / "last")
    save_state(run)


def _describe(run: Run, reporter: Reporter, resume: bool) -> None:
    """What is trained on what, and how fast each part learns."""
    settings, splits, processes = run.settings, run.splits, run.accelerator.num_processes
    images = settings.batch_size * settings.accumulate * processes
    reporter.say(
        f"{run.opened.name}, {run.opened.num_classes} classes: {len(splits.train):,} images to train on, "
        f"{len(splits.val):,} to validate; {images} an update, {run.accelerator.device.type}"
        f"{f', {processes} processes' if processes > 1 else ''}"
    )
    if run.opened.weights:
        reporter.say(f"source weights: {run.opened.weights}")
    reporter.say("learning rates: " + "; ".join(_rates(run)))
    if resume:
        done = run.epoch >= settings.epochs
        reporter.say("all epochs are done" if done else f"going on from {describe_saved(run).rstrip(',')}")


def _rates(run: Run) -> list[str]:
    """For each provenance that there is, its learning rate and parameters."""
    counts: dict[str, int] = {}
    for name, parameter in run.opened.model.named_parameters():
        counts[run.kinds[name]] = counts.get(run.kinds[name], 0) + parameter.numel()
    rate_of: dict[str, Any] = {kind: run.settings.lr * getattr(run.settings, f"lr_{kind}") for kind in counts}
    return [f"{rate_of[kind]:g} for {counts[kind]:,} {kind} parameters" for kind in sorted(counts)]
