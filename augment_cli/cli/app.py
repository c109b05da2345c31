"""The `augment` program: its commands, and how every one of them fails."""

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from augment_cli import signals
from augment_cli.cli import (
    attention,
    check,
    compare,
    convert,
    detect,
    diff,
    evaluate,
    export,
    finetune,
    models,
    plan,
    push,
    recipes,
    report,
    timm,
)
from augment_cli.errors import AugmentError, out_of_memory
from augment_cli.terminal import echo, respell, say

# What Typer raises for arguments that do not fit; it exports the class for a single argument, and not their base.
_UsageError: Any = typer.BadParameter.__base__


class _Program(TyperGroup):
    """Bad input ends every command with one message and exit code 2, Ctrl-C with 130, a closed pipe in silence."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AugmentError as error:
            raise _refused(error) from error
        except _UsageError as error:
            message = error.format_message().replace("Value error, ", "")
            if not message:  # a group without a command has shown its help
                raise
            say(f"error: {message.rstrip('.')}; {error.ctx.command_path} --help says what it takes")
            raise typer.Exit(2) from error
        except (MemoryError, RuntimeError) as error:  # torch's are RuntimeErrors; typer's and click's own are, too
            if short := out_of_memory(error, f"augment {ctx.invoked_subcommand}", "smaller batches or images"):
                raise _refused(short) from error
            raise
        except KeyboardInterrupt as error:
            say("interrupted")
            raise typer.Exit(130) from error
        except BrokenPipeError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from error


def _refused(error: AugmentError) -> typer.Exit:
    say(f"error: {respell(str(error))}")
    return typer.Exit(2)


app = typer.Typer(
    cls=_Program,
    name="augment",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        echo(f"augment-cli {version('augment-cli')}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Attention for the convolutions of any timm model, within its parameter budget."""


app.command("plan")(plan.plan)
app.command("convert")(convert.convert)
app.command("report")(report.report)
app.command("compare")(compare.compare)
app.command("diff")(diff.diff)
app.command("attention")(attention.attention)
app.command("check")(check.check)
app.command("export")(export.export)
app.command("push")(push.push)
app.command("finetune")(finetune.finetune)
app.command("evaluate")(evaluate.evaluate)
app.add_typer(detect.app, name="detect")
app.command("timm")(timm.timm)
app.add_typer(recipes.app, name="recipes")
app.command("models")(models.models)


def main() -> None:
    try:
        app()
    except signals.Stopped as stop:
        say("interrupted")
        sys.exit(stop.exit_code)
    finally:
        signals.ignore()  # all is done or undone: a late signal only spoils the way out
