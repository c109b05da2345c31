"""Plans from outside: read from JSON, held against a model and against their own budget."""

import json
from pathlib import Path
from typing import Any

from augment_cli.analysis.facts import Analysis
from augment_cli.analysis.site import ConvSite
from augment_cli.errors import BudgetError, InputError, boundary, nearest
from augment_cli.files import read_text
from augment_cli.operators import get_operator
from augment_cli.planning.budget import number, show
from augment_cli.planning.plan import SCHEMA, Plan, SitePlan, Skipped, site_plan, validating
from augment_cli.planning.recipe import resolve_amount
from augment_cli.planning.selection import obstacle

# A plan with its reasons, for the timm model of most convolutions, takes less than a megabyte.
_LARGEST_FILE = 32 * 2**20


def read_plan(path: Path) -> Plan:
    """A plan from its JSON file, as `augment plan --json` prints it.

    Raises:
        AugmentError: no such file, no JSON, or no plan.
    """
    return parse_plan(read_text(path, "plan", _LARGEST_FILE), f"plan {path}")


def parse_plan(text: str, origin: str) -> Plan:
    """A plan from JSON; `origin` names it in messages."""
    with boundary(f"{origin} is not JSON"):
        data = json.loads(text)
    check_schema(data, origin)
    return validate_plan(data, origin)


def validate_plan(data: Any, origin: str) -> Plan:
    """A plan from its JSON object; `origin` names it in messages.

    Raises:
        AugmentError: it is not valid.
    """
    with validating(origin):
        return Plan.model_validate(data)


def check_schema(data: Any, origin: str) -> None:
    """Refuse data of a newer schema than this version reads, before anything else of it is looked at."""
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise InputError(f"{origin} has schema {schema}, and this version reads {SCHEMA}: install a newer augment-cli")


@validating("the plan")
def fit_plan(plan: Plan, graph: Analysis, origin: str) -> Plan:
    """A plan that was edited or read, held against the model: its counts made anew, what it leaves out skipped.

    Raises:
        AugmentError: a site that the model does not have, or has in another shape.
    """
    sites_of = {site.name: site for site in graph.sites}
    fitted = tuple(_fit_site(entry, sites_of, origin) for entry in plan.sites)
    taken = {entry.name for entry in fitted}
    reasons = {entry.name: entry.reason for entry in plan.skipped}
    skipped = tuple(
        Skipped.of(site, reasons.get(name, "not in the plan")) for name, site in sites_of.items() if name not in taken
    )
    found = {"input_size": graph.input_size, "params_before": graph.params, "macs_before": graph.macs}
    return Plan(**dict(plan) | found | {"sites": fitted, "skipped": skipped})


def check_budget(plan: Plan, origin: str) -> None:
    """Refuse a plan that is over its own budget.

    Raises:
        AugmentError: says by how much.
    """
    if plan.latency is None and plan.budget.latency != "free":
        raise BudgetError(
            f"{origin} has budget.latency={plan.budget.latency}, and the latency of its sites as they are now was not "
            f"measured: `augment plan --plan FILE --latency --json` measures it; or set budget.latency=free"
        )
    timed = (plan.latency.source, plan.latency.predicted) if plan.latency else (0, 0)
    counts = {"params": (plan.params_before, plan.params_after), "macs": (plan.macs_before, plan.macs_after)}
    for name, (before, after) in (counts | {"latency": timed}).items():
        asked = getattr(plan.budget, name)
        most = resolve_amount(asked, before)
        if most is not None and after > most:
            raise BudgetError(
                f"{origin} has {show(name, after)}, {number(name, after - most)} more than its budget.{name}={asked} "
                f"allows. Edit its sites or its budget, or set another one, such as budget.{name}=free"
            )


def _fit_site(entry: SitePlan, sites_of: dict[str, ConvSite], origin: str) -> SitePlan:
    site = sites_of.get(entry.name)
    if site is None:
        raise InputError(f"{origin}: the model has no convolution {entry.name}{nearest(entry.name, sites_of)}")
    for key in ("in_channels", "out_channels", "kernel_size", "stride", "groups", "resolution"):
        planned, actual = getattr(entry, key), getattr(site, key)
        if planned != actual:
            raise InputError(f"{origin}: {entry.name} has {key} {actual} in the model, and {planned} in the plan")
    operator = get_operator(entry.operator)
    if reason := obstacle(site, operator) or operator.idle(site, entry.split):
        raise InputError(f"{origin}: {entry.name} cannot be replaced: {reason}")
    return site_plan(site, entry.split, entry.operator, entry.sensitivity)
