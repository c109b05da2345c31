"""The training loop: batches, epochs, checkpoints."""

import time
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from accelerate.data_loader import skip_first_batches
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from augment_cli.compat import BatchNorm
from augment_cli.errors import AugmentError
from augment_cli.files import write_file
from augment_cli.seeds import seed_all
from augment_cli.signals import Stopped, held, pending, stop
from augment_cli.training import state
from augment_cli.training.folder import STATE
from augment_cli.training.history import best_row, write_history
from augment_cli.training.meter import Diverged
from augment_cli.training.progress import Reporter
from augment_cli.training.run import Run, contents, freeze_carried
from augment_cli.training.settings import parse_interval
from augment_cli.training.task import Row

# Batches after which losses are read from the device. Reading waits for the device, so it is not done for each.
_LOOK = 10

# A loss scale below which float16 is given up; fairseq's. The scaler begins at 65,536.
_LEAST_SCALE = 1e-4


def train(run: Run, reporter: Reporter) -> None:
    """Train to the last epoch and write every file of the run.

    A signal ends training after the current batch, with a checkpoint.

    Raises:
        AugmentError: the loss is not finite, an image cannot be read, or the disk is full.
        Stopped: a signal came, where `signals.install` was called.
    """
    reporter.begin(run.settings.epochs, len(run.train), run.epoch, run.batch)
    several = run.accelerator.num_processes > 1
    with (
        held() if several else nullcontext()
    ):  # processes that stop at different batches would wait for each other forever
        while run.epoch < run.settings.epochs and not _out_of_patience(run):
            try:
                train_epoch(run, reporter)
                scores = _validate(run)
            except Diverged as error:
                raise AugmentError(
                    f"{error}; {describe_saved(run)} is kept in {run.folder}. A lower `lr`, a longer "
                    f"`warmup_epochs` or `precision='bf16'` in place of fp16 may help"
                ) from error
            except Stopped:
                with held():
                    run.meter.look(run.batch, f"at epoch {run.epoch + 1}")
                    save_state(run)
                raise
            with held():
                finish_epoch(run, scores, reporter)
    if run.epoch < run.settings.epochs:
        reporter.say(
            f"stopped after epoch {run.epoch}: no better {run.task.best.name} for {run.settings.patience} epochs"
        )


def _out_of_patience(run: Run) -> bool:
    best, patience = best_row(run.history, run.task.best), run.settings.patience
    return best is not None and 0 < patience <= run.epoch - best["epoch"]


def describe_saved(run: Run) -> str:
    epoch, batch = run.saved
    return f"the checkpoint of epoch {epoch + 1}, {batch} batches done,"


def train_epoch(run: Run, reporter: Reporter) -> None:
    """Train on the batches of the epoch that are left."""
    begun = time.monotonic() - run.seconds
    _set_mode(run)
    _set_trained(run)
    _set_epoch(run)
    checkpoints = _Clock(run)
    seen = run.batch
    with ExitStack() as group:  # a signal waits until a group of accumulated batches is whole
        for images, targets in _batches_left(run):
            group.enter_context(held())
            _train_batch(run, images, targets)
            run.batch += 1
            run.seconds = time.monotonic() - begun
            whole, last = run.accelerator.sync_gradients, run.batch == len(run.train)
            due = whole and not last and checkpoints.due()
            if last or due or run.batch % _LOOK == 0:
                seen = _look(run, reporter, seen, len(targets))
                run.seconds = time.monotonic() - begun  # with what the device had still to do
            if due:
                save_state(run)
            if whole:
                group.close()


def _batches_left(run: Run) -> Iterable[tuple[Any, Any]]:
    if run.batch == len(run.train):
        return ()
    return skip_first_batches(run.train, run.batch) if run.batch else run.train


def _look(run: Run, reporter: Reporter, seen: int, size: int) -> int:
    run.meter.look(run.batch, f"at epoch {run.epoch + 1}")
    images = (run.batch - seen) * size * run.accelerator.num_processes
    reporter.advance(run.epoch, run.batch, images, run.task.running(run.meter))
    _stop_together(run)
    return run.batch


def _stop_together(run: Run) -> None:
    """Stop several processes at the same batch, whichever of them got a signal."""
    if run.accelerator.num_processes > 1 and run.accelerator.sync_gradients:
        asked = torch.tensor(float(pending()), device=run.accelerator.device)
        if run.accelerator.reduce(asked, reduction="sum").item():
            stop()


def _set_mode(run: Run) -> None:
    run.model.train()
    if run.settings.freeze_norm:
        for module in run.model.modules():
            if isinstance(module, BatchNorm):
                module.eval()


