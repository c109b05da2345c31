"""Does a converted model's file hold what it says? Reloaded, recounted, run."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from augment_cli.checkpoint import load
from augment_cli.graph import analyze, count_parameters
from augment_cli.header import read_header


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
    plan = read_header(path).plan
    model = load(path).eval()
    counted = analyze(model, plan.input_size)
    with torch.no_grad():
        out = model(torch.randn(1, *plan.input_size, generator=torch.Generator().manual_seed(0)))
    findings = [
        _count("parameters", plan.params_after, count_parameters(model)),
        _count("multiply-adds", plan.macs_after, counted.macs),
    ]
    for site in plan.sites:
        count = count_parameters(model.get_submodule(site.name))
        if count != site.params_after:
            findings.append(_count(f"parameters of {site.name}", site.params_after, count))
    shape, finite = tuple(out.shape), bool(out.isfinite().all())
    found = f"{shape}, {'finite' if finite else 'not finite'}"
    findings.append(Finding("forward pass", f"{(1, *shape[1:])}, finite", found, finite and shape[0] == 1))
    return findings


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
