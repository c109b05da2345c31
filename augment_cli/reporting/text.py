"""A report as JSON, CSV and Markdown."""

import csv
import io
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from augment_cli.operators import get_operator
from augment_cli.reporting.folding import Line, fold, fold_names
from augment_cli.reporting.numbers import Change, Limit, Report, SiteRow
from augment_cli.reporting.provenance import fidelity
from augment_cli.reporting.units import (
    UNITS,
    amount,
    counted,
    describe_latency,
    duration,
    error,
    percent,
    share,
    signed_amount,
    signed_duration,
    size,
    span,
)
from augment_cli.terminal import plain

SCHEMA = 1


def to_json(report: Report) -> str:
    """The whole report as JSON, numbers as numbers. A value that is unknown or does not apply is null."""
    recipe = report.recipe
    data = {
        "schema": SCHEMA,
        "base": report.base,
        "model": report.model,
        "model_args": report.model_args,
        "input_size": report.input_size,
        "recipe": {
            "name": recipe.name,
            "sha256": recipe.sha256,
            "status": recipe.status,
            "paper": recipe.paper.model_dump() if recipe.paper else None,
        },
        "plan_sha256": report.plan_sha256,
        "units": UNITS,
        "totals": {
            "params": _change(report.params) | _limit(report.params_limit),
            "macs": _change(report.macs) | _limit(report.macs_limit),
            "flops": _change(report.flops),
            "latency": _change(report.latency) | _limit(report.latency_limit) if report.latency else None,
        },
        "sites_totals": {
            "sites": len(report.sites),
            "convolutions": report.convolutions,
            "params": _change(report.sites_params),
            "macs": _change(report.sites_macs),
            "ratios": {name: asdict(ratio) for name, ratio in report.ratios.items()},
            "inheritance": report.inheritance,
            "error": report.error,
        },
        "sites": [_site(site) for site in report.sites],
        "latency": report.timed.model_dump(exclude={"sites", "splits"}) if report.timed else None,
        "fidelity": report.fidelity.model_dump() if report.fidelity else None,
        "skipped": [
            {"reason": group.reason, "count": len(group.names), "names": group.names} for group in report.skipped
        ],
        "weights": report.weights,
        "source_sha256": report.source_sha256,
        "versions": report.versions,
    }
    return json.dumps(data, indent=2) + "\n"


def _change(change: Change) -> dict[str, Any]:
    keys = ("before", "after", "delta", "percent", "ratio")
    return {key: getattr(change, key) for key in keys}


def _limit(limit: Limit) -> dict[str, Any]:
    return {"budget": limit.asked, "limit": limit.most, "left": limit.left}


def _site(site: SiteRow) -> dict[str, Any]:
    data = asdict(site) | {"params": _change(site.params), "macs": _change(site.macs), "ratios": dict(site.ratios)}
    data["latency"] = _change(site.latency) if site.latency else None
    data["sensitivity"] = site.sensitivity.model_dump() if site.sensitivity else None
    data["inheritance"] = site.inheritance.model_dump(exclude={"name"}) if site.inheritance else None
    return data


def to_csv(report: Report) -> str:
    """A row of names and a row for each site, numbers in full. A value that is unknown or does not apply is empty."""
    stream = io.StringIO()
    rows = [_csv_row(site) for site in report.sites]
    splits = dict.fromkeys(name for row in rows for name in row["split"])
    names = [name for key in rows[0] for name in (splits if key == "split" else [key])]
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.pop("split") | row for row in rows)
    return stream.getvalue()


def _csv_row(site: SiteRow) -> dict[str, Any]:
    row = asdict(site)
    for key, sides in (("kernel_size", "kernel"), ("stride", "stride"), ("resolution", "map")):
        row |= {f"{sides}_height": row[key][0], f"{sides}_width": row.pop(key)[1]}
    for key in ("params", "macs"):
        change = getattr(site, key)
        row |= {f"{key}_before": change.before, f"{key}_after": change.after, f"{key}_delta": change.delta}
        del row[key]
    latency = row.pop("latency")
    record, alone = row.pop("inheritance"), row.pop("sensitivity")
    del row["ratios"], row["given_up"]
    row["name"] = cell(row["name"])
    return row | {
        "inheritance": record.kind if record else None,
        "filters_kept": record.kept if record else None,
        "filters_given_up": record.given_up if record else None,
        "importance_share": record.share if record else None,
        "error": site.error,
        "agreement_alone": alone.agreement if alone else None,
        "divergence_alone": alone.divergence if alone else None,
        "nanoseconds_before": latency["before"] if latency else None,
        "nanoseconds_after": latency["after"] if latency else None,
    }


