"""Time to read, augment and normalise an image on the CPU: our loader beside timm's, and beside one that sends floats.

    OMP_NUM_THREADS=1 python benchmarks/loader.py [--rounds 15] [--size 224]

All three read the same files with the same transform of timm's, without worker processes and with two. "timm" is timm's
create_loader with its prefetcher. "ours" is what `augment finetune` trains on: each image is seeded for itself, so that
its augmentation depends on seed, epoch and index only; workers send bytes, the main process normalises. "floats" is
the same with images normalised by the workers. Rounds interleave, so that a busy machine slows all. Quote the median of
the rounds' ratios.
"""

import argparse
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from measure import interleaved, machine, quartiles, ratios, write_results
from PIL import Image
from timm.data import create_dataset, create_loader

from augment_cli.dataset import open_dataset
from augment_cli.training.data import place, training_loader
from augment_cli.training.settings import Settings

IMAGES, BATCH = 512, 64
NORMAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def write_images(folder: Path, size: int) -> None:
    """Smooth JPEGs, as photographs are, of two classes."""
    noise = np.random.default_rng(0)
    for i in range(IMAGES):
        place = folder / str(i % 2)
        place.mkdir(exist_ok=True)
        small = Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(place / f"{i:04}.jpg", quality=90)


def loaders(folder: str, size: int, workers: int) -> dict[str, object]:
    accelerator = Accelerator(cpu=True)
    shape, common = (3, size, size), {**NORMAL, "interpolation": "bicubic", "num_workers": workers}
    options = {**common, "is_training": True, "scale": (0.35, 1.0), "color_jitter": 0.4}
    settings = Settings("", folder, "", batch_size=BATCH, workers=workers, crop_scale=0.35, color_jitter=0.4)
    config = {"input_size": shape, **NORMAL, "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
    timms, floats = create_dataset("", root=folder, search_split=False), open_dataset(folder)
    return {
        "timm": create_loader(timms, shape, BATCH, device=torch.device("cpu"), **options),
        "ours": training_loader(open_dataset(folder), settings, config, accelerator),
        "floats": place(create_loader(floats, shape, BATCH, use_prefetcher=False, **options), accelerator, seed=0),
    }


def read(loader: object) -> None:
    for images, _ in loader:
        assert images.dtype == torch.float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=224)
    asked: SimpleNamespace = parser.parse_args()
    rows, compared = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), 2 * asked.size)
        for workers in (0, 2):
            functions = {
                name: lambda loader=loader: read(loader)
                for name, loader in loaders(folder, asked.size, workers).items()
            }
            seconds = interleaved(functions, asked.rounds, lambda: None)
            for name, values in seconds.items():
                rows[f"{name}, {workers} workers"] = quartiles([1000 * value / IMAGES for value in values])
            for name in ("timm", "floats"):
                compared[f"to {name}, {workers} workers"] = ratios(seconds["ours"], seconds[name])
    for name, row in rows.items():
        print(f"{name:20s} {row['median']:.3f} ms an image")
    for name, row in compared.items():
        print(f"{name:20s} {row['median']:.3f} x")
    sizes = {"images": IMAGES, "batch": BATCH, "size": asked.size, "files": 2 * asked.size}
    results = {"machine": machine(), "rounds": asked.rounds, **sizes}
    write_results("loader", {**results, "milliseconds_per_image": rows, "ratios": compared})


if __name__ == "__main__":
    main()
