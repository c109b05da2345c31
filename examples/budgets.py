"""Compare what a model would become under several parameter budgets. Needs no weights and no images.

python examples/budgets.py resnet18
"""

import sys

import augment_cli as augment


def main(model: str) -> None:
    print(f"{'budget':>8} {'parameters':>12} {'change':>8} {'GFLOPs':>7} {'attention channels':>19}")
    for budget in ("free", "keep", "-2%", "-10%"):
        try:
            plan = augment.plan(model, "aa", f"budget.params={budget}")
        except augment.AugmentError as error:  # the message says which budgets can be met
            print(f"{budget:>8} {error}")
            continue
        change = plan.params_after / plan.params_before - 1
        channels = sum(site.split.value_channels for site in plan.sites)
        width = sum(site.out_channels for site in plan.sites)
        print(
            f"{budget:>8} {plan.params_after:>12,} {change:>8.2%} {2 * plan.macs_after / 1e9:>7.2f} "
            f"{channels:>6} of {width:,}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["resnet18"])
