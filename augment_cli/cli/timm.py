"""augment timm: run a script of timm's, such as its train.py, with converted models known to it."""

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from augment_cli import signals
from augment_cli.errors import InputError


def timm(
    script: Annotated[Path, typer.Argument(metavar="SCRIPT", help="timm's train.py, validate.py, or one like them.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGUMENTS]", help="The script's own, after two dashes.")
    ] = None,
) -> None:
    """Run a script in which timm.create_model knows converted models: --model local-dir:DIR --pretrained.

    augment timm validate.py -- --model local-dir:resnet50-aa --pretrained --data-dir imagenet

    For train.py, the same as its own option --device-modules augment_cli.checkpoint.timm_plugin.
    """
    if not script.is_file():
        raise InputError(f"{script}: no such script; timm's are in its repository, not in its package")
    signals.restore()  # timm's train.py ends by itself at Ctrl-C
    sys.argv = [str(script), *(arguments or ())]
    sys.path.insert(0, str(script.absolute().parent))  # as python does for a script
    runpy.run_path(str(script), run_name="__main__")
