"""Commands as a user gives them, in this process."""

from typer.testing import CliRunner

from augment_cli.cli import app


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def ok(*arguments: str):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result
