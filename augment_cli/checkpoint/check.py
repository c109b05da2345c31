"""Does a converted model's file hold what it says? Reloaded, recounted, run."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from augment_cli.analysis.graph import analyze, count_parameters
from augment_cli.checkpoint.files import load
from augment_cli.checkpoint.metadata import read_metadata
from augment_cli.errors import boundary
from augment_cli.planning.plan import Plan


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: what the file says and what was found."""

    what: str
    expected: str
    found: str
    passed: bool


def verify_file(path: Path) -> list[Finding]:
    """Everything checked of a converted model's file or folder.

    Raises:
        AugmentError: it cannot be loaded at all.
    """
    plan = read_metadata(path).plan
    model = load(path).eval()
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

    from augment_cli.errors import AugmentError

    try:
        print(json.dumps([asdict(finding) for finding in verify_file(Path(sys.argv[1]))]))
    except AugmentError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
