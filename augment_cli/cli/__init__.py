"""The command line: one file a command, each thin: parse, call the library, show."""

from augment_cli.cli.app import app, main

__all__ = ["app", "main"]