def _set_trained(run: Run) -> None:
    """Compute no gradients for carried parameters in the first `new_first` epochs."""
    accelerator = run.accelerator
    model = accelerator.unwrap_model(run.model)
    changed = freeze_carried(model, run.kinds, frozen=run.epoch < run.settings.new_first)
    if changed and accelerator.num_processes > 1:  # DDP expects the gradients that it was made with
        run.model = accelerator.prepare_model(accelerator.unwrap_model(run.model, keep_fp32_wrapper=False))


def _set_epoch(run: Run) -> None:
    seed_all(run.settings.seed, "epoch", run.epoch)  # loaders seed their workers from torch's generator
    run.task.set_epoch(run.epoch)
    run.train.set_epoch(run.epoch)


def _train_batch(run: Run, images: Any, targets: Any) -> None:
    """Forward and backward; after the last batch of an accumulated group, update the weights."""
    accelerator, settings = run.accelerator, run.settings
    seed_all(settings.seed, "batch", run.epoch, run.batch, accelerator.process_index)
    with accelerator.accumulate(run.model):
        loss, sums = _loss(run, images, targets)
        accelerator.backward(loss)
        if accelerator.sync_gradients and settings.clip_grad:
            accelerator.clip_grad_norm_(run.model.parameters(), settings.clip_grad)
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.meter.add(sums)
    if accelerator.sync_gradients:
        _end_update(run)
        if settings.log_with and run.updates % settings.log_every == 0:
            accelerator.log({"loss": loss.item(), "lr": _highest_rate(run)}, step=run.updates)


def _end_update(run: Run) -> None:
    """Count an update; learning rates follow, and the moving average.

    In float16 the scaler leaves out an update whose gradients overflow, and halves its scale. The update is counted all
    the same, so that learning rates reach their end with the last epoch.
    """
    accelerator = run.accelerator
    run.updates += 1
    run.scheduler.step_update(run.updates)
    if accelerator.optimizer_step_was_skipped:
        _check_scale(run)
    elif run.ema is not None:
        run.ema.update(accelerator.unwrap_model(run.model), step=run.updates)


def _check_scale(run: Run) -> None:
    scale = run.accelerator.scaler.get_scale()
    if scale < _LEAST_SCALE:
        place = f"at epoch {run.epoch + 1}, batch {run.batch + 1}"
        raise Diverged(f"gradients overflow in float16 {place}, even with the loss times {scale:.2g}")


def _highest_rate(run: Run) -> float:
    return max(group["lr"] for group in run.optimizer.param_groups)


def _loss(run: Run, images: Any, targets: Any) -> tuple[Tensor, Tensor]:
    return run.task.loss(run.model, images, targets)


def _validate(run: Run) -> Row:
    _share_statistics(run)
    return run.task.validate(run.trained)


def finish_epoch(run: Run, scores: Row, reporter: Reporter) -> None:
    """Write an epoch's results, then the checkpoint. A crash before that repeats the epoch."""
    row = {
        "epoch": run.epoch + 1,
        **run.task.train_scores(run.meter),
        **scores,
        "lr": _highest_rate(run),
        "seconds": run.seconds,
    }
    run.history.append(row)
    is_best = best_row(run.history, run.task.best) is row
    reporter.end_epoch(row, run.task.summary(row), is_best)
    run.accelerator.log(row, step=run.updates)
    _report_corrupt(run, reporter)
    run.epoch, run.batch, run.seconds = run.epoch + 1, 0, 0.0
    run.meter.reset()
    if run.accelerator.is_main_process:
        run.task.write(run.trained, run.folder, "last")
        if is_best:
            run.task.write(run.trained, run.folder, "best")
        write_history(run.folder, run.history, type(run.task))
    save_state(run)


def _share_statistics(run: Run) -> None:
    """Copy the first process's batch statistics to all others. Each has its own; the first's are written to files."""
    if run.accelerator.num_processes > 1:
        for buffer in run.trained.buffers():
            torch.distributed.broadcast(buffer, src=0)


def save_state(run: Run) -> None:
    """Write the checkpoint from the first process; the others wait."""
    if run.accelerator.is_main_process:
        state.write_state(run.folder / STATE, contents(run))
    run.saved = (run.epoch, run.batch)
    run.accelerator.wait_for_everyone()


def _report_corrupt(run: Run, reporter: Reporter) -> None:
    names = sorted(set(gather_object(run.task.corrupt_names())))
    if names:
        reporter.corrupt(names)
        if run.accelerator.is_main_process:
            text = "".join(f"{name}\n" for name in names)
            write_file(run.folder / "corrupt.txt", lambda path: path.write_text(text, encoding="utf-8"))


class _Clock:
    """Tells when a checkpoint within an epoch is due; all processes get the same answer."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.every, self.seconds = parse_interval(run.settings.checkpoint_every)
        self.last = time.monotonic()

    def due(self) -> bool:
        if self.every:
            return self.run.updates % self.every == 0
        if not self.seconds:
            return False
        (due,) = broadcast_object_list([time.monotonic() - self.last >= self.seconds])
        if due:
            self.last = time.monotonic()
        return due
