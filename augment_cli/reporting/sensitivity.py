"""A picture of how much replacing each site alone changes a model's output."""

from pathlib import Path

from augment_cli.files import write_file
from augment_cli.planning.plan import Plan


def draw(plan: Plan, path: Path) -> None:
    """Draw a bar for each site's divergence and one for its share of channels given up; PNG, SVG or PDF by suffix.

    Raises:
        AugmentError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    measured = [(site, site.sensitivity) for site in plan.sites if site.sensitivity]
    names = [site.name for site, _ in measured]
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(measured)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(names, [sensitivity.divergence for _, sensitivity in measured], color="#4269d0")
    left.set_xlabel("KL of the predictions, nats,\nwhen this site alone is replaced")
    right.barh(names, [site.given_up / site.out_channels for site, _ in measured], color="#ff725c")
    right.set_xlabel("share of output channels\nthat the plan gives up")
    left.invert_yaxis()
    figure.suptitle(f"{plan.model}, recipe {plan.recipe}")
    write_file(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:], dpi=120))
