"""augment push: a converted model's folder to the Hugging Face hub."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from augment_cli.cli import common
from augment_cli.errors import InputError


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A converted model's folder.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Where to: OWNER/NAME, or NAME for your own account.")],
    public: Annotated[bool, typer.Option("--public", help="Let everyone see it; without, only you do.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Commit to a repository that exists.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Push without asking.")] = False,
) -> None:
    """Push a converted model's folder to the Hugging Face hub, where timm and augment load it as hf-hub:NAME.

    The token is that of `hf auth login`, or HF_TOKEN.

    augment push resnet50-aa me/resnet50-aa
    """
    from huggingface_hub.utils import disable_progress_bars

    from augment_cli.publishing import pack, send
    from augment_cli.reporting.units import counted

    parcel = pack(folder, name)
    seen = "public" if public else "private"
    common.say(
        f"{counted(len(parcel.files), 'file')} of {folder}, {parcel.size / 1e6:,.1f} MB, to {parcel.name}, {seen}"
    )
    if parcel.others:
        common.say(f"note: {parcel.others[0]} and whatever else augment did not write stays here")
    if not yes:
        if not sys.stdin.isatty():
            raise InputError("nobody is there to be asked: `yes=True` pushes without asking")
        if not typer.confirm("push?", err=True):
            common.say("nothing was pushed")
            raise typer.Exit(1)
    if not sys.stderr.isatty():
        disable_progress_bars()
    address = send(parcel, public=public, overwrite=overwrite)
    common.echo(address)
    common.say(f"load it as hf-hub:{'/'.join(address.split('/')[-2:])}, after `import augment_cli` in Python")
