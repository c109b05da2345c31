"""Batches cross as bytes and are normalised on the device: the same numbers as timm's transforms give in float32."""

import multiprocessing
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from timm.data import create_loader

from augment_cli.dataset import open_dataset
from augment_cli.training import transfer
from augment_cli.training.accelerators import one_accelerator
from augment_cli.training.data import evaluation_loader, place, training_loader
from augment_cli.training.settings import Settings
from augment_cli.training.transfer import Batch, Collate, aside

CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.3, 0.4, 0.5),
    "std": (0.2, 0.3, 0.4),
    "interpolation": "bilinear",
    "crop_pct": 0.9,
    "crop_mode": "center",
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(params=DEVICES)
def accelerator(request):
    with one_accelerator(cpu=request.param == "cpu") as made:
        yield made


def settings(**changes) -> Settings:
    return Settings("m", "d", "o", batch_size=8, **{"workers": 0, "auto_augment": "rand-m5", **changes})


def in_float(images, accelerator: Accelerator, chosen: Settings):
    """Batches by timm's transforms in float32, in the same order."""
    loader = create_loader(
        open_dataset(images, split="train"),
        CONFIG["input_size"],
        chosen.batch_size,
        is_training=True,
        scale=(chosen.crop_scale, 1.0),
        auto_augment=chosen.auto_augment,
        re_prob=chosen.random_erasing,
        re_mode="pixel",
        mean=CONFIG["mean"],
        std=CONFIG["std"],
        num_workers=0,
        use_prefetcher=False,
    )
    return place(loader, accelerator, seed=chosen.seed)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("erasing", [0.0, 0.7])
def test_bytes_give_the_numbers_of_floats(images, accelerator, workers, erasing):
    chosen = settings(random_erasing=erasing, workers=workers)
    data = open_dataset(images, split="train")
    loader, reference = training_loader(data, chosen, CONFIG, accelerator), in_float(images, accelerator, chosen)
    compared = 0
    for epoch in range(2):
        data.set_epoch(epoch)
        reference.dataset.set_epoch(epoch)
        loader.set_epoch(epoch)
        reference.set_epoch(epoch)
        for (found, labels), (expected, known) in zip(loader, reference, strict=True):
            assert found.device.type == accelerator.device.type
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
            assert torch.equal(labels, known)
            compared += 1
    assert compared == 2 * 4


def test_a_loader_sends_bytes(images):
    """Labels aside, a batch takes a quarter of the memory of float32; what is erased comes on top."""
    with one_accelerator(cpu=True) as accelerator:
        for erasing in (0.0, 1.0):
            loader = training_loader(
                open_dataset(images, split="train"), settings(random_erasing=erasing), CONFIG, accelerator
            )
            batch = next(iter(loader.base_dataloader))
            assert isinstance(batch, Batch)
            assert batch.images.dtype == torch.uint8
            assert (batch.places is None) == (erasing == 0)


def test_channels_innermost_in_memory(images, accelerator):
    data = open_dataset(images, split="val")
    plain, other = (
        next(iter(evaluation_loader(data, 4, 0, CONFIG, accelerator, channels_last=flag)))[0] for flag in (False, True)
    )
    assert plain.is_contiguous()
    assert other.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, other)


def test_grey_images_and_several_erased_parts():
    pixels = [torch.full((1, 2, 3), value) for value in (5.0, 6.0, 7.0)]
    samples = [
        (torch.zeros(1, 8, 8, dtype=torch.uint8), [(0, 1, pixels[0]), (5, 5, pixels[1])]),
        (torch.full((1, 8, 8), 255, dtype=torch.uint8), []),
        (torch.full((1, 8, 8), 51, dtype=torch.uint8), [(6, 0, pixels[2])]),
    ]
    images, labels = Collate((0.5,), (0.5,))(list(zip(samples, (3, 1, 2), strict=True))).to(torch.device("cpu"))
    assert labels.tolist() == [3, 1, 2]
    expected = torch.tensor([-1.0, 1.0, -0.6]).view(3, 1, 1, 1).repeat(1, 1, 8, 8)
    expected[0, :, 0:2, 1:4], expected[0, :, 5:7, 5:8], expected[2, :, 6:8, 0:3] = 5, 6, 7
    torch.testing.assert_close(images, expected)


def test_workers_stay_from_one_epoch_to_the_next(images):
    """They see the epoch all the same: its augmentation is another one, and that of a loader without workers."""
    with one_accelerator(cpu=True) as accelerator:
        made = {}
        for workers in (0, 2):
            data = open_dataset(images, split="train")
            made[workers] = training_loader(data, settings(workers=workers), CONFIG, accelerator), data
        epochs, processes = {0: [], 2: []}, []
        for epoch in range(3):
            for workers, (loader, data) in made.items():
                data.set_epoch(epoch)
                loader.set_epoch(0)  # the same order, so that only augmentation differs
                epochs[workers].append(torch.cat([batch for batch, _ in loader]))
            processes.append({process.pid for process in multiprocessing.active_children()})
        assert len(processes[0]) == 2
        assert processes[0] == processes[1] == processes[2]
        for alone, shared in zip(epochs[0], epochs[2], strict=True):
            assert torch.equal(alone, shared)
        del made, loader
        assert not multiprocessing.active_children()


LEFT_WORKERS = """
import sys
from contextlib import contextmanager
from accelerate import Accelerator
from augment_cli.dataset import open_dataset
from augment_cli.training.data import training_loader
from tests.training.test_transfer import CONFIG, settings
data = open_dataset(sys.argv[1], split="train")
loader = training_loader(data, settings(workers=2), CONFIG, Accelerator(cpu=True))
next(iter(loader))
raise SystemExit(3)
"""


def test_workers_end_with_a_program_that_leaves_them(images):
    """They ignore SIGTERM, by which Python ends them, until the program exits."""
    command = [sys.executable, "-c", LEFT_WORKERS, str(images)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert (ended.returncode, ended.stderr) == (3, "")


def test_what_a_stream_makes_stays_until_the_other_is_done_with_it(monkeypatch):
    """The current stream waits for the copies, and every tensor that leaves is known to be used by it."""
    done = []

    class Stream:
        def __init__(self, name):
            self.name = str(name)

        def wait_stream(self, other):
            done.append(f"{self.name} waits for {other.name}")

    class Made:
        def record_stream(self, stream):
            done.append(f"used by {stream.name}")

    @contextmanager
    def entered(stream):
        done.append(f"into {stream.name}")
        yield
        done.append(f"out of {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    try:
        for _ in range(2):
            with aside(torch.device("cuda:7")) as made:
                made.append(Made())
    finally:
        transfer._stream.cache_clear()
    assert done == 2 * ["into cuda:7", "out of cuda:7", "current waits for cuda:7", "used by current"]
