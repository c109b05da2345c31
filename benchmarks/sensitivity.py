"""Plans of equal budgets made with and without `plan --sensitivity`, both fitted.

    python benchmarks/sensitivity.py [--epochs 9] [--images 512]

Sources, tasks and images are those of benchmarks/inherit.py. Agreement with the source and divergence are measured on
unseen images, before any fine-tuning.
"""

import argparse
import statistics
import time

from inherit import TASKS, Trained
from measure import machine, write_results

from augment_cli.planning.plan import Plan, Sensitivity, make_plan
from augment_cli.planning.recipe import load_recipe
from augment_cli.surgery.inherit import fit
from augment_cli.surgery.sensitivity import measure_sensitivity

BUDGETS = ("keep", "-5%")


def run_task(task: str, epochs: int, count: int) -> list[dict]:
    trained, rows = Trained(task, epochs, count), []
    described, graph, calibration = trained.described, trained.graph, trained.calibration
    for budget in BUDGETS:
        recipe = load_recipe("aa", (f"budget.params={budget}", "select.stages=[2,3,4]"))

        def planned(sensitivity: dict[str, Sensitivity] | None = None, recipe=recipe) -> Plan:
            return make_plan(described.name, graph, recipe, described.args, sensitivity)[0]

        start = time.perf_counter()
        found = measure_sensitivity(trained.model(), planned(), graph, calibration)
        seconds = round(time.perf_counter() - start, 1)
        for name, plan in (("plain", planned()), ("sensitivity", planned(found))):
            model = trained.model()
            errors = [record.error for record in fit(model, plan, graph, calibration) if record.error is not None]
            rows.append(
                {"task": task, "budget": budget, "plan": name, "params": sum(p.numel() for p in model.parameters())}
                | {"value_channels": {site.name: site.given_up for site in plan.sites}}
                | {"error": round(statistics.mean(errors), 4), **trained.beside(model)}
                | {"divergences": {site: measured.divergence for site, measured in found.items()}, "seconds": seconds}
            )
            show(rows[-1])
    return rows


def show(row: dict) -> None:
    print(
        f"{row['task']:12s} {row['budget']:5s} {row['plan']:12s} {row['params']:10,} parameters   "
        f"agreement {100 * row['agreement']:5.1f}%   KL {row['divergence']:8.5f}   "
        f"accuracy {100 * row['accuracy']:5.1f}%   "
        f"error {row['error']:.3f}   values {list(row['value_channels'].values())}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--images", type=int, default=512)
    options = parser.parse_args()
    rows = [row for task in TASKS for row in run_task(task, options.epochs, options.images)]
    write_results("sensitivity", {"machine": machine(), "calibration_images": options.images, "rows": rows})


if __name__ == "__main__":
    main()
