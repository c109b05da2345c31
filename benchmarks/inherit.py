"""Agreement of converted models with their source before any fine-tuning: fitted, carried, or untrained throughout.

    python benchmarks/inherit.py [--epochs 9] [--images 512]

Sources are narrow ResNet-18s trained here, from scratch, on two tasks of real images at 96 px: scikit-learn's digits,
enlarged, moved, tinted, half hidden and noisy; and crops of its two sample photographs, to be told apart by the part of
the picture that they come from. Test images are others than those that the source is trained on and those that the
attention is fitted to. Needs scikit-learn. Trained sources are kept among the temporary files for the next run.
"""

import argparse
import hashlib
import inspect
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measure import machine, write_results
from torch import Tensor, nn

from augment_cli.analysis import source
from augment_cli.analysis.graph import analyze
from augment_cli.planning.plan import make_plan
from augment_cli.planning.recipe import load_recipe
from augment_cli.surgery import replace
from augment_cli.surgery.calibration import Calibration
from augment_cli.surgery.inherit import carry, fit

SIZE = 96
MODEL, WIDTHS = "resnet18", (32, 64, 128, 256)
RATIOS = ((0.2, 0.1), (0.25, 0.25))
TRAINING, TEST = 3000, 1000
MEAN, STD = (0.4,) * 3, (0.3,) * 3

Drawer = Callable[[np.random.Generator, tuple[float, float]], tuple[np.ndarray, int]]


def digits() -> tuple[Drawer, int]:
    """Images (SIZE, SIZE, 3) of 0 to 1 and labels; each part of the data has digits of its own."""
    from sklearn.datasets import load_digits

    data = load_digits()

    def draw(generator: np.random.Generator, part: tuple[float, float]) -> tuple[np.ndarray, int]:
        first, last = (int(end * len(data.images)) for end in part)
        index = generator.integers(first, last)
        side = int(generator.integers(40, 84))
        digit = _resized(data.images[index][..., None] / 16, side)[..., 0]
        canvas = np.full((SIZE, SIZE), generator.uniform(0, 0.3))
        y, x = generator.integers(0, SIZE - side + 1, 2)
        canvas[y : y + side, x : x + side] = np.maximum(
            canvas[y : y + side, x : x + side], digit * generator.uniform(0.5, 1)
        )
        y, x, height, width = (*generator.integers(0, SIZE - 33, 2), *generator.integers(10, 34, 2))
        canvas[y : y + height, x : x + width] = generator.uniform(0, 1)
        return canvas[..., None] * generator.uniform(0.6, 1, 3), int(data.target[index])

    return draw, 10


