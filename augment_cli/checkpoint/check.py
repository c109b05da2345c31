"""Check a converted model against its plan: reload it, recount it, run it."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from augment_cli.analysis.graph import analyze, count_parameters
from augment_cli.checkpoint.files import load
from augment_cli.checkpoint.metadata import read_metadata
from augment_cli.checkpoint.rebuild import Base
from augment_cli.errors import boundary
from augment_cli.planning.plan import Plan


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: what the file says and what was found."""

    what: str
    expected: str
    found: str
    passed: bool


def verify_file(path: Path, base: Base | None = None) -> list[Finding]:
    """Load a converted model's file or folder and check everything in it; `base` as for `load`.

    Raises:
        AugmentError: it cannot be loaded at all.
    """
    return verify_model(load(path, base), read_metadata(path).plan)


def verify_model(model: nn.Module, plan: Plan) -> list[Finding]:
    """Recount a converted model, whole and site by site, and run it on an image. The model is left as it is."""
    training = model.training
    try:
        return _findings(model.eval(), plan)
    finally:
        model.train(training)


def _findings(model: nn.Module, plan: Plan) -> list[Finding]:
    findings = [
        _count("parameters", plan.params_after, count_parameters(model)),
        _count("multiply-adds", plan.macs_after, analyze(model, plan.input_size).macs),
    ]
    for site in plan.sites:
        count = count_parameters(model.get_submodule(site.name))
        if count != site.params_after:
            findings.append(_count(f"parameters of {site.name}", site.params_after, count))
    # A forward pass costs what the plan's counts say, or it is not tried: they may be somebody's invention.
    return [*findings, _run(model, plan)] if all(finding.passed for finding in findings) else findings


def _run(model: nn.Module, plan: Plan) -> Finding:
    images = torch.randn(1, *plan.input_size, generator=torch.Generator().manual_seed(0))
    with boundary(f"{plan.model} does not run on an image of {'x'.join(map(str, plan.input_size))}"), torch.no_grad():
        outputs = [out for out in tree_leaves(model(images)) if isinstance(out, Tensor)]
    shape = ", ".join(str(tuple(out.shape)) for out in outputs)
    finite = all(bool(out.isfinite().all()) for out in outputs)
    expected = f"{shape}, finite"
    return Finding("forward pass", expected, expected if finite else f"{shape}, not finite", finite)


def _count(what: str, expected: int, found: int) -> Finding:
    return Finding(what, f"{expected:,}", f"{found:,}", expected == found)


if __name__ == "__main__":
    import json
    import sys

    from augment_cli.analysis.functions import resolve
    from augment_cli.errors import AugmentError

    try:
        path, *bases = sys.argv[1:]
        findings = verify_file(Path(path), resolve(bases[0]) if bases else None)
        print(json.dumps([asdict(finding) for finding in findings]))
    except AugmentError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
