"""Divergence along a frontier, predicted beside measured: do plans that are said to change a model less do so?

    python benchmarks/frontier.py [--images 512] [--points 7]

Sources are trained here for a minute or two on tasks of benchmarks/tasks.py. Each site's divergence is measured alone,
as `augment plan --sensitivity` does. Every plan of the frontier is fitted, as `augment convert --init fit` does, and
its divergence from the source is measured on images that neither saw. Trained sources are kept among the temporary
files.
"""

import argparse
import hashlib
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from inherit import log_probabilities, train
from measure import machine, write_results
from scipy.stats import spearmanr
from tasks import SIDE, images
from torch import Tensor, nn

from augment_cli.analysis import source
from augment_cli.analysis.graph import ModelGraph, analyze
from augment_cli.planning.frontier import frontier
from augment_cli.planning.plan import make_plan
from augment_cli.planning.recipe import load_recipe
from augment_cli.surgery.calibration import Calibration
from augment_cli.surgery.inherit import fit
from augment_cli.surgery.sensitivity import measure_sensitivity

MEAN, STD = (0.4,) * 3, (0.3,) * 3  # those of benchmarks/inherit.py, whose training is used
CASES = {
    "test_resnet, recall": ("test_resnet", {}, "recall", 18),
    "resnet10t, digits": ("resnet10t", {"channels": [32, 64, 128, 256]}, "digits", 6),
}
TRAINING, TEST = 6000, 1000


def drawn(task: str, split: str, count: int) -> tuple[Tensor, list[str]]:
    """Bytes (count, 3, SIDE, SIDE) and classes."""
    pictures, labels = zip(*islice(images(task, split), count), strict=True)
    return torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]), list(labels)


def trained(described: source.Source, task: str, classes: list[str], epochs: int) -> dict[str, Tensor]:
    key = hashlib.sha256(repr((described, task, epochs, TRAINING)).encode()).hexdigest()[:16]
    kept = Path(tempfile.gettempdir()) / f"augment-frontier-{key}.pt"
    if not kept.exists():
        pictures, labels = drawn(task, "train", TRAINING)
        model = source.create(described)
        train(model, pictures, torch.tensor([classes.index(label) for label in labels]), epochs)
        torch.save(model.state_dict(), kept)
    return torch.load(kept, weights_only=True)


def run(case: str, options: argparse.Namespace) -> dict:
    name, args, task, epochs = CASES[case]
    test, labels = drawn(task, "validation", TEST)
    classes = sorted(set(labels))
    described, meta = source.describe(name, args | {"num_classes": len(classes)}, (SIDE, SIDE))
    graph = analyze(meta, described.input_size)
    state = trained(described, task, classes, epochs)
    reference = log_probabilities(loaded(described, state), test)
    right = (reference.argmax(1) == torch.tensor([classes.index(label) for label in labels])).double().mean()
    print(f"{case}: accuracy {float(right):.1%}", flush=True)
    calibration = Calibration(drawn(task, "calibration", options.images)[0], MEAN, STD)
    recipe = load_recipe("aa", ("budget.params=free",))
    written, _ = make_plan(described.name, graph, recipe, described.args)
    found = measure_sensitivity(loaded(described, state), written, graph, calibration)
    points = []
    for point in frontier(described, graph, recipe, "params", options.points, found):
        start = time.perf_counter()
        measured = divergence(described, state, graph, point.plan, calibration, test, reference)
        points.append(
            {"params": point.plan.params_after, "predicted": round(point.loss, 6), "measured": round(measured, 6)}
            | {"seconds": round(time.perf_counter() - start, 1)}
        )
        print(f"  {points[-1]}", flush=True)
    ranks = spearmanr([p["predicted"] for p in points], [p["measured"] for p in points]).statistic
    print(f"  rank correlation {ranks:.2f}", flush=True)
    return {
        "case": case,
        "params": graph.params,
        "accuracy": round(float(right), 4),
        "points": points,
        "rank_correlation": round(float(ranks), 3),
    }


def loaded(described: source.Source, state: dict[str, Tensor]) -> nn.Module:
    model = source.create(described)
    model.load_state_dict(state)
    return model.eval()


def divergence(described, state, graph: ModelGraph, plan, calibration, test: Tensor, reference: Tensor) -> float:
    """The mean KL of the fitted model's predictions from the source's, nats."""
    torch.manual_seed(0)  # of what the conversion adds
    model = loaded(described, state)
    fit(model, plan, graph, calibration)
    found = log_probabilities(model, test)
    return float((reference.exp() * (reference - found)).sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--points", type=int, default=7)
    options = parser.parse_args()
    rows = [run(case, options) for case in CASES]
    write_results("frontier", {"machine": machine(), "options": vars(options), "rows": rows})


if __name__ == "__main__":
    main()