def photographs() -> tuple[Drawer, int]:
    """Crops of two photographs and which of their 12 fields each they come from."""
    from sklearn.datasets import load_sample_images

    images = [image / 255 for image in load_sample_images().images]

    def draw(generator: np.random.Generator, part: tuple[float, float]) -> tuple[np.ndarray, int]:
        label = int(generator.integers(0, 24))
        image, (row, column) = images[label // 12], divmod(label % 12, 4)
        height, width = image.shape[0] // 3, image.shape[1] // 4
        side = int(generator.integers(40, 90))
        y = row * height + generator.integers(0, height - side + 1)
        x = column * width + generator.integers(0, width - side + 1)
        crop = _resized(image[y : y + side, x : x + side], SIZE)[:, :: generator.choice((-1, 1))]
        return (crop - crop.mean()) * generator.uniform(0.5, 1.3) + generator.uniform(0.3, 0.7), label

    return draw, 24


TASKS = {"digits": digits, "photographs": photographs}
PARTS = {"training": (0.0, 0.5), "test": (0.5, 0.78), "calibration": (0.78, 1.0)}


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    tensor = torch.from_numpy(np.ascontiguousarray(image)).float().permute(2, 0, 1).unsqueeze(0)
    resized = F.interpolate(tensor, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()


def images_of(draw: Drawer, part: str, count: int) -> tuple[Tensor, Tensor]:
    """Bytes (count, 3, SIZE, SIZE) and labels (count,), with noise on every pixel."""
    generator = np.random.default_rng(list(PARTS).index(part))
    images, labels = np.empty((count, SIZE, SIZE, 3), np.uint8), np.empty(count, np.int64)
    for i in range(count):
        image, labels[i] = draw(generator, PARTS[part])
        noisy = image + generator.normal(0, 0.1, image.shape)
        images[i] = (noisy.clip(0, 1) * 255).round()
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def normalized(images: Tensor) -> Tensor:
    return (images.float() / 255 - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.15)
    model.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(images)).split(64)[: len(images) // 64]:
            loss = F.cross_entropy(model(normalized(images[rows])), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"  epoch {epoch + 1} of {epochs}: loss {float(loss.detach()):.3f}", flush=True)
    model.eval()


def trained_state(task: str, described: source.Source, data: tuple[Tensor, Tensor], epochs: int) -> dict[str, Tensor]:
    """The source's weights: trained, or those of an earlier run with the same data and training."""
    code = "".join(map(inspect.getsource, (TASKS[task], images_of, _resized, train)))
    digest = hashlib.sha256(f"{code}{SIZE}{WIDTHS}{TRAINING}{epochs}".encode()).hexdigest()[:16]
    kept = Path(tempfile.gettempdir()) / f"augment-inherit-{task}-{digest}.pt"
    model = source.create(described, seed=0)
    if not kept.exists():
        train(model, *data, epochs)
        torch.save(model.state_dict(), kept)
    return torch.load(kept, weights_only=True)


@torch.no_grad()
def log_probabilities(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(normalized(batch)) for batch in images.split(100)]).double().log_softmax(1)


class Trained:
    """A source trained on a task, and the images that conversions of it are fitted to and measured on."""

    def __init__(self, task: str, epochs: int, count: int) -> None:
        draw, classes = TASKS[task]()
        args = {"num_classes": classes, "channels": list(WIDTHS)}
        self.described, meta = source.describe(MODEL, args, (SIZE, SIZE))
        self.graph = analyze(meta, self.described.input_size)
        self.state = trained_state(task, self.described, images_of(draw, "training", TRAINING), epochs)
        self.calibration = Calibration(images_of(draw, "calibration", count)[0], MEAN, STD)
        self.images, self.labels = images_of(draw, "test", TEST)
        self.reference = log_probabilities(self.model(), self.images)

    def model(self) -> nn.Module:
        model = source.create(self.described, seed=0)
        model.load_state_dict(self.state)
        torch.manual_seed(0)  # of what conversions add
        return model.eval()

    def beside(self, model: nn.Module) -> dict[str, float]:
        """Agreement with the source's first classes, mean KL in nats, and accuracy."""
        found = log_probabilities(model, self.images)
        return {
            "agreement": round(float((found.argmax(1) == self.reference.argmax(1)).double().mean()), 4),
            "divergence": round(float((self.reference.exp() * (self.reference - found)).sum(1).mean()), 5),
            "accuracy": round(float((found.argmax(1) == self.labels).double().mean()), 4),
        }


def run_task(task: str, epochs: int, count: int) -> list[dict]:
    trained = Trained(task, epochs, count)
    graph, calibration = trained.graph, trained.calibration
    rows = [{"task": task, "init": "source", **trained.beside(trained.model())}]
    for key_ratio, value_ratio in RATIOS:
        ratios = (f"aa.key_ratio={key_ratio}", f"aa.value_ratio={value_ratio}")
        recipe = load_recipe("aa", ("budget.params=free", "select.stages=[2,3,4]", *ratios))
        plan, _ = make_plan(trained.described.name, graph, recipe, trained.described.args)
        ways = {
            "last, untrained": lambda model, plan=plan: replace.apply_plan(model, plan),
            "carry": lambda model, plan=plan: carry(model, plan, graph),
            "fit": lambda model, plan=plan: fit(model, plan, graph, calibration),
        }
        for init, convert in ways.items():
            model, start = trained.model(), time.perf_counter()
            records = convert(model) or ()
            row = {"task": task, "key_ratio": key_ratio, "value_ratio": value_ratio, "sites": len(plan.sites)}
            row |= {"init": init, "seconds": round(time.perf_counter() - start, 1)}
            errors = {record.name: record.error for record in records if record.error is not None}
            row |= {"error": round(statistics.mean(errors.values()), 4), "errors": errors} if errors else {}
            rows.append(row | trained.beside(model))
            show(rows[-1])
    return rows


def show(row: dict) -> None:
    ratios = f"{row['key_ratio']}/{row['value_ratio']}" if "key_ratio" in row else ""
    error = f"{row['error']:.3f}" if "error" in row else "-"
    print(
        f"{row['task']:12s} {ratios:10s} {row['init']:16s} agreement {100 * row['agreement']:5.1f}%   "
        f"KL {row['divergence']:8.5f}   accuracy {100 * row['accuracy']:5.1f}%   error {error}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--images", type=int, default=512)
    options = parser.parse_args()
    rows = [row for task in TASKS for row in run_task(task, options.epochs, options.images)]
    write_results("inherit", {"machine": machine(), "calibration_images": options.images, "rows": rows})
    for row in rows:
        show(row)


if __name__ == "__main__":
    main()