def cell(text: str) -> str:
    """Text for a cell of a CSV file that a spreadsheet shows and does not compute.

    >>> cell("=1+1"), cell("layer1.0.conv1")
    ("'=1+1", 'layer1.0.conv1')
    """
    text = plain(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def to_markdown(report: Report) -> str:
    """Totals, the sites, and the convolutions that stay, by reason. Numbers in full are in JSON and CSV."""
    skipped = sum(len(group.names) for group in report.skipped)
    parts = [
        f"# {code(report.model)} with recipe {code(report.recipe.name)}",
        f"{len(report.sites)} of {counted(report.convolutions, 'convolution')} replaced, "
        f"for images of {size(report.input_size)}.",
        totals_table(report),
        "Multiply-adds are those of one image; FLOPs = 2 x multiply-adds.",
        *([f"Latency {describe_latency(report.timed)}."] if report.timed else []),
        *([fidelity(report.fidelity)] if report.fidelity else []),
        f"## {counted(len(report.sites), 'site')}",
        sites_table(report),
    ]
    if skipped:
        parts += [f"## {counted(skipped, 'convolution stays as it is', 'convolutions stay as they are')}"]
        parts += [skipped_table(report)]
    return "\n\n".join(parts) + "\n"


def totals_table(report: Report) -> str:
    """Parameters, multiply-adds and FLOPs of the whole model, and the rest of the budget."""
    params = (f"{report.params.before:,}", f"{report.params.after:,}", f"{report.params.delta:+,}")
    rows = [
        ("Parameters", *params, percent(report.params.percent), *_markdown_limit(report.params_limit)),
        ("Multiply-adds", *_amounts(report.macs), *_markdown_limit(report.macs_limit)),
        ("FLOPs", *_amounts(report.flops), "", ""),
    ]
    if report.latency:
        left = report.latency_limit.left
        limit = report.latency_limit.asked, "" if left is None else duration(left)
        rows.append(("Predicted time", *_durations(report.latency), *limit))
    if report.measured_latency:
        rows.append(("Measured time", *_durations(report.measured_latency), "", ""))
    return markdown_table(("Whole model", "Before", "After", "Change", "%", "Budget", "Left"), rows)


def _amounts(change: Change) -> tuple[str, ...]:
    return amount(change.before), amount(change.after), signed_amount(change.delta), percent(change.percent)


def _durations(change: Change) -> tuple[str, ...]:
    return duration(change.before), duration(change.after), signed_duration(change.delta), percent(change.percent)


def _markdown_limit(limit: Limit) -> tuple[str, str]:
    return limit.asked, "" if limit.left is None else f"{limit.left:,}"


def sites_table(report: Report) -> str:
    """A row for equal sites: what they become, the changes of their counts, and what was kept of the source."""
    titles = ["Sites", "Becomes", "Parameters", "Multiply-adds", *(["Time"] if report.sites_latency else [])]
    titles += (["Kept"] if report.inheritance else []) + (["Error"] if report.error is not None else [])
    return markdown_table(titles, (_row(line, report) for line in fold(report.sites)), left=2)


def _row(line: Line, report: Report) -> list[str]:
    number = f" ({len(line.sites)})" if len(line.sites) > 1 else ""
    becomes = get_operator(line.site.operator).describe(line.site.split)
    row = [code(line.name) + number, becomes, percent(line.params.percent), percent(line.macs.percent)]
    if report.sites_latency:
        row.append(percent(line.latency.percent) if line.latency else "")
    if report.inheritance:
        records = [site.inheritance for site in line.sites if site.inheritance]
        row.append(span((record.share for record in records), share) if records else "")
    if report.error is not None:
        errors = [site.error for site in line.sites if site.error is not None]
        row.append(span(errors, error) if errors else "")
    return row


def skipped_table(report: Report) -> str:
    """The convolutions that stay as they are, by reason."""
    rows = (
        (str(len(group.names)), escape(group.reason), ", ".join(code(short) for short, _ in fold_names(group.names)))
        for group in report.skipped
    )
    return markdown_table(("Number", "Why", "Which"), rows, left=0, right=1)


def markdown_table(
    titles: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1, right: int | None = None
) -> str:
    """A table whose first `left` columns are text and the next `right`, or all others, numbers."""
    titles = list(titles)
    right = len(titles) - left if right is None else right
    rule = ["---"] * left + ["---:"] * right + ["---"] * (len(titles) - left - right)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows))


def code(text: str) -> str:
    """Any text as a Markdown code span, safe in a table too."""
    text = plain(text).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if text.startswith("`") or text.endswith("`") else f"{fence}{text}{fence}"


def escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", plain(text))
