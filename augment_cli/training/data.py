"""The data sets of a run and their loaders: timm makes a loader, accelerate gives each process its share."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader

from augment_cli import signals
from augment_cli.dataset import Images, ImageStream, open_dataset
from augment_cli.errors import AugmentError
from augment_cli.seeds import derive
from augment_cli.training.settings import Settings
from augment_cli.training.transfer import Collate, Erase

Data = Images | ImageStream


class Loader(Protocol):
    """Batches on the device: images (N, C, H, W), labels (N,). The methods that accelerate adds to torch's loader."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...
    def __len__(self) -> int: ...
    def set_epoch(self, epoch: int) -> None: ...


@dataclass(frozen=True)
class Splits:
    """Training and validation data. `classes` maps names to labels; None where the data have no names."""

    train: Data
    val: Data

    @property
    def classes(self) -> dict[str, int] | None:
        return self.train.classes


def open_splits(settings: Settings, channels: int) -> Splits:
    """Open a run's data. Validation takes `val_data`, a share of the training images, or the validation split.

    Raises:
        AugmentError: data cannot be opened, or there is nothing to validate on.
    """
    open_split = partial(
        open_dataset,
        on_corrupt=settings.on_corrupt,
        channels=channels,
        root=settings.data_root,
        download=settings.download,
        batch_size=settings.batch_size,
        seed=settings.seed,
        input_key=settings.input_key,
        target_key=settings.target_key,
    )
    train = open_split(settings.data, split=settings.train_split, is_training=True)
    if settings.hold_out:
        return _hold_out(train, settings)
    spec = settings.val_data or settings.data
    val = open_split(spec, split=settings.val_split, classes=train.classes)
    if _same(train, val):
        raise AugmentError(
            f"data {settings.data} have no splits: validating on the training images would tell nothing; "
            f"give `val_data`, or `hold_out=0.1`"
        )
    return Splits(train, val)


def _same(train: Data, val: Data) -> bool:
    """Whether both read the same folder or tar file."""
    if isinstance(train, ImageStream) or isinstance(val, ImageStream):
        return False
    return train.origin() is not None and train.origin() == val.origin()


def _hold_out(train: Data, settings: Settings) -> Splits:
    """Keep a share of the training images, drawn by the seed, for validation."""
    if isinstance(train, ImageStream):
        raise AugmentError(f"`hold_out` takes images by number, and {settings.data} is a stream: give `val_data`")
    if settings.val_data:
        raise AugmentError("`hold_out` and `val_data` both name validation data: give one of them")
    generator = torch.Generator().manual_seed(derive(settings.seed, "hold-out"))
    order = torch.randperm(len(train), generator=generator).tolist()
    count = round(len(train) * settings.hold_out)
    if not 0 < count < len(train):
        raise AugmentError(
            f"`hold_out={settings.hold_out}` of {len(train)} images leaves none to train on, or none to validate on"
        )
    return Splits(train.part(sorted(order[count:])), train.part(sorted(order[:count])))


def data_config(model: torch.nn.Module, input_size: tuple[int, int, int], img_size: tuple[int, int] | None) -> dict:
    """timm's preprocessing for a model: input_size (channels, height, width), mean, std, interpolation, crop."""
    from timm.data import resolve_data_config

    size = (input_size[0], *img_size) if img_size else tuple(input_size)
    config = resolve_data_config({"input_size": size}, model=model)
    return {**config, "mean": _for(config["mean"], size[0]), "std": _for(config["std"], size[0])}


def _for(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def training_loader(data: Data, settings: Settings, config: dict[str, Any], accelerator: Accelerator) -> Loader:
    """Loader of augmented images. Drops the last, smaller batch; every process gets the same number of batches."""
    options = {
        "no_aug": not settings.augmentation,
        "scale": (settings.crop_scale, 1.0),
        "hflip": settings.flip,
        "color_jitter": settings.color_jitter,
        "auto_augment": settings.auto_augment,
        "is_training": True,
        "pin_memory": pins(accelerator),
    }
    loader = _loader(data, settings.batch_size, settings.workers, config, settings.channels_last, **options)
    if settings.augmentation and settings.random_erasing:
        data.transform = Erase(data.transform, settings.random_erasing)
    return place(loader, accelerator, seed=settings.seed)


def evaluation_loader(
    data: Data,
    batch_size: int,
    workers: int,
    config: dict[str, Any],
    accelerator: Accelerator,
    channels_last: bool = False,
) -> Loader:
    """Loader of every image once. Processes may get different numbers of batches."""
    options = {"is_training": False, "pin_memory": pins(accelerator)}
    return place(_loader(data, batch_size, workers, config, channels_last, **options), accelerator)


def pins(accelerator: Accelerator) -> bool:
    """Whether batches go through pinned memory, from which a GPU copies while it computes."""
    return accelerator.device.type == "cuda"


def _loader(
    data: Data, batch_size: int, workers: int, config: dict[str, Any], channels_last: bool, **options: Any
) -> DataLoader:
    from timm.data import create_loader

    if isinstance(data, ImageStream):
        data.set_loader_cfg(num_workers=workers)
    source: Any = data  # timm's annotation names its own two classes; it asks only for a `transform` to set
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    loader = create_loader(
        source,
        config["input_size"],
        batch_size,
        **{key: config[key] for key in keys},
        **options,
        num_workers=workers,
        persistent_workers=not isinstance(data, ImageStream),  # timm's streams take an order from their worker's seed
        collate_fn=Collate(config["mean"], config["std"], channels_last),
        use_prefetcher=True,  # a transform that ends with bytes
        device=torch.device("cpu"),
    ).loader
    loader.worker_init_fn = partial(_begin_worker, loader.worker_init_fn, signals.at_exit())
    return loader


def _begin_worker(seed: Callable[[int], None], ending: signals.Flag, worker_id: int) -> None:
    seed(worker_id)
    signals.ignore_in_worker(ending)


def place(loader: DataLoader, accelerator: Accelerator, seed: int | None = None) -> Loader:
    """This process's share of a loader, with batches on the device. timm's readers divide streams by themselves."""
    alone = isinstance(loader.dataset, ImageStream)
    return prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=1 if alone else accelerator.num_processes,
        process_index=0 if alone else accelerator.process_index,
        put_on_device=True,
        dispatch_batches=False,
        even_batches=seed is not None,
        use_seedable_sampler=seed is not None,
        data_seed=seed,
        non_blocking=True,
    )
