"""Predicted latency beside measured, over families of models, and beside sites that were timed alone.

    python benchmarks/latency.py [--models resnet18 ...] [--threads 1] [--seconds 40]

Each model is planned for +10% (augment plan --set budget.latency=+10%), and without that budget; both plans are run as
wholes beside the source. The prediction is the sum of the sites' times within the model. `alone` is what the same sum
would be of sites that are timed outside it, each in a loop on its own input. Quote the ratios.
"""

import argparse
import copy
import time

import numpy as np
import torch
from measure import machine, write_results
from torch import nn

from augment_cli.analysis import source
from augment_cli.analysis.graph import analyze
from augment_cli.latency.timer import Timer, plan_within
from augment_cli.planning.plan import Plan
from augment_cli.planning.recipe import Recipe, load_recipe
from augment_cli.surgery.replace import apply_plan

GROUPED = ("select.kinds=grouped", "budget.params=free")
CASES = {
    "resnet18": ("aa", ()),
    "resnet50": ("aa", ()),
    "efficientnetv2_rw_t": ("aa", ()),
    "regnetx_008": ("aa", GROUPED),
    "densenet121": ("aa", ()),
    "vgg11_bn": ("aa", ()),
    "mobilenetv4_conv_small": ("aa", ()),
    "resnext50_32x4d": ("aa", GROUPED),
    "repvgg_a0": ("aa", ()),
    "dla34": ("aa", ()),
    "hrnet_w18_small": ("aa", ()),
    "nf_resnet26": ("aa", ()),
    "resnet18 aw": ("aw", ()),
    "resnet18 batch 8": ("aa", ("latency.batch=8",)),
    "resnet18 training": ("aa", ("latency.batch=8", "latency.mode=training")),
    "densenet121 training": ("aa", ("latency.batch=8", "latency.mode=training")),
}


def run(name: str, options: argparse.Namespace) -> dict:
    recipe_name, overrides = CASES[name]
    settings = (f"latency.threads={options.threads}", f"latency.seconds={options.seconds}")
    recipe = load_recipe(recipe_name, (*overrides, *settings))
    within = load_recipe(recipe_name, (*overrides, *settings, f"budget.latency={options.budget}"))
    described, meta = source.describe(name.split()[0])
    graph = analyze(meta, described.input_size)
    timer = Timer(described, graph, recipe.latency, lambda: source.create(described), cached=False)
    start = time.perf_counter()
    budgeted, _ = plan_within(described, graph, within, timer)
    seconds = round(time.perf_counter() - start, 1)
    plan, _ = plan_within(described, graph, recipe, timer)
    row = {
        "case": name,
        "settings": timer.settings.describe(),
        "milliseconds": round(timer.times().source / 1e6, 2),
        "seconds": seconds,
        "within": beside(budgeted),
        "recipe": beside(plan),
    }
    if recipe.latency.mode == "inference":
        alone = 1 + alone_change(described, plan, recipe, graph.input_size) / timer.times().source
        row["alone"] = {"predicted": round(alone, 4), "off": round(alone / row["recipe"]["measured"]["median"] - 1, 4)}
    return row


def beside(plan: Plan) -> dict:
    """A plan's time as a share of its source's: predicted, measured, and the one over the other, less one."""
    latency = plan.latency
    assert latency is not None
    assert latency.measured is not None
    measured = latency.measured.ratio
    return {
        "sites": len(plan.sites),
        "predicted": round(latency.predicted_ratio, 4),
        "standard_error": round(latency.error / latency.source, 4),
        "measured": {key: round(value, 4) for key, value in measured.model_dump().items()},
        "off": round(latency.predicted_ratio / measured.median - 1, 4),
    }


@torch.inference_mode()
def alone_change(described: source.Source, plan: Plan, recipe: Recipe, input_size: tuple[int, int, int]) -> float:
    """Nanoseconds that the sites add when each is timed alone, on the input that it has in the model."""
    torch.set_num_threads(recipe.latency.threads or 1)
    before = source.create(described).eval()
    after = copy.deepcopy(before)
    apply_plan(after, plan)
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        before.get_submodule(site.name).register_forward_hook(
            lambda m, args, out, name=site.name: inputs.__setitem__(name, args[0].clone())
        )
        for site in plan.sites
    ]
    before(torch.randn(recipe.latency.batch, *input_size))
    for hook in hooks:
        hook.remove()
    return sum(nanoseconds_more(before.get_submodule(name), after.get_submodule(name), x) for name, x in inputs.items())


def nanoseconds_more(one: nn.Module, other: nn.Module, x: torch.Tensor, rounds: int = 25) -> float:
    changes = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        one(x)
        middle = time.perf_counter_ns()
        other(x)
        changes.append(time.perf_counter_ns() - middle - (middle - start))
    return float(np.median(changes[3:]))


def show(row: dict) -> None:
    parts = [f"{row['case']:22s} {row['milliseconds']:7.1f} ms {row['seconds']:5.0f} s"]
    for key in ("within", "recipe"):
        found = row[key]
        low, median, high = (f"{found['measured'][name] - 1:+.1%}" for name in ("low", "median", "high"))
        parts.append(f"{found['sites']:2d} sites {found['predicted'] - 1:+.1%} is {median} ({low} to {high})")
        parts.append(f"off {found['off']:+.1%}")
    if "alone" in row:
        parts.append(f"alone {row['alone']['predicted'] - 1:+.1%} off {row['alone']['off']:+.1%}")
    print("  ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--budget", default="+10%")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    rows = []
    for name in options.models:
        rows.append(run(name, options))
        show(rows[-1])
    if not options.no_write:
        chosen = {"budget": options.budget, "threads": options.threads, "seconds": options.seconds}
        write_results("latency", {"machine": machine(), "options": chosen, "rows": rows})


if __name__ == "__main__":
    main()
