"""Images from a folder, a tar file, or one of timm's other readers, with errors that name their faults.

A spec is a path, or `kind/name` for one of timm's kinds: `hfds/` and `hfids/` (Hugging Face datasets, whole and
streamed), `wds/` (webdataset: a folder with `_info.json`, or shards such as `wds/data/train-{00..03}.tar|5000`),
`tfds/`, and `torch/` (torchvision). A folder holds class folders, or a folder of class folders
for every split.
"""

import copy
import itertools
import struct
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from augment_cli.errors import AugmentError, InputError, nearest
from augment_cli.seeds import derive, preserved, seed_cpu
from augment_cli.specs import COLUMNS, STREAMS, OnCorrupt, check_data, kind_of

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation"),
}
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_SUBSTITUTES = 1000


class BadImage(AugmentError):
    """An image or label that cannot be used. A data loader raises it again; the worker's traceback is then cut off."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


def _shared_epoch() -> torch.Tensor:
    """An epoch in memory that worker processes share, so that they can stay from one epoch to the next."""
    return torch.zeros((), dtype=torch.int64).share_memory_()


class Images(Dataset):
    """Images and labels by index: (transformed image, int), or the PIL image where there is no transform.

    An augmentation's random numbers depend on seed, epoch and index alone: not on worker processes, nor on where a run
    was resumed. `corrupt` (N,) is 1 for images that could not be read; worker processes write to it too.
    """

    def __init__(
        self,
        source: Any,
        classes: dict[str, int] | None,
        *,
        channels: int,
        on_corrupt: OnCorrupt,
        labels: bool,
        seed: int,
    ) -> None:
        self.source, self.classes, self.labels = source, classes, labels
        self.mode = "L" if channels == 1 else "RGB"
        self.on_corrupt, self.seed = on_corrupt, seed
        self.shared_epoch = _shared_epoch()
        self.transform: Callable | None = None
        self.num_classes: int | None = None  # a label of `num_classes` or more is an error
        self.relabel: list[int] | None = None
        self.indices: Sequence[int] = range(len(source))
        self.corrupt = torch.zeros(len(source), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
        """A whole batch, as torch's loaders ask for it. Generators are restored once, not for every image."""
        with preserved():
            return [self._item(index) for index in indices]

    def _item(self, index: int) -> tuple[Any, int]:
        image, label = self._readable(index)
        if self.transform is not None:
            seed_cpu(self.seed, "image", self.epoch, index)
            image = self.transform(image)
        return image, label

    @property
    def epoch(self) -> int:
        return int(self.shared_epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, in this process and in the worker processes of its loaders."""
        self.shared_epoch.fill_(epoch)

    def part(self, indices: Sequence[int]) -> "Images":
        """The images at these indices, as a data set with its own transform."""
        part = copy.copy(self)
        part.indices = [self.indices[index] for index in indices]
        part.corrupt, part.shared_epoch = torch.zeros_like(self.corrupt).share_memory_(), _shared_epoch()
        return part

    def name(self, index: int) -> str:
        """The file of an image, or its number where it has none."""
        return self._name(self.indices[index])

    def _name(self, place: int) -> str:
        reader = getattr(self.source, "reader", None)
        return str(reader.filename(place, absolute=True)) if reader is not None else f"image {place}"

    def origin(self) -> str | None:
        """The folder or tar file and its first image, which tell whether two data sets are the same; else None."""
        reader = getattr(self.source, "reader", None)
        return f"{reader.root}: {self.name(0)}" if reader is not None and hasattr(reader, "samples") else None

    def corrupt_names(self) -> list[str]:
        """Names of the images that no process of the loader could read so far."""
        return [self._name(place) for place in self.corrupt.nonzero().flatten().tolist()]

    def _readable(self, index: int) -> tuple[Image.Image, int]:
        """The image; if it is corrupt and may be skipped, the next one that can be read."""
        for step in range(min(len(self), _SUBSTITUTES)):
            place = self.indices[(index + step) % len(self)]
            try:
                return self._read(place)
            except BadImage:
                raise
            except _UNREADABLE as error:
                self.corrupt[place] = 1
                if self.on_corrupt == "fail":
                    reason = str(error) or type(error).__name__
                    raise BadImage(
                        f"{self._name(place)} cannot be read: {reason}; `on_corrupt='skip'` goes on without such images"
                    ) from error
        raise BadImage(f"none of {step + 1:,} images from {self.name(index)} on can be read")

    def _read(self, place: int) -> tuple[Image.Image, int]:
        reader = getattr(self.source, "reader", None)
        if reader is None:
            image, label = self.source[place]
            return image.convert(self.mode), self._label(label)
        stream, label = reader[place]
        with stream:
            return Image.open(stream).convert(self.mode), self._label(label)

    def _label(self, label: Any) -> int:
        if not self.labels:
            return -1
        return _checked(int(label) if self.relabel is None else self.relabel[int(label)], self.num_classes)


def _named(reader: Any) -> Iterator[tuple[Any, int]]:
    """A stream's samples; a missing column becomes a BadImage."""
    try:
        yield from reader
    except (KeyError, ValueError, TypeError) as error:
        raise BadImage(f"the stream cannot be read: {type(error).__name__}, {error}") from error


class ImageStream(IterableDataset):
    """Images and labels in the order of a stream: (transformed image, int).

    timm's reader logs images that it cannot decode and leaves them out: streams cannot name or count them.
    """

    classes = None

    def __init__(self, source: Any, *, seed: int) -> None:
        self.source, self.seed, self.epoch = source, seed, 0
        self.transform: Callable | None = None
        self.num_classes: int | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        worker = get_worker_info()
        place = (self.seed, "stream", self.epoch, _rank(), worker.id if worker else 0)
        reader = copy.copy(self.source.reader)  # its generator would go on from the last epoch: take a new one
        reader.worker_seed = derive(*place)
        for number, (image, label) in enumerate(_named(reader)):
            if self.transform is not None:
                with preserved() if worker is None else nullcontext():
                    seed_cpu(*place, number)
                    image = self.transform(image)
            yield image, _checked(int(label), self.num_classes)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.source.set_epoch(epoch)

    def set_loader_cfg(self, num_workers: int) -> None:
        """Tell timm's reader the number of workers, among which it divides the shards."""
        self.source.set_loader_cfg(num_workers=num_workers)

    def corrupt_names(self) -> list[str]:
        return []


def open_dataset(
    spec: str | Path,
    *,
    split: str = "train",
    is_training: bool = False,
    labels: bool = True,
    on_corrupt: OnCorrupt = "fail",
    classes: dict[str, int] | None = None,
    channels: int = 3,
    root: str | Path | None = None,
    download: bool = False,
    batch_size: int = 1,
    seed: int = 0,
    input_key: str | None = None,
    target_key: str | None = None,
) -> Images | ImageStream:
    """Open the data set that a spec names. timm's create_loader sets its `transform`; it can be set by hand too.

    Args:
        spec: a folder, a tar file, or `kind/name`.
        split: the part to open; a folder without folders for splits is taken whole.
        is_training: shuffle streams.
        labels: False takes the images of a folder wherever they are, with the label -1.
        on_corrupt: "fail" stops at an image that cannot be read; "skip" takes the next readable one in its place.
        classes: class names to labels, such as the training data's; a class that is not among them is an error.
        channels: 1 reads grey images, anything else RGB.
        root: folder of `torch/` data, and the cache of `hfds/` data.
        download: fetch `torch/` and `tfds/` data that are not there.
        batch_size: streams round their length to a multiple of it.
        seed: for augmentation and the shuffling of streams.
        input_key, target_key: columns of `hfds/`, `hfids/` and `tfds/` data, or entries of `wds/` samples, that hold
            images and labels; None takes timm's defaults.

    Raises:
        AugmentError: there are no data or no images, a class folder is empty, or a class or column is unknown.
    """
    spec = str(spec)
    kind = kind_of(spec)
    options: dict[str, Any] = {"is_training": is_training, "batch_size": batch_size, "seed": seed, "download": download}
    keys = {k: v for k, v in (("input_key", input_key), ("target_key", target_key)) if v is not None}
    if keys and kind not in COLUMNS:
        raise InputError(f"data {spec} have no columns: leave out `{next(iter(keys))}`")
    options |= keys
    if kind in STREAMS:
        options["input_img_mode"] = "L" if channels == 1 else "RGB"
        return ImageStream(_create(spec, root=root, split=split, **options), seed=seed)
    if kind is not None:
        source = _create(spec, root=root, split=split, **options)
    else:
        source = _open_path(Path(spec), split, labels)
    images = Images(source, _classes(source), channels=channels, on_corrupt=on_corrupt, labels=labels, seed=seed)
    if classes is not None and labels:
        _relabel(images, classes, spec)
    return images


def _create(spec: str, *, root: str | Path | None, split: str, **options: Any) -> Any:
    """Open one of timm's kinds of data."""
    from timm.data import create_dataset

    kind, _, name = spec.partition("/")
    kind = kind.lower()
    if kind == "torch":
        if root is None:
            raise InputError(f"{spec}: where are its files? Give their folder as `data_root`")
        options = {"download": options["download"]}
    elif kind == "wds":
        root, split = _shards(Path(name), split)
        if "input_key" in options:  # timm's reader hands a decoded image on as jpg
            options["input_key"] += ";jpg"
    elif kind == "hfds":
        options = {key: options[key] for key in ("input_key", "target_key") if key in options}
    try:
        source = create_dataset(spec, root=None if root is None else str(root), split=split, **options)
    except ImportError as error:
        raise InputError(f"{spec}: a package for {kind}/ data is missing: {error}") from error
    except Exception as error:  # readers of five libraries raise as many types
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{spec} cannot be opened, split {split}: {lines[0].rstrip('.')}") from error
    if kind == "hfds":
        _check_columns(spec, source.reader)
    elif kind == "wds" and "input_key" in options:
        _check_entry(spec, source.reader, options["input_key"].split(";"))
    return source


def _check_columns(spec: str, reader: Any) -> None:
    """Refuse Hugging Face data without the columns of images and labels. A missing image column reads as None."""
    columns = [name for name, value in next(iter(reader.dataset), {}).items() if value is not None]
    wanted = [("input_key", reader.image_key)]
    wanted += [("target_key", key) for key in reader.target_keys or (reader.label_key,)]
    for setting, key in wanted:
        if columns and key.partition("/")[0] not in columns:
            raise InputError(f"{spec} has no column {key}: give one of {', '.join(columns)} as `{setting}`")


def _check_entry(spec: str, reader: Any, keys: list[str]) -> None:
    """Refuse shards whose first sample has none of these entries: a stream would skip every sample and never end."""
    shard = Path(reader.root or "", reader.split_info.filenames[0])
    if not shard.is_file():
        return
    with tarfile.open(shard) as tar:
        names = [Path(member.name).name.partition(".") for member in itertools.islice(tar, 20)]
    entries = {rest: None for first, _, rest in names if first == names[0][0]} if names else {}
    if entries and not entries.keys() & set(keys):
        raise InputError(f"{spec} has no entry {keys[0]}: give one of {', '.join(entries)} as `input_key`")


def _shards(path: Path, split: str) -> tuple[Path, str]:
    """webdataset's root and split: those of a folder with `_info.json`, or of a pattern of shards with a count."""
    return (path.parent, path.name) if ".tar" in path.name else (path, split)


def _open_path(path: Path, split: str, labels: bool) -> Any:
    from timm.data import create_dataset

    check_data(str(path))
    folder = _split_folder(path, split) if path.is_dir() else path
    if not path.is_dir() and path.suffix != ".tar":
        raise InputError(f"data {path} is neither a folder nor a tar file")
    options: dict[str, Any] = {} if path.is_dir() else {"cache_tarinfo": False}
    try:
        source = create_dataset("", root=str(folder), search_split=False, **options)
    except RuntimeError as error:
        raise InputError(f"data {folder} {_contents(folder)}") from error
    except Exception as error:  # tarfile and timm raise many types for damaged files
        raise InputError(f"data {path} cannot be read: {error}") from error
    if labels and path.is_dir():
        _check_class_folders(folder, source.reader)
    return source


def _split_folder(path: Path, split: str) -> Path:
    """The folder of a split, by any name that timm knows; the folder itself if it has no splits."""
    wanted = next((names for names in _SPLITS.values() if split in names), ())
    for name in (split, *wanted):
        if (path / name).is_dir():
            return path / name
    others = [name for names in _SPLITS.values() for name in names if (path / name).is_dir()]
    if others:
        raise InputError(f"data {path} has a folder {others[0]}, but none for the split {split}")
    return path


def _contents(folder: Path) -> str:
    from timm.data.readers import get_img_extensions

    if not any(folder.iterdir()):
        return "is an empty folder"
    files = sum(1 for file in folder.rglob("*") if file.is_file())
    return f"has no images: of its {files:,} files, none is a {', '.join(get_img_extensions())}"


def _check_class_folders(folder: Path, reader: Any) -> None:
    """Refuse images outside class folders, and class folders without images."""
    root = str(folder)
    filled = {Path(file).relative_to(root).parts[0] for file, _ in reader.samples}
    if loose := next((file for file, _ in reader.samples if Path(file).parent == folder), None):
        raise InputError(f"data {folder}: {Path(loose).name} is in no class folder; put every class in one of its own")
    empty = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name not in filled and p.name[0] != ".")
    if empty:
        raise InputError(f"data {folder}: no images in {len(empty)} of its class folders, such as {empty[0]}")


def _classes(source: Any) -> dict[str, int] | None:
    """Class names to labels; None where the data have no names."""
    for holder in (getattr(source, "reader", None), source):
        for attribute in ("class_to_idx", "class_name_to_idx"):
            if found := getattr(holder, attribute, None):
                return dict(found)
    return None


def _relabel(images: Images, classes: dict[str, int], spec: str) -> None:
    """Renumber labels as in `classes`."""
    if images.classes is None:
        return
    if unknown := [name for name in images.classes if name not in classes]:
        such = f"such as {unknown[0]}{nearest(unknown[0], classes)}"
        raise InputError(f"data {spec} have classes that are not known, {len(unknown)} of them, {such}")
    own = {index: name for name, index in images.classes.items()}
    images.relabel = [classes[own[index]] if index in own else -1 for index in range(max(own) + 1)]
    images.classes = dict(classes)


def _checked(label: int, num_classes: int | None) -> int:
    if num_classes is not None and not 0 <= label < num_classes:
        raise BadImage(
            f"an image has the label {label}, and there are {num_classes} classes, from 0: see `num_classes`"
        )
    return label


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
