"""A picture of how much replacing each site alone changes a model's output."""

from pathlib import Path

from augment_cli.files import write_file
from augment_cli.planning.plan import Plan
from augment_cli.reporting.style import SERIES, picture


def draw(plan: Plan, path: Path) -> None:
    """Draw a bar for each site's divergence and one for its share of channels given up; PNG, SVG or PDF by suffix.

    Raises:
        AugmentError: the file cannot be written.
    """
    measured = [(site, site.sensitivity) for site in plan.sites if site.sensitivity]
    names = [site.name for site, _ in measured]
    divergences = [sensitivity.divergence for _, sensitivity in measured]
    shares = [100 * site.given_up / site.out_channels for site, _ in measured]

    def write(temporary: Path) -> None:
        with picture(temporary, 9, 1.2 + 0.28 * len(measured), path.suffix[1:]) as figure:
            left, right = figure.subplots(1, 2, sharey=True)
            left.barh(names, divergences, color=SERIES[0][0])
            left.set_xlabel("KL of the predictions, nats,\nwhen this site alone is replaced")
            right.barh(names, shares, color=SERIES[1][0])
            right.set_xlabel("% of the output channels\nthat the plan gives up")
            left.invert_yaxis()
            for axes in (left, right):
                axes.grid(visible=False, axis="y")
            figure.suptitle(f"{plan.model}, recipe {plan.recipe}", fontsize=10)

    write_file(path, write)
