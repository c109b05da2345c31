import gc
import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from augment_cli.dataset import open_dataset
from augment_cli.errors import AugmentError


def image(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (colour, colour, colour)).save(path)
    return path


def draw(picture: Image.Image) -> torch.Tensor:
    """The picture's grey value, and what the three generators draw for it."""
    drawn = random.random(), np.random.rand(), torch.rand(()).item()
    return torch.tensor([float(np.asarray(picture)[0, 0, 0]), *drawn])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three images, whose grey values are 10, 11, 12 and 20, 21, 22."""
    for label, name in ((1, "ants"), (2, "bees")):
        for i in range(3):
            image(tmp_path / "data" / name / f"{i}.png", 10 * label + i)
    return tmp_path / "data"


def grey(dataset) -> list[tuple[int, int]]:
    return [(np.asarray(picture)[0, 0, 0].item(), label) for picture, label in dataset]


def test_a_folder_of_class_folders_is_taken_whole(folder):
    dataset = open_dataset(folder)
    assert dataset.classes == {"ants": 0, "bees": 1}
    assert grey(dataset[i] for i in range(len(dataset))) == [(10, 0), (11, 0), (12, 0), (20, 1), (21, 1), (22, 1)]
    assert len(open_dataset(folder, split="validation")) == 6


@pytest.mark.parametrize("name", ["validation", "val"])
def test_a_split_has_a_folder_of_its_own(tmp_path, name):
    image(tmp_path / "train" / "ants" / "a.png", 1)
    image(tmp_path / name / "ants" / "a.png", 2)
    assert open_dataset(tmp_path, split="train")[0][0].getpixel((0, 0)) == (1, 1, 1)
    assert open_dataset(tmp_path, split="validation")[0][0].getpixel((0, 0)) == (2, 2, 2)


def test_images_without_labels_may_lie_anywhere(folder):
    image(folder / "loose.png", 7)
    dataset = open_dataset(folder, labels=False)
    assert len(dataset) == 7
    assert {label for _, label in grey(dataset[i] for i in range(7))} == {-1}
    flat = folder / "ants"
    assert len(open_dataset(flat, labels=False)) == 3


def test_grey_images_for_models_of_one_channel(folder):
    assert open_dataset(folder, channels=1)[0][0].mode == "L"
    assert open_dataset(folder)[0][0].mode == "RGB"


def test_labels_follow_the_classes_that_are_given(folder):
    dataset = open_dataset(folder, classes={"wasps": 0, "bees": 1, "ants": 2})
    assert [label for _, label in grey(dataset[i] for i in range(6))] == [2, 2, 2, 1, 1, 1]
    with pytest.raises(AugmentError, match="classes that are not known, 1 of them, such as bees"):
        open_dataset(folder, classes={"ants": 0, "wasps": 1})


def test_a_tar_file_is_read_like_a_folder(folder, tmp_path):
    path = tmp_path / "data.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(folder, "data")
    dataset = open_dataset(path)
    assert dataset.classes == {"ants": 0, "bees": 1}
    assert sorted(grey(dataset[i] for i in range(6))) == [(10, 0), (11, 0), (12, 0), (20, 1), (21, 1), (22, 1)]


def shard(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for i in range(6):
            content = io.BytesIO()
            Image.new("RGB", (8, 6), (i, i, i)).save(content, "png")
            for suffix, data in (("png", content.getvalue()), ("cls", str(i % 2).encode())):
                entry = tarfile.TarInfo(f"{i:03}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


@pytest.mark.parametrize("form", ["wds/{folder}/part-{{0..1}}.tar|12", "wds/{folder}"])
def test_shards_of_webdataset_are_streamed(tmp_path, form):
    names = ["part-0.tar", "part-1.tar"]
    for name in names:
        shard(tmp_path / name)
    split = {"name": "validation", "num_samples": 12, "filenames": names, "shard_lengths": [6, 6]}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"validation": split}}))
    stream = open_dataset(form.format(folder=tmp_path), split="validation")
    stream.transform = draw
    stream.set_loader_cfg(num_workers=0)
    first, again = ([(x.tolist(), label) for x, label in stream] for _ in range(2))
    assert sorted(x[0] for x, _ in first) == [float(i) for i in range(6) for _ in range(2)]
    assert all(label == x[0] % 2 for x, label in first)
    assert first == again
    stream.set_epoch(1)
    assert [x[1:] for x, _ in stream] != [x[1:] for x, _ in first]


def test_hugging_face_data_are_read(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    dataset = open_dataset(f"hfds/{folder}", root=tmp_path / "cache")
    assert dataset.classes == {"ants": 0, "bees": 1}
    assert sorted(grey(dataset[i] for i in range(6))) == [(10, 0), (11, 0), (12, 0), (20, 1), (21, 1), (22, 1)]


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (value,) * 3).save(stream, "png")
    return stream.getvalue()


def test_columns_of_hugging_face_data_can_be_named(tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (tmp_path / "data").mkdir()
    rows = {"picture": [{"bytes": png(i), "path": f"{i}.png"} for i in range(4)], "kind": [0, 1, 1, 0]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "data/train.parquet")
    spec, options = f"hfds/{tmp_path / 'data'}", {"root": tmp_path / "cache"}
    dataset = open_dataset(spec, input_key="picture", target_key="kind", **options)
    assert grey(dataset[i] for i in range(4)) == [(0, 0), (1, 1), (2, 1), (3, 0)]
    with pytest.raises(AugmentError, match="no column label: give one of picture, kind"):
        open_dataset(spec, input_key="picture", **options)
    with pytest.raises(AugmentError, match=r"no column image|cannot be opened"):
        open_dataset(spec, target_key="kind", **options)


def test_entries_of_webdataset_samples_can_be_named(tmp_path):
    with tarfile.open(tmp_path / "part-0.tar", "w") as tar:
        for i in range(4):
            for suffix, data in (("photo.png", png(i)), ("json", json.dumps({"kind": i % 2}).encode())):
                entry = tarfile.TarInfo(f"{i:03}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    spec = f"wds/{tmp_path}/part-0.tar|4"

    def labels(**keys) -> list[tuple[int, int]]:
        stream = open_dataset(spec, split="validation", **keys)
        stream.set_loader_cfg(num_workers=0)
        return grey(stream)

    assert labels(input_key="photo.png", target_key="kind") == [(0, 0), (1, 1), (2, 0), (3, 1)]
    with pytest.raises(AugmentError, match=r"no entry jpeg: give one of photo\.png, json"):
        labels(input_key="jpeg")
    with pytest.raises(AugmentError, match="sort"):
        labels(input_key="photo.png", target_key="sort")


def test_a_folder_has_no_columns(folder):
    with pytest.raises(AugmentError, match="leave out `target_key`"):
        open_dataset(folder, target_key="kind")


def test_torchvision_data_are_read_from_their_folder(folder):
    dataset = open_dataset("torch/image_folder", root=folder)
    assert dataset.classes == {"ants": 0, "bees": 1}
    dataset.transform = draw
    assert dataset[4][0][0] == 21
    assert dataset[4][1] == 1


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_what_is_drawn_for_an_image_depends_on_seed_epoch_and_index_alone(folder, workers):
    dataset = open_dataset(folder, seed=3)
    dataset.transform = draw
    alone = [dataset[i][0] for i in (5, 2, 0, 1, 3, 4)]
    loaded = [x for x, _ in DataLoader(dataset, batch_size=None, sampler=[5, 2, 0, 1, 3, 4], num_workers=workers)]
    assert all(torch.equal(a, b) for a, b in zip(alone, loaded, strict=True))
    assert len({x[3].item() for x in alone}) == 6
    for change in (lambda: dataset.set_epoch(1), lambda: setattr(dataset, "seed", 4)):
        before = dataset[5][0]
        change()
        assert not torch.equal(dataset[5][0], before)


def test_drawing_for_an_image_leaves_the_generators_as_they_were(folder):
    dataset = open_dataset(folder)
    dataset.transform = draw
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    dataset[0]
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def spoil(path: Path, way: str) -> str:
    """Make an image unreadable; returns its name as messages have it."""
    content = path.read_bytes()
    path.write_bytes({"text": b"no image", "empty": b"", "cut": content[: len(content) // 2]}[way])
    return str(path)


@pytest.mark.parametrize("way", ["text", "empty", "cut"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_named_and_fatal(folder, way, workers):
    name = spoil(folder / "ants/1.png", way)
    dataset = open_dataset(folder)
    dataset.transform = draw
    with pytest.raises(AugmentError) as raised:
        list(DataLoader(dataset, batch_size=2, num_workers=workers))
    assert str(raised.value).startswith(f"{name} cannot be read: ")
    assert "`on_corrupt='skip'`" in str(raised.value)
    assert "Traceback" not in str(raised.value)
    del raised
    gc.collect()  # ends the worker processes


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_replaced_by_the_next_and_reported(folder, workers):
    names = [spoil(folder / "ants/1.png", "text"), spoil(folder / "bees/2.png", "cut")]
    dataset = open_dataset(folder, on_corrupt="skip")
    dataset.transform = draw
    loaded = [(x[0].item(), y) for x, y in DataLoader(dataset, batch_size=None, num_workers=workers)]
    assert loaded == [(10, 0), (12, 0), (12, 0), (20, 1), (21, 1), (10, 0)]
    assert dataset.corrupt_names() == names


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_beyond_the_classes_are_refused(folder, workers):
    dataset = open_dataset(folder, on_corrupt="skip")
    dataset.transform, dataset.num_classes = draw, 1
    with pytest.raises(AugmentError) as raised:
        list(DataLoader(dataset, num_workers=workers))
    assert str(raised.value) == "an image has the label 1, and there are 1 classes, from 0: see `num_classes`"
    del raised
    gc.collect()


def test_nothing_but_corrupt_images_is_an_error(folder):
    for path in folder.rglob("*.png"):
        spoil(path, "text")
    with pytest.raises(AugmentError, match=r"none of 6 images from .* on can be read"):
        open_dataset(folder, on_corrupt="skip")[0]


def test_a_part_counts_names_and_draws_on_its_own(folder):
    spoil(folder / "bees/0.png", "text")
    whole = open_dataset(folder, on_corrupt="skip")
    part = whole.part([4, 3])
    assert [x for x, _ in grey(part[i] for i in range(2))] == [21, 21]
    assert [Path(name).name for name in part.corrupt_names()] == ["0.png"]
    assert whole.corrupt_names() == []
    part.transform = draw
    assert whole.transform is None


def emptied(folder: Path) -> Path:
    for path in folder.rglob("*.png"):
        path.rename(path.with_suffix(".txt"))
    return folder


def with_folder(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder


def with_file(folder: Path, name: str) -> Path:
    (folder / name).write_text("no tar file")
    return folder


BAD = {
    "missing": (lambda f: f.parent / "dat", "no such folder or file; did you mean data?"),
    "empty": (lambda f: with_folder(f, "new") / "new", "new is an empty folder"),
    "no images": (lambda f: emptied(f), "has no images: of its 6 files, none is a .png, .jpg, .jpeg"),
    "empty class": (lambda f: with_folder(f, "wasps"), "no images in 1 of its class folders, such as wasps"),
    "loose": (lambda f: image(f / "loose.png").parent, "loose.png is in no class folder"),
    "no tar": (lambda f: f / "ants/0.png", "is neither a folder nor a tar file"),
    "broken tar": (lambda f: with_file(f, "x.tar") / "x.tar", "x.tar cannot be read"),
    "no split": (lambda f: with_folder(f, "train"), "has a folder train, but none for the split validation"),
    "no root": (lambda f: "torch/cifar10", "Give their folder as `data_root`"),
    "no shards": (lambda f: f"wds/{f}", "cannot be opened, split validation: split validation not found"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_are_refused_with_the_reason(folder, case):
    make, message = BAD[case]
    with pytest.raises(AugmentError) as raised:
        open_dataset(make(folder), split="validation")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
