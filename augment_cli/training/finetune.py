"""Start a fine-tuning run in a folder, or resume the one that is there."""

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from augment_cli.errors import AugmentError, OutOfMemory, out_of_memory
from augment_cli.files import write_file
from augment_cli.seeds import preserved
from augment_cli.signals import held
from augment_cli.training.accelerators import one_accelerator
from augment_cli.training.classification import Classification
from augment_cli.training.engine import describe_saved, save_state, train
from augment_cli.training.folder import SETTINGS, STATE, TRACKED, check_free, clear
from augment_cli.training.history import best_row
from augment_cli.training.progress import Reporter
from augment_cli.training.run import Run, prepare, read_saved
from augment_cli.training.settings import RunSettings
from augment_cli.training.task import Task


def finetune(
    settings: RunSettings, *, resume: bool = False, overwrite: bool = False, task: type[Task] = Classification
) -> None:
    """Fine-tune a model as the settings say; results go to their output folder.

    The folder gets `best` and `last`, models as `augment_cli.load` and timm read them; `summary.csv` and `curves.png`;
    `settings.json`; and `state.safetensors`, the checkpoint to resume from. All of it can be
    resumed from the first moment on: a run may be killed at any time.

    Args:
        resume: go on from the checkpoint in the folder. Settings outside `settings.fixed` may differ from before.
        overwrite: replace a run that is in the folder.
        task: what the model learns.

    Raises:
        AugmentError: bad settings, model, data or checkpoint. Files written before stay.
    """
    folder = Path(settings.output)
    saved = read_saved(folder / STATE, task) if resume else None
    if not resume:
        check_free(folder, overwrite, settings.inputs())
    for name in settings.log_with:
        if not find_spec(name):
            raise AugmentError(f"`log_with={name!r}`: the package is not installed; pip install {name}")
    try:
        with preserved(), one_accelerator(**_options(settings)) as made:
            _finetune(task, settings, made, saved)
    except Exception as error:
        if short := out_of_memory(error, f"training with {_sizes(settings)}", *_smaller(settings)):
            raise OutOfMemory(f"{short}{_kept(folder)}") from error
        raise


def _sizes(settings: RunSettings) -> str:
    """The settings that decide how much memory a run takes."""
    checkpointing = f"{'with' if settings.grad_checkpointing else 'without'} gradient checkpointing"
    return f"`batch_size={settings.batch_size}`, `precision={settings.precision!r}` and {checkpointing}"


def _smaller(settings: RunSettings) -> list[str]:
    """Settings that take less memory, those first that change least of what is learned."""
    ways = ["`precision='bf16'`"] if settings.precision == "no" else []
    ways += [] if settings.grad_checkpointing else ["`grad_checkpointing=True`"]
    if settings.batch_size > 1:
        batch = settings.batch_size // 2
        ways.append(f"`batch_size={batch}` with `accumulate={settings.accumulate * 2}`, as many images an update")
    return [*ways, "a smaller `img_size`"]


def _kept(folder: Path) -> str:
    if not (folder / STATE).exists():
        return ""
    return (
        f". {folder} keeps its last checkpoint: `resume=True` takes another precision and gradient checkpointing; "
        f"another batch size needs a new run"
    )


def _options(settings: RunSettings) -> dict[str, Any]:
    """accelerate's options: device, precision, accumulation and trackers. It finds other processes by itself."""
    return {
        "cpu": settings.cpu,
        "mixed_precision": settings.precision,
        "gradient_accumulation_steps": settings.accumulate,
        "step_scheduler_with_optimizer": False,
        "log_with": list(settings.log_with) or None,
        "project_dir": settings.output,
    }


def _finetune(task: type[Task], settings: RunSettings, made: Accelerator, saved: dict[str, Any] | None) -> None:
    folder = Path(settings.output)
    with Reporter(silent=not made.is_main_process) as reporter:
        run = prepare(task, settings, made, saved)
        _describe(run, reporter, resume=saved is not None)
        made.wait_for_everyone()
        with held():
            _begin(run, new=saved is None)
        if settings.log_with:
            made.init_trackers(TRACKED, config=_scalars(settings))
        try:
            train(run, reporter)
        finally:
            made.end_training()
        if best := best_row(run.history, task.best):
            reporter.say(f"best: epoch {best['epoch']}, {task.best.name} {best[task.best.column]:.2f}%; wrote {folder}")


def _scalars(settings: RunSettings) -> dict[str, Any]:
    return {key: value for key, value in asdict(settings).items() if isinstance(value, (bool, int, float, str))}


def _begin(run: Run, new: bool) -> None:
    """Write the settings, and for a new run the model and a checkpoint: it can be resumed before its first batch."""
    if run.accelerator.is_main_process:
        clear(run.folder, everything=new)
        run.folder.mkdir(exist_ok=True)
        text = run.settings.to_json() + "\n"
        write_file(run.folder / SETTINGS, lambda path: path.write_text(text, encoding="utf-8"))
        if new:
            run.task.write(run.trained, run.folder, "last")
    if new:
        save_state(run)


def _describe(run: Run, reporter: Reporter, resume: bool) -> None:
    """Print model, data, device and learning rates."""
    settings, task, processes = run.settings, run.task, run.accelerator.num_processes
    images = settings.batch_size * settings.accumulate * processes
    model, *more = task.describe()
    reporter.say(
        f"{model}: {task.images:,} images to train on, {task.val_images:,} to validate; {images} an update, "
        f"{run.accelerator.device.type}{f', {processes} processes' if processes > 1 else ''}"
    )
    for line in more:
        reporter.say(line)
    reporter.say("learning rates: " + "; ".join(_rates(run)))
    if resume:
        done = run.epoch >= settings.epochs
        reporter.say("all epochs are done" if done else f"going on from {describe_saved(run).rstrip(',')}")


def _rates(run: Run) -> list[str]:
    """Learning rate and number of parameters of each provenance in the model."""
    counts: dict[str, int] = {}
    for name, parameter in run.task.model.named_parameters():
        counts[run.kinds[name]] = counts.get(run.kinds[name], 0) + parameter.numel()
    rate_of: dict[str, Any] = {kind: run.settings.lr * getattr(run.settings, f"lr_{kind}") for kind in counts}
    return [f"{rate_of[kind]:g} for {counts[kind]:,} {kind} parameters" for kind in sorted(counts)]
