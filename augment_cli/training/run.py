"""A fine-tuning run: model, data, optimiser and progress, new or from a checkpoint.

No random state is saved. Every draw is seeded by the run's seed and its place, (epoch, image) for augmentation and
(epoch, batch, process) for the rest, so that a resumed run draws the same numbers as one that was never interrupted.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from pydantic import BaseModel, Field, ValidationError
from timm.utils import ModelEmaV3
from torch import nn

from augment_cli.bounds import Name
from augment_cli.errors import AugmentError, boundary
from augment_cli.planning.recipe import describe_errors
from augment_cli.training import state
from augment_cli.training.folder import STATE
from augment_cli.training.history import columns
from augment_cli.training.meter import Meter
from augment_cli.training.parameters import Provenance, make_optimizer, make_scheduler
from augment_cli.training.settings import RunSettings, settings_of
from augment_cli.training.task import Batches, Row, Task


@dataclass
class Run:
    """A run's parts and progress: `batch` batches of `epoch` (from 0) and `updates` weight updates are done."""

    settings: RunSettings
    accelerator: Accelerator
    task: Task
    kinds: dict[str, Provenance]
    model: nn.Module
    optimizer: Any
    scheduler: Any
    ema: ModelEmaV3 | None
    meter: Meter
    epoch: int = 0
    batch: int = 0
    updates: int = 0
    seconds: float = 0.0
    history: list[Row] = field(default_factory=list)
    saved: tuple[int, int] = (0, 0)

    @property
    def folder(self) -> Path:
        return Path(self.settings.output)

    @property
    def train(self) -> Batches:
        return self.task.train

    @property
    def trained(self) -> nn.Module:
        """The model to evaluate and write: the moving average if there is one, else the model in training."""
        return self.accelerator.unwrap_model(self.model) if self.ema is None else self.ema.module


