"""augment check: reload a converted model in a clean process and hold it against its plan."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from augment_cli.cli import common
from augment_cli.errors import InputError


def check(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A converted model.")],
    base: common.Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="The findings as JSON.")] = False,
) -> None:
    """Reload a converted model in a process of its own, recount it, compare with its plan, and run a forward pass.

    augment check resnet50-aa.safetensors
    """
    from augment_cli.checkpoint.metadata import read_metadata

    plan = read_metadata(path).plan
    with common.working(f"reloading {path}"):
        command = [sys.executable, "-m", "augment_cli.checkpoint.check", str(path), *([base] if base else [])]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise InputError((run.stderr.strip() or f"ended by signal {-run.returncode}").splitlines()[-1])
    findings = json.loads(run.stdout)
    passed = all(finding["passed"] for finding in findings)
    if as_json:
        common.echo(json.dumps({"path": str(path), "passed": passed, "findings": findings}, indent=2))
    else:
        from rich.table import Table
        from rich.text import Text

        rows = Table(box=None, header_style="bold", title=f"{plan.model}, recipe {plan.recipe}", title_justify="left")
        for column in ("", "what", "by its plan", "found"):
            rows.add_column(column)
        for f in findings:
            rows.add_row(
                Text("ok", "green") if f["passed"] else Text("no", "red"), f["what"], f["expected"], f["found"]
            )
        common.show(rows)
    if not passed:
        raise InputError(f"{path} is not what its plan says")
