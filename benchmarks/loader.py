"""Time to read and augment an image, here and by timm's own loader of the same files, side by side in one run.

    OMP_NUM_THREADS=1 python benchmarks/loader.py [--rounds 15]

Both loaders are timm's create_loader with the same transform, without worker processes and with one; data sets differ:
ours seeds every image for itself, so that its augmentation depends on seed, epoch and index alone. Rounds interleave,
so that a busy machine slows both. Quote the median of the rounds' ratios.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from measure import interleaved, machine, quartiles, write_results
from PIL import Image
from timm.data import create_dataset, create_loader

from augment_cli.dataset import open_dataset

IMAGES, SIZE, BATCH = 512, (128, 128), 64


def write_images(folder: Path) -> None:
    """Smooth JPEGs, as photographs are, of two classes."""
    noise = np.random.default_rng(0)
    for i in range(IMAGES):
        place = folder / str(i % 2)
        place.mkdir(exist_ok=True)
        small = Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize(SIZE, Image.Resampling.BICUBIC).save(place / f"{i:04}.jpg", quality=90)


def loader(dataset, workers: int):
    options = {"is_training": True, "scale": (0.35, 1.0), "color_jitter": 0.4, "use_prefetcher": False}
    return create_loader(dataset, (3, 64, 64), BATCH, num_workers=workers, persistent_workers=False, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    rows, ratios = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        for workers in (0, 1):
            loaders = {
                "timm": loader(create_dataset("", root=folder, search_split=False), workers),
                "ours": loader(open_dataset(folder), workers),
            }
            functions = {name: lambda loader=loader: list(loader) for name, loader in loaders.items()}
            seconds = interleaved(functions, rounds, lambda: None)
            for name, values in seconds.items():
                rows[f"{name}, {workers} workers"] = quartiles([1000 * value / IMAGES for value in values])
            pairs = zip(seconds["ours"], seconds["timm"], strict=True)
            ratios[f"{workers} workers"] = quartiles([own / timms for own, timms in pairs])
    for name, row in rows.items():
        print(f"{name:16s} {row['median']:.3f} ms an image")
    for name, row in ratios.items():
        print(f"{name:16s} {row['median']:.3f} x")
    results = {"machine": machine(), "rounds": rounds, "milliseconds_per_image": rows, "ratios": ratios}
    write_results("loader", results)


if __name__ == "__main__":
    main()
