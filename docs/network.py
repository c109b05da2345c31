"""Draw docs/assets/aa-resnet50.png: the convolutions of AA-ResNet-50 under ResNet-50's parameter budget.

python docs/network.py
"""

from itertools import groupby
from pathlib import Path

import matplotlib as mpl
import timm
import torch
from torch import nn

import augment_cli as augment

mpl.use("Agg")
from matplotlib import pyplot as plt

MODEL, RECIPE, OVERRIDE = "resnet50", "aa-resnet", "budget.params=keep"
PICTURE = Path(__file__).parent / "assets" / "aa-resnet50.png"
KEPT, ATTENTION, PLAIN, INK = "#4c78a8", "#f58518", "#d5d9e0", "#24292f"


def draw(plan: augment.Plan, path: Path) -> None:
    """A bar for each convolution, in the order of the model: its parameters, and what of them is attention."""
    with torch.device("meta"):
        model = timm.create_model(plan.model)
    convolutions = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    sites = {site.name: site for site in plan.sites}
    figure, axes = plt.subplots(figsize=(10, 3.3), layout="constrained")
    for x, (name, conv) in enumerate(convolutions):
        before = conv.weight.numel() / 1e6
        if name not in sites:
            axes.bar(x, before, color=PLAIN)
            continue
        site = sites[name]
        kept = before * (1 - site.split.value_channels / site.out_channels)
        axes.bar(x, kept, color=KEPT)
        axes.bar(x, site.params_after / 1e6 - kept, bottom=kept, color=ATTENTION)
        axes.bar(x, before, fill=False, edgecolor=INK, linewidth=0.8)
    _label(axes, [name.split(".")[0] for name, _ in convolutions])
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (PLAIN, KEPT, ATTENTION)]
    handles.append(plt.Rectangle((0, 0), 1, 1, fill=False, edgecolor=INK))
    labels = ["convolution left as it is", "filters kept, bit for bit", "attention", "3x3 convolution before"]
    axes.legend(handles, labels, loc="upper left", facecolor="white", edgecolor="none", framealpha=1)
    axes.set_title(
        f"{plan.model}, {len(plan.sites)} of {len(convolutions)} convolutions augmented: "
        f"{plan.params_before:,} parameters before, {plan.params_after:,} after",
        fontsize=11,
    )
    figure.savefig(path, dpi=150, metadata={"Software": None}, pil_kwargs={"optimize": True})


def _label(axes: plt.Axes, stages: list[str]) -> None:
    """The model's stages under the bars."""
    places = {stage: [i for i, _ in group] for stage, group in groupby(enumerate(stages), key=lambda item: item[1])}
    axes.set_xticks([sum(found) / len(found) for found in places.values()], list(places))
    for found in places.values():
        axes.axvline(found[-1] + 0.5, color=PLAIN, linewidth=0.8)
    axes.set_xlim(-0.7, len(stages) - 0.3)
    axes.set_ylabel("parameters, millions")
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    draw(augment.plan(MODEL, RECIPE, OVERRIDE), PICTURE)
