"""A model card: the README.md of a converted model's folder, as the Hugging Face hub reads it."""

import re
from collections.abc import Iterator

from augment_cli.reporting.numbers import Report
from augment_cli.reporting.provenance import TRUST_TERMS, fidelity
from augment_cli.reporting.text import code, escape, sites_table, totals_table
from augment_cli.reporting.units import counted, describe_latency, error, size

_TAGGED = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)+")


def model_card(report: Report) -> str:
    """The card: the model, how to load it, its costs, its sites, its papers and its provenance.

    It names no licence: whoever publishes the model chooses one that the source weights' licence allows.
    """
    parts = [
        _front_matter(report),
        f"# {code(report.model)} with recipe {code(report.recipe.name)}",
        _what(report),
        *_warning(report),
        "## Loading",
        _LOADING if report.base == "timm" else _LOADING_ON_BASE,
        "## What it costs",
        totals_table(report),
        f"Multiply-adds are those of one image of {size(report.input_size)}; FLOPs = 2 x multiply-adds.",
        *([f"Latency {describe_latency(report.timed)}."] if report.timed else []),
        "## What was replaced",
        "![The network: a band for each map size, a bar for each convolution, attention in colour](network.svg)",
        sites_table(report),
        "## What it follows",
        "\n".join(f"- {line}" for line in _follows(report)),
        "## Where it comes from",
        "\n".join(f"- {line}" for line in _provenance(report)),
    ]
    return "\n\n".join(parts) + "\n"


_LOADING = """With augment-cli installed, from this folder, here called `DIR`, or from the hub:

```python
import augment_cli, timm  # with augment_cli imported, timm knows the architecture

model = timm.create_model("local-dir:DIR", pretrained=True)
model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True)
```

or from the file alone:

```python
import augment_cli

model = augment_cli.load("model.safetensors")
```

Each gives a timm model, with timm's usual methods."""


_LOADING_ON_BASE = """The file holds no code. With augment-cli installed, from this folder, here called `DIR`, or by its
name on the hub, `hf-hub:OWNER/NAME`, and a function `make_source` that makes the source's architecture:

```python
import augment_cli

model = augment_cli.load("DIR", base=make_source)
```"""


def _front_matter(report: Report) -> str:
    base = base_model(report)
    timm = report.base == "timm"
    lines = ["library_name: timm" if timm else "library_name: pytorch", *([f"base_model: {base}"] if base else [])]
    tags = ["- image-classification", "- timm", "- augment-cli"] if timm else ["- augment-cli"]
    return "\n".join(["---", *lines, "tags:", *tags, "---"])


def base_model(report: Report) -> str | None:
    """The source weights on the hub; None unless they are pretrained and the model's name tells which."""
    exact = report.weights == "pretrained" and _TAGGED.fullmatch(report.model)
    return f"timm/{report.model}" if exact else None


def _what(report: Report) -> str:
    arguments = ", ".join(f"{key}={value}" for key, value in report.model_args.items())
    whose = "timm's " if report.base == "timm" else ""
    created = f" (created with {code(arguments)})" if arguments else ""
    return (
        f"{whose}{code(report.model)}{created} with {len(report.sites)} of "
        f"{counted(report.convolutions, 'convolution')} replaced: {report.becomes}. "
        f"Converted for images of {size(report.input_size[1:])}."
    )


def _warning(report: Report) -> Iterator[str]:
    """Notes that a user must read before the first prediction."""
    if report.weights and report.weights.startswith("random"):
        yield f"> **Not trained.** The weights are {escape(report.weights)}."
    elif report.exact:
        yield "> As converted, the model computes exactly what its source computes."
    if report.error is not None:
        yield (
            "> **Fitted, not fine-tuned.** Attention stands in for filters of the source and was fitted to what they "
            f"computed, on unlabelled images: its mean squared error is {error(report.error)} of their variance on "
            "average, on images held out of the fit. Filters that were kept are the source's, bit for bit."
        )
        if report.fidelity:
            yield f"> {fidelity(report.fidelity)}"
    elif not report.exact:
        yield (
            "> **Fine-tune before use.** As converted, attention is untrained. It took the places of the least "
            "important filters; those that were kept are the source's, bit for bit."
        )


def _follows(report: Report) -> Iterator[str]:
    recipe = report.recipe
    yield from dict.fromkeys(paper for operator in report.operators for paper in operator.papers)
    yield from dict.fromkeys(operator.reading for operator in report.operators if operator.reading)
    if not recipe.description:
        yield f"Recipe {code(recipe.name)}, which is not one of augment-cli's own."
        return
    yield f"Recipe {code(recipe.name)}{recipe.departure}: {escape(recipe.description)}."
    if recipe.paper:
        yield f"Recipe as it is in augment-cli: {escape(recipe.paper.table)}. Trust: {escape(recipe.paper.trust)}."
        yield f"Words of trust: {escape(TRUST_TERMS)}."


def _provenance(report: Report) -> Iterator[str]:
    facts = {
        "Recipe SHA-256": report.recipe.sha256,
        "Plan SHA-256": report.plan_sha256,
        "Source weights": report.weights,
        "Source SHA-256": report.source_sha256,
        "Versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    }
    for title, text in facts.items():
        if text:
            yield f"{title}: {code(text)}"