def prepare(kind: type[Task], settings: RunSettings, accelerator: Accelerator, saved: dict[str, Any] | None) -> Run:
    """Make a run of a kind of task: new, or continued from `saved`, a checkpoint's contents.

    Raises:
        AugmentError: model, data and settings contradict each other, or the checkpoint belongs to another run.
    """
    task = kind(settings, accelerator, resumed=saved is not None)
    kinds = _kinds(task, settings, saved)
    task.model = model = _configured(task, settings, accelerator)
    if len(task.train) == 0:
        together = settings.batch_size * accelerator.num_processes
        raise AugmentError(f"{task.images} training images do not fill one batch of {together}")
    if saved is not None:
        _check_saved(saved, task, settings, accelerator)
        with boundary(f"{Path(settings.output) / STATE} does not fit the run"):
            model.load_state_dict(saved["model"])
    optimizer = make_optimizer(model, kinds, settings)
    scheduler = make_scheduler(optimizer, settings, -(-len(task.train) // settings.accumulate))
    ema = ModelEmaV3(model, decay=settings.ema_decay, use_warmup=True) if settings.ema_decay else None
    freeze_carried(model, kinds, frozen=(saved["position"][0] if saved else 0) < settings.new_first)
    if settings.compile:
        task.core(model).compile()
    model, optimizer = accelerator.prepare(model, optimizer)
    meter = Meter(accelerator, [0.0] * task.sums)
    run = Run(settings, accelerator, task, kinds, model, optimizer, scheduler, ema, meter)
    if saved is not None:
        with boundary(f"{run.folder / STATE} does not fit the run"):
            _restore(run, saved)
    return run


def _kinds(task: Task, settings: RunSettings, saved: dict[str, Any] | None) -> dict[str, Provenance]:
    """Each parameter's provenance, which is that of the run's first model."""
    kinds: dict[str, Provenance] = task.kinds
    if saved is not None:
        if saved["kinds"].keys() != kinds.keys():
            raise AugmentError(f"{Path(settings.output) / STATE} is the checkpoint of another model")
        kinds = saved["kinds"]
    if settings.new_first and set(kinds.values()) == {"carried"}:
        raise AugmentError(
            f"`new_first`: all parameters of {settings.model} are carried over, so that none would be trained"
        )
    return kinds


def _configured(task: Task, settings: RunSettings, accelerator: Accelerator) -> nn.Module:
    """Move the model to its device and memory format; switch on gradient checkpointing and SyncBatchNorm if asked."""
    model = task.model.to(accelerator.device)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if settings.grad_checkpointing:
        switch: Callable[[bool], None] | None = getattr(task.core(model), "set_grad_checkpointing", None)
        if switch is None:
            raise AugmentError(f"{type(model).__name__} has no gradient checkpointing: leave out `grad_checkpointing`")
        switch(True)
    if settings.sync_norm and accelerator.num_processes > 1:
        from timm.layers import convert_sync_batchnorm

        if accelerator.device.type == "cpu":
            raise AugmentError("`sync_norm` needs accelerators: torch's SyncBatchNorm does not run on CPUs")
        model = convert_sync_batchnorm(model)
    return model


def contents(run: Run) -> dict[str, Any]:
    """The contents of a checkpoint."""
    return {
        "task": run.task.name,
        "settings": asdict(run.settings),
        "processes": run.accelerator.num_processes,
        "images": run.task.images,
        "kinds": run.kinds,
        "position": [run.epoch, run.batch, run.updates],
        "seconds": run.seconds,
        "sums": run.meter.sums,
        "history": run.history,
        "model": run.accelerator.unwrap_model(run.model).state_dict(),
        "ema": None if run.ema is None else run.ema.module.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": state.pack_scaler(run.accelerator),
    }


_Number = Annotated[int, Field(ge=0, le=2**53)]


class _Saved(BaseModel):
    """The structure of a checkpoint's contents. Models and optimisers check their own parts when they load them."""

    task: Name
    settings: dict[str, Any]
    processes: _Number
    images: _Number
    kinds: dict[str, Provenance]
    position: tuple[_Number, _Number, _Number]
    seconds: Annotated[float, Field(ge=0, le=2**53)]
    sums: Annotated[list[float], Field(max_length=1000)]
    history: list[Row]
    model: dict[str, Any]
    ema: dict[str, Any] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None


def read_saved(path: Path, task: type[Task]) -> dict[str, Any]:
    """Read a checkpoint's contents, as `contents` made them.

    Raises:
        AugmentError: the file is not a checkpoint, a damaged one, or one of another task.
    """
    saved = state.read_state(path)
    try:
        _Saved.model_validate(saved)
    except ValidationError as error:
        raise AugmentError(f"{path} is no checkpoint of a run: {describe_errors(error, _Saved)}") from error
    _check_task(saved, task, path)
    return saved


def _check_task(saved: dict[str, Any], task: type[Task], path: Path) -> None:
    if saved["task"] != task.name:
        raise AugmentError(f"{path} belongs to a run of another task: {saved['task']}, not {task.name}")
    if len(saved["sums"]) != task.sums:
        raise AugmentError(f"{path} is no checkpoint of a run: sums: there are not {task.sums}")
    if any(row.keys() != set(columns(task.scores)) for row in saved["history"]):
        raise AugmentError(f"{path} is no checkpoint of a run: history: columns are not {', '.join(task.scores)}")


def _check_saved(saved: dict[str, Any], task: Task, settings: RunSettings, accelerator: Accelerator) -> None:
    where = Path(settings.output) / STATE
    before = settings_of(saved["settings"], str(where), type(settings))
    if other := next((name for name in settings.fixed if getattr(before, name) != getattr(settings, name)), None):
        raise AugmentError(
            f"{where} belongs to another run than settings.json beside it: `{other}` was "
            f"{getattr(before, other)}, and is {getattr(settings, other)}"
        )
    task.check_resumed(saved["position"], before)
    if saved["processes"] != accelerator.num_processes:
        raise AugmentError(
            f"{where} was written by {saved['processes']} processes, and now there are {accelerator.num_processes}: "
            f"resume with {saved['processes']}, or start a new run from {Path(settings.output) / 'last'}"
        )
    if saved["images"] != task.images:
        raise AugmentError(
            f"data {settings.data} had {saved['images']:,} training images when the run began, and now "
            f"{task.images:,}: a resumed run would train on them in another order"
        )


def _restore(run: Run, saved: dict[str, Any]) -> None:
    run.epoch, run.batch, run.updates = saved["position"]
    run.saved = (run.epoch, run.batch)
    run.seconds, run.history = saved["seconds"], saved["history"]
    run.meter = Meter(run.accelerator, saved["sums"])
    _restore_optimizer(run, saved["optimizer"])
    if run.ema is not None:
        run.ema.module.load_state_dict(saved["ema"])
    if run.accelerator.scaler is not None and saved["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(saved["scaler"])


def _restore_optimizer(run: Run, saved: dict[str, Any]) -> None:
    """Take the optimiser's moments from the checkpoint; learning rates and weight decay stay those of the settings."""
    own = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    run.optimizer.load_state_dict(saved)
    for group, options in zip(run.optimizer.param_groups, own, strict=True):
        group.update(options)
    if run.updates:
        run.scheduler.step_update(run.updates)


def freeze_carried(model: nn.Module, kinds: dict[str, Provenance], frozen: bool) -> bool:
    """Freeze the carried parameters, or unfreeze them. Returns whether that changed anything."""
    parameters = [p for name, p in model.named_parameters() if kinds[name] == "carried"]
    changed = [p for p in parameters if p.requires_grad is frozen]
    for parameter in changed:
        parameter.requires_grad_(not frozen)
    return bool(changed)
